"""What is true of containers of every kind."""

import errno
import gzip
import io
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lungopacity.archive.containers import SHARD_SUFFIXES, is_container, members
from lungopacity.archive.names import Wanted
from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits
from lungopacity.storage import open_store
from tests.archive.making import (
    COMPRESSED_TARS,
    COMPRESSIONS,
    FILMS,
    KINDS,
    LIMITS,
    PARQUETS,
    TARS,
    ZIPS,
    FailingDisk,
    every_kind,
    make_tar,
    make_zip,
    noise,
    walk,
    whole_from,
    zstd,
)
from tests.films import dicom, encoded, grey_film

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")


@every_kind
def test_members_come_in_order_whatever_the_name_of_the_object(kind):
    data = KINDS[kind](FILMS)
    assert is_container(data[:512])
    assert walk(data, f"deep/x.{kind}") == (FILMS, None)
    assert walk(data, "anything") == (FILMS, None)


@every_kind
def test_an_empty_container_has_no_members_and_no_error(kind):
    assert walk(KINDS[kind]([]), f"x.{kind}") == ([], None)


def test_every_kind_has_its_suffix():
    assert set(SHARD_SUFFIXES) == {
        *(".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2"),
        *(".tbz", ".tz2"),
        *(".tar.xz", ".txz", ".zip", ".parquet"),
    }


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=150
).filter(lambda name: not name.endswith("/"))
contents = st.one_of(st.just(b""), st.binary(max_size=3000).map(lambda data: b"\x89" + data))


@every_kind
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=st.lists(st.tuples(names, contents), max_size=8))
@example(files=[("../../a", b"1"), ("/etc/b", b"2"), ("a", b"3"), ("a", b"4"), (" .. .", b"5")])
def test_any_list_of_members_is_read_back(kind, files):
    expected = [(name, data or ErrorCode.EMPTY) for name, data in files]
    assert walk(KINDS[kind](files), f"x.{kind}") == (expected, None)


@every_kind
def test_a_cut_at_any_point_gives_the_readable_members_and_an_error(kind):
    data = KINDS[kind](FILMS)
    whole = whole_from(kind, data)
    most = 0
    for cut in [*range(0, whole, 61), *range(0, whole, 512), whole - 1]:
        rows, ended = walk(data[:cut], f"x.{kind}")
        assert ended is ErrorCode.CORRUPT_ARCHIVE, cut
        assert rows == FILMS[: len(rows)], cut
        most = max(most, len(rows))
    # A Parquet file without its footer, or a zstd file without its only block, gives nothing.
    assert most == (0 if kind in (*PARQUETS, "tar.zst") else len(FILMS))


@every_kind
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_failing_disk_is_not_reported_as_a_damaged_container(kind, number):
    data = KINDS[kind](FILMS)
    for place in [*range(0, len(data), 512), len(data) - 1]:
        rows, ended = walk(FailingDisk(data, place, place + 1, number), f"x.{kind}")
        found = {ended, *(content for _, content in rows if isinstance(content, ErrorCode))}
        assert found - {None} == {ErrorCode.UNAVAILABLE}, place


@every_kind
def test_no_member_is_half_old_half_new_where_a_shard_on_disk_is_overwritten(kind, tmp_path):
    films, others = ([(str(n), noise(seed + n, 300_000)) for n in range(5)] for seed in (0, 10))
    store, path = open_store(str(tmp_path)), tmp_path / "x"
    path.write_bytes(KINDS[kind](films))
    found: list[object] = []
    with store.open_local("x", etag=store.head("x").etag) as file:
        try:
            for index, _, content in members(file, f"x.{kind}", LIMITS):
                found.append(content.code if isinstance(content, ImageError) else content)
                if index == 0:
                    with open(path, "r+b") as writer:
                        writer.write(KINDS[kind](others))
        except ImageError as error:
            found.append(error.code)
    read = [content for content in found if content is not ErrorCode.CHANGED]
    assert read == [content for _, content in films][: len(read)]
    # Arrow may have read all rows of a Parquet file at once.
    assert 1 <= len(read) < 5 or (kind in PARQUETS and len(read) == 5)


