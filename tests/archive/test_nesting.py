"""Containers in containers."""

import errno
import gzip
import io

import pytest

from lungopacity.archive.names import Wanted
from lungopacity.errors import OF_STORAGE, ErrorCode
from lungopacity.radiograph import DecodeLimits
from tests.archive.making import (
    COMPRESSED_TARS,
    FILMS,
    KINDS,
    TARS,
    ZIPS,
    every_kind,
    make_tar,
    make_zip,
    noise,
    walk,
    whole_from,
)


@every_kind
@pytest.mark.parametrize("outer", ["tar", "tar.gz", "tar.zst", "deflated.zip", "hf.parquet"])
def test_a_container_in_a_container_is_entered(kind, outer):
    inner = KINDS[kind](FILMS)
    data = KINDS[outer]([("a", b"1"), (f"in.{kind}", inner), ("b", b"2")])
    expected = [("a", b"1"), *((f"in.{kind}/{name}", film) for name, film in FILMS), ("b", b"2")]
    assert walk(data) == (expected, None)


@pytest.mark.parametrize("outer", ["tar.gz", "deflated.zip", "hf.parquet"])
def test_a_compressed_film_in_a_container_keeps_its_name(outer):
    name = "deep/film.dcm.gz"
    data = KINDS[outer]([(name, gzip.compress(b"film")), ("b", b"2")])
    assert walk(data) == ([(name, b"film"), ("b", b"2")], None)
    wanted = Wanted(frozenset({name}))
    assert walk(data, wanted=wanted) == ([(name, b"film"), ("b", None)], None)
    wanted = Wanted(frozenset({"film.dcm.gz"}), by_ending=True)
    assert walk(data, wanted=wanted) == ([(name, b"film"), ("b", None)], None)


def test_a_nested_container_without_files_has_a_row():
    data = make_zip([("a", b"1"), ("in.zip", make_zip([])), ("b", b"2")])
    assert walk(data) == ([("a", b"1"), ("in.zip", ErrorCode.EMPTY), ("b", b"2")], None)


def test_a_container_in_a_nested_container_costs_only_itself():
    inner = make_tar([("1", b"1"), ("deep.zip", make_zip(FILMS)), ("2", b"2")])
    rows, ended = walk(make_zip([("in.tar", inner), ("b", b"3")]))
    refused = ("in.tar/deep.zip", ErrorCode.UNSUPPORTED)
    assert rows == [("in.tar/1", b"1"), refused, ("in.tar/2", b"2"), ("b", b"3")]
    assert ended is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_nested_container_that_the_disk_cannot_hold_is_tried_again(monkeypatch, number):
    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(number, "No space left on device")

    monkeypatch.setattr("lungopacity.archive.containers.SpooledTemporaryFile", lambda **_: Full())
    rows, ended = walk(make_zip([("in.tar", make_tar(FILMS)), ("b", b"3")]))
    assert (rows, ended) == ([("in.tar", ErrorCode.UNAVAILABLE), ("b", b"3")], None)
    assert ErrorCode.UNAVAILABLE in OF_STORAGE


@pytest.mark.parametrize("kind", [*TARS, *COMPRESSED_TARS, *ZIPS])
@pytest.mark.parametrize("outer", ["tar", "tar.gz", "stored.zip"])
def test_a_broken_nested_container_gives_its_readable_members_and_its_error(kind, outer):
    inner = KINDS[kind](FILMS)
    data = KINDS[outer]([("in", inner[: whole_from(kind, inner) * 9 // 10]), ("b", b"2")])
    rows, ended = walk(data)
    *films, broken, last = rows
    assert films == [(f"in/{name}", film) for name, film in FILMS[: len(films)]]
    assert (broken, last, ended) == (("in", ErrorCode.CORRUPT_ARCHIVE), ("b", b"2"), None)


def test_a_cut_inside_a_nested_container_gives_its_readable_members():
    data = make_tar([("a", b"1"), ("in.zip", make_zip(FILMS))])
    rows, ended = walk(data[: data.index(FILMS[3][1])])
    inner = [(f"in.zip/{name}", film) for name, film in FILMS[:3]]
    assert rows == [("a", b"1"), *inner, ("in.zip", ErrorCode.CORRUPT_ARCHIVE)]
    assert ended is ErrorCode.CORRUPT_ARCHIVE


def test_a_nested_container_whose_own_checksum_fails_is_not_trusted():
    data = bytearray(make_zip([("in.tar", make_tar(FILMS)), ("b", b"2")]))
    data[data.index(FILMS[1][1]) + 10] ^= 1
    assert walk(bytes(data)) == ([("in.tar", ErrorCode.CORRUPT_ARCHIVE), ("b", b"2")], None)


def test_a_failed_checksum_around_a_container_is_an_error_after_its_members():
    films = [(str(n), noise(n, 100_000)) for n in range(2)]
    data = bytearray(gzip.compress(make_zip(films)))
    data[-8] ^= 1
    rows, ended = walk(bytes(data), "x.zip.gz")
    assert rows[:1] == [("x.zip/0", films[0][1])]
    assert ended is ErrorCode.CORRUPT_ARCHIVE


def test_a_nested_container_may_be_larger_than_an_image_may_be():
    limits = DecodeLimits(max_size_bytes=2000)
    rows, ended = walk(make_tar([("in.zip", make_zip(FILMS))]), limits=limits)
    assert (rows, ended) == ([(f"in.zip/{name}", film) for name, film in FILMS], None)


@pytest.mark.parametrize("outer", ["tar", "tar.gz", "deflated.zip"])
def test_a_nested_container_is_entered_only_for_a_wanted_member(outer):
    inner = make_tar([("x/1", b"1"), ("x/2", b"2")])
    data = KINDS[outer]([("in", inner), ("other", inner), ("film", b"3"), ("in/x", b"4")])
    rows, ended = walk(data, wanted=Wanted(frozenset({"in/x/2", "film/y"})))
    assert rows == [
        *[("in/x/1", None), ("in/x/2", b"2")],
        *[("other", None), ("film", None), ("in/x", None)],
    ]
    assert ended is None


def test_a_name_without_its_folders_is_found_in_any_nested_container():
    inner = make_tar([("images/1.png", b"1"), ("images/2.png", b"2")])
    data = make_zip([("images_001.tar", inner), ("images_002.tar", make_tar([("3.png", b"3")]))])
    rows, ended = walk(data, wanted=Wanted(frozenset({"2.png", "3.png"}), by_ending=True))
    assert rows == [
        ("images_001.tar/images/1.png", None),
        ("images_001.tar/images/2.png", b"2"),
        ("images_002.tar/3.png", b"3"),
    ]
    assert ended is None
