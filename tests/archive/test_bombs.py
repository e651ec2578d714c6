"""Files that unpack to far more than their size are stopped early, and cost no other file."""

import gzip
import time
import zipfile

import pyarrow as pa
import pytest

from lungopacity.archive import unpacking
from lungopacity.archive.names import Wanted
from lungopacity.errors import ErrorCode
from lungopacity.radiograph import DecodeLimits
from tests.archive.making import (
    COMPRESSIONS,
    FILMS,
    make_streamed_zip,
    make_tar,
    make_zip,
    noise,
    walk,
    write_parquet,
)


@pytest.fixture
def small_allowance(monkeypatch):
    monkeypatch.setattr(unpacking, "_FREE_BYTES", 1024 * 1024)


def zeros(megabytes: int) -> bytes:
    return bytes(megabytes * 1024 * 1024)


@pytest.mark.usefixtures("small_allowance")
@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("pack", [bytes, lambda data: make_tar([("a", b"1"), ("b", data)])])
def test_a_stream_of_zeros_is_stopped(suffix, pack):
    rows, ended = walk(COMPRESSIONS[suffix](pack(zeros(40))))
    assert rows in ([], [("a", b"1")])
    assert ended is ErrorCode.DECOMPRESSION_BOMB


@pytest.mark.usefixtures("small_allowance")
def test_the_skipped_members_of_a_compressed_tar_are_bounded_too():
    files = [("a", zeros(40)), ("b", b"1")]
    wanted = Wanted(frozenset({"b"}))
    data = gzip.compress(make_tar(files))
    assert walk(data, wanted=wanted) == ([("a", None)], ErrorCode.DECOMPRESSION_BOMB)
    limits = DecodeLimits(max_size_bytes=100)
    rows = [("a", ErrorCode.TOO_LARGE)]
    assert walk(data, limits=limits) == (rows, ErrorCode.DECOMPRESSION_BOMB)


@pytest.mark.usefixtures("small_allowance")
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_in_a_zip_is_refused_alone(method):
    data = make_zip([("a", b"1"), ("bomb", zeros(40)), ("b", b"2")], method)
    rows = [("a", b"1"), ("bomb", ErrorCode.DECOMPRESSION_BOMB), ("b", b"2")]
    assert walk(data) == (rows, None)
    assert walk(data, wanted=Wanted(frozenset({"a"}))) == (
        [("a", b"1"), ("bomb", None), ("b", None)],
        None,
    )


@pytest.mark.usefixtures("small_allowance")
def test_many_small_bombs_in_a_zip_count_together():
    files = [(str(n), zeros(1)) for n in range(20)]
    rows, ended = walk(make_zip([*files, ("film", noise(0))], zipfile.ZIP_DEFLATED))
    refused = [content for _, content in rows].count(ErrorCode.DECOMPRESSION_BOMB)
    assert 10 < refused < 20
    assert (rows[-1], ended) == (("film", noise(0)), None)


@pytest.mark.usefixtures("small_allowance")
def test_many_nested_bombs_count_together_and_do_not_cost_the_rest():
    # Each of them alone is within the limit.
    bomb = gzip.compress(zeros(1))
    data = make_tar(
        [*((f"{n}.gz", bomb) for n in range(9)), ("z.tar.gz", gzip.compress(make_tar(FILMS)))]
    )
    rows, ended = walk(data)
    assert rows[0] == ("0.gz", zeros(1))
    assert rows[1:9] == [(f"{n}.gz", ErrorCode.DECOMPRESSION_BOMB) for n in range(1, 9)]
    assert rows[9:] == [(f"z.tar.gz/{name}", film) for name, film in FILMS]
    assert ended is None


@pytest.mark.usefixtures("small_allowance")
def test_a_streamed_zip_without_directory_is_bounded():
    data = make_streamed_zip([("a", b"1"), ("b", zeros(40))])
    assert walk(data[:-10]) == ([("a", b"1")], ErrorCode.DECOMPRESSION_BOMB)


@pytest.mark.usefixtures("small_allowance")
@pytest.mark.parametrize(("rows", "dictionary"), [(1, False), (2000, True)])
def test_a_parquet_file_that_multiplies_its_images_is_stopped(rows, dictionary):
    image = noise(0, 100_000) if dictionary else zeros(40)
    table = pa.table({"image": pa.array([image] * rows, pa.binary())})
    data = write_parquet(table, compression="zstd", use_dictionary=dictionary)
    found, ended = walk(data)
    assert len(found) < max(rows, 2) // 2
    assert ended is ErrorCode.DECOMPRESSION_BOMB


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_gigabyte_of_zeros_ends_in_seconds(suffix):
    bomb = COMPRESSIONS[suffix](zeros(64)) * 16
    started = time.monotonic()
    _, ended = walk(bomb)
    assert ended is ErrorCode.DECOMPRESSION_BOMB
    assert time.monotonic() - started < 20