@pytest.mark.parametrize("kind", [*TARS, *ZIPS])
def test_every_member_before_a_cut_is_read(kind):
    data = KINDS[kind](FILMS)
    third = data.index(FILMS[3][1][:20] if kind == "stored.zip" else FILMS[3][0].encode())
    rows, ended = walk(data[: third + 100], f"x.{kind}")
    assert (rows, ended) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)


@pytest.mark.parametrize("kind", COMPRESSED_TARS)
def test_members_before_damage_in_a_compressed_tar_are_read(kind):
    films = [(str(n), noise(n, 300_000)) for n in range(8)]  # bzip2 works in blocks of 900 kB
    data = KINDS[kind](films)
    place = len(data) * 3 // 4 + 5000
    rows, ended = walk(data[:place])
    assert (rows, ended) == (films[: len(rows)], ErrorCode.CORRUPT_ARCHIVE)
    assert len(rows) >= (2 if kind == "tar.bz2" else 5)
    if kind != "tar.zst":  # whose frames carry no checksum unless asked for
        flipped = bytes(255 - byte for byte in data[place : place + 64])
        rows, ended = walk(data[:place] + flipped + data[place + 64 :])
        assert (rows[:2], ended) == (films[:2], ErrorCode.CORRUPT_ARCHIVE)


@every_kind
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_raises_only_image_errors(kind, place, bit):
    data = bytearray(KINDS[kind](FILMS))
    data[int(place * len(data))] ^= 1 << bit
    rows, ended = walk(bytes(data), f"x.{kind}")
    assert len(rows) <= len(FILMS)
    if kind in ("tar.gz", "tar.bz2", "tar.xz"):
        assert ended is not None or rows == FILMS
    if kind in ZIPS:
        right = {content for _, content in FILMS}
        assert all(isinstance(content, ErrorCode) or content in right for _, content in rows)
    if kind in (*ZIPS, *PARQUETS):
        assert ended is not None or len(rows) == len(FILMS)


@every_kind
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(start=st.floats(0, 1), size=st.integers(1, 600), seed=st.integers(0, 10**6))
def test_noise_in_the_middle_raises_only_image_errors(kind, start, size, seed):
    data = bytearray(KINDS[kind](FILMS))
    place = int(start * len(data))
    data[place : place + size] = random.Random(seed).randbytes(size)
    walk(bytes(data), f"x.{kind}")


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([data[:8] for data in (k(FILMS) for k in KINDS.values())]),
       rest=st.binary(max_size=1000))  # fmt: skip
def test_noise_after_a_signature_is_an_error(start, rest):
    rows, ended = walk(start + rest)
    assert ended is not None or rows


@every_kind
def test_members_that_are_not_wanted_have_no_content(kind):
    rows, ended = walk(KINDS[kind](FILMS), wanted=Wanted(frozenset({FILMS[1][0], "not there"})))
    expected = [(name, data if n == 1 else None) for n, (name, data) in enumerate(FILMS)]
    assert (rows, ended) == (expected, None)


class Counted(io.BytesIO):
    taken = 0

    def read(self, size=-1, /):
        data = super().read(size)
        self.taken += len(data)
        return data


@pytest.mark.parametrize("kind", ["tar", "stored.zip"])
def test_members_that_are_not_wanted_are_not_read(kind):
    big = [(str(n), noise(n, 1_000_000)) for n in range(4)]
    file = Counted(KINDS[kind](big))
    rows = list(members(file, "x", LIMITS, Wanted(frozenset({"2"}))))
    assert [data is None for _, _, data in rows] == [True, True, False, True]
    assert file.taken < 1_200_000


@every_kind
def test_the_file_stays_open(kind):
    file = io.BytesIO(KINDS[kind](FILMS))
    assert len(list(members(file, "x", LIMITS))) == len(FILMS)
    assert not file.closed


@every_kind
def test_an_abandoned_walk_leaves_the_file_open(kind):
    file = io.BytesIO(KINDS[kind](FILMS))
    walking = members(file, "x", LIMITS)
    next(walking)
    walking.close()
    assert not file.closed


@every_kind
def test_a_member_that_is_too_large_is_a_row_and_the_walk_goes_on(kind):
    files = [("a", b"1"), ("b", noise(0)), ("c", b"2"), ("d", b"")]
    rows, ended = walk(KINDS[kind](files), limits=DecodeLimits(max_size_bytes=100))
    assert [content for _, content in rows] == [b"1", ErrorCode.TOO_LARGE, b"2", ErrorCode.EMPTY]
    assert ended is None


def test_an_object_that_is_not_a_container_is_corrupt():
    for data in (b"", b"PK", b"no container at all", bytes(512), encoded(grey_film())):
        assert walk(data, "x.dat") == ([], ErrorCode.CORRUPT_ARCHIVE)


# What is a container


def test_images_are_not_taken_for_containers():
    film = grey_film()
    implicit = bytearray(dicom(film.astype(np.uint16)))[132:]  # no preamble
    images = [
        *(encoded(film, kind) for kind in ("PNG", "JPEG", "JPEG2000", "BMP", "TIFF", "GIF")),
        dicom(film.astype(np.uint16)),
        bytes(implicit),
        bytes(600),
        b"name,label\n" * 60,
        b"",
        b"\x08\x00\x05\x00" + bytes(600),
    ]
    assert [is_container(data[:512]) for data in images] == [False] * len(images)


def test_an_old_tar_is_recognised_by_its_checksum():
    data = bytearray(make_tar([("old.png", b"data")]))
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert is_container(bytes(data[:512]))
    assert walk(bytes(data)) == ([("old.png", b"data")], None)
    assert walk(gzip.compress(bytes(data))) == ([("old.png", b"data")], None)
    data[100] ^= 1
    assert not is_container(bytes(data[:512]))


def test_an_office_document_is_one_file():
    for first in ("[Content_Types].xml", "xl/workbook.xml", "word/document.xml", "mimetype"):
        document = make_zip([(first, b"text")])
        assert not is_container(document[:512])
        assert walk(make_tar([("a.xlsx", document)])) == ([("a.xlsx", document)], None)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_one_compressed_image_is_one_member(suffix):
    film = encoded(grey_film())
    data = COMPRESSIONS[suffix](film)
    assert walk(data, f"deep/film.dcm.{suffix.upper()}") == ([("deep/film.dcm", film)], None)
    assert walk(data, "film") == ([("film", film)], None)
    assert walk(data, limits=DecodeLimits(max_size_bytes=len(film) - 1)) == (
        [("x", ErrorCode.TOO_LARGE)],
        None,
    )
    assert walk(COMPRESSIONS[suffix](b"")) == ([("x", ErrorCode.EMPTY)], None)
    wanted = Wanted(frozenset({"other"}))
    assert walk(data, f"film.{suffix}", wanted=wanted) == ([("film", None)], None)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_cut_compressed_image_is_an_error_and_not_an_image(suffix):
    data = COMPRESSIONS[suffix](noise(1))
    for cut in [*range(10, len(data), 101), len(data) - 1]:
        assert walk(data[:cut], f"film.{suffix}") == ([], ErrorCode.CORRUPT_ARCHIVE), cut


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_consecutive_streams_are_one_content(suffix):
    tar = make_tar(FILMS)
    compress = COMPRESSIONS[suffix]
    parts = compress(tar[:3000]) + compress(tar[3000:])
    assert walk(parts) == (FILMS, None)
    # Python's own readers would silently drop what follows the first stream.
    assert walk(compress(noise(1)) + b"neither stream nor padding") == (
        [],
        ErrorCode.CORRUPT_ARCHIVE,
    )


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("size", [1, 40_000])
def test_zeros_after_a_stream_are_padding(suffix, size):
    """Tapes write them, because their blocks have one size."""
    tar = make_tar(FILMS)
    compress = COMPRESSIONS[suffix]
    assert walk(compress(tar) + bytes(size)) == (FILMS, None)
    assert walk(compress(tar[:3000]) + bytes(size) + compress(tar[3000:])) == (FILMS, None)


def test_a_skippable_zstd_frame_may_come_first():
    assert walk(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstd(make_tar(FILMS))) == (FILMS, None)


def test_a_compressed_tar_with_a_broken_first_header_is_a_broken_tar():
    broken = bytearray(make_tar(FILMS))
    broken[257:262] = b"-----"
    for name in ("x.tar.gz", "x.TGZ"):
        assert walk(gzip.compress(bytes(broken)), name) == ([], ErrorCode.CORRUPT_ARCHIVE)
