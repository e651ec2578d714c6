import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lungopacity.archive import unpacking
from lungopacity.archive.containers import SHARD_SUFFIXES, is_container, members
from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits
from tests.films import dicom, encoded, grey_film

LIMITS = DecodeLimits()
pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")

Files = list[tuple[str, bytes]]


def make_tar(files: Files, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_zip(files: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """Makes zipfile write sizes behind the data, as it does into a pipe."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        self.data += data
        return len(data)


def make_streamed_zip(files: Files) -> bytes:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(_deflated(name), data)
    return bytes(pipe.data)


def _deflated(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def write_parquet(table: pa.Table, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def make_hugging_face(files: Files) -> bytes:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": data, "path": name} for name, data in files], kind)
    return write_parquet(pa.table({"image": images, "label": pa.array([0] * len(files))}))


def make_flat_parquet(files: Files) -> bytes:
    columns = {
        "file_name": pa.array([name for name, _ in files], pa.string()),
        "jpg": pa.array([data for _, data in files], pa.large_binary()),
    }
    return write_parquet(pa.table(columns), row_group_size=2)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
TARS = {
    "tar": make_tar,
    "pax.tar": lambda files: make_tar(files, tarfile.PAX_FORMAT),
}
COMPRESSED_TARS = {
    f"tar.{suffix}": lambda files, compress=compress: compress(make_tar(files))
    for suffix, compress in COMPRESSIONS.items()
}
ZIPS = {
    "stored.zip": make_zip,
    "deflated.zip": lambda files: make_zip(files, zipfile.ZIP_DEFLATED),
    "bzip2.zip": lambda files: make_zip(files, zipfile.ZIP_BZIP2),
    "lzma.zip": lambda files: make_zip(files, zipfile.ZIP_LZMA),
    "streamed.zip": make_streamed_zip,
}
PARQUETS = {"hf.parquet": make_hugging_face, "flat.parquet": make_flat_parquet}
KINDS: dict[str, Callable[[Files], bytes]] = {**TARS, **COMPRESSED_TARS, **ZIPS, **PARQUETS}
every_kind = pytest.mark.parametrize("kind", KINDS)


def noise(seed: int, size: int = 1500) -> bytes:
    return b"film" + random.Random(seed).randbytes(size)


FILMS: Files = [(f"folder/ü {n}.v1.png", noise(n)) for n in range(5)]


def walk(data: bytes, name: str = "x", limits: DecodeLimits = LIMITS, wanted=None):
    """Names and contents (an error as its code), and the code of the error that ended the walk."""
    rows = []
    walking = members(io.BytesIO(data), name, limits, wanted)
    while True:
        try:
            index, member, content = next(walking)
        except StopIteration:
            return rows, None
        except ImageError as error:
            return rows, error.code
        assert index == len(rows)
        rows.append((member, content.code if isinstance(content, ImageError) else content))


@every_kind
def test_members_come_in_order_whatever_the_name_of_the_object(kind):
    data = KINDS[kind](FILMS)
    assert is_container(data[:512])
    assert walk(data, f"deep/x.{kind}") == (FILMS, None)
    assert walk(data, "anything") == (FILMS, None)


@every_kind
def test_a_container_of_nothing_has_no_members_and_no_error(kind):
    assert walk(KINDS[kind]([]), f"x.{kind}") == ([], None)


def test_every_kind_has_its_suffix():
    assert set(SHARD_SUFFIXES) == {
        *(".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2"),
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
def test_any_list_of_members_comes_back(kind, files):
    expected = [(name, data or ErrorCode.EMPTY) for name, data in files]
    assert walk(KINDS[kind](files), f"x.{kind}") == (expected, None)


def _whole_from(kind: str, data: bytes) -> int:
    """The shortest cut that loses nothing: tars are padded with zeros behind their end mark."""
    return len(data.rstrip(b"\0")) // 512 * 512 + 1024 if kind in TARS else len(data)


@every_kind
def test_a_cut_at_any_point_gives_the_readable_members_and_an_error(kind):
    data = KINDS[kind](FILMS)
    whole = _whole_from(kind, data)
    most = 0
    for cut in [*range(0, whole, 61), *range(0, whole, 512), whole - 1]:
        rows, ended = walk(data[:cut], f"x.{kind}")
        assert ended is ErrorCode.CORRUPT_ARCHIVE, cut
        assert rows == FILMS[: len(rows)], cut
        most = max(most, len(rows))
    # A Parquet file without its footer, or zstd without its one block, gives nothing.
    assert most == (0 if kind in (*PARQUETS, "tar.zst") else len(FILMS))


@pytest.mark.parametrize("kind", [*TARS, *ZIPS])
def test_every_member_in_front_of_a_cut_is_read(kind):
    data = KINDS[kind](FILMS)
    third = data.index(FILMS[3][1][:20] if kind == "stored.zip" else FILMS[3][0].encode())
    rows, ended = walk(data[: third + 100], f"x.{kind}")
    assert (rows, ended) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)


@pytest.mark.parametrize("kind", COMPRESSED_TARS)
def test_members_in_front_of_damage_in_a_compressed_tar_are_read(kind):
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
def test_a_flipped_bit_is_never_more_than_an_error(kind, place, bit):
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
def test_noise_in_the_middle_is_never_more_than_an_error(kind, start, size, seed):
    data = bytearray(KINDS[kind](FILMS))
    place = int(start * len(data))
    data[place : place + size] = random.Random(seed).randbytes(size)
    walk(bytes(data), f"x.{kind}")


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([data[:8] for data in (k(FILMS) for k in KINDS.values())]),
       rest=st.binary(max_size=1000))  # fmt: skip
def test_noise_behind_a_signature_is_an_error(start, rest):
    rows, ended = walk(start + rest)
    assert ended is not None or rows


@every_kind
def test_names_that_are_not_wanted_come_without_their_content(kind):
    rows, ended = walk(KINDS[kind](FILMS), wanted=frozenset({FILMS[1][0], "not there"}))
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
    rows = list(members(file, "x", LIMITS, frozenset({"2"})))
    assert [data is None for _, _, data in rows] == [True, True, False, True]
    assert file.taken < 1_200_000


@every_kind
def test_the_file_stays_open(kind):
    file = io.BytesIO(KINDS[kind](FILMS))
    assert len(list(members(file, "x", LIMITS))) == len(FILMS)
    assert not file.closed


@every_kind
def test_a_walk_that_is_given_up_leaves_the_file_open(kind):
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


def test_an_object_that_is_no_container_is_corrupt():
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


def test_an_old_tar_is_known_by_its_checksum_alone():
    data = bytearray(make_tar([("old.png", b"data")]))
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert is_container(bytes(data[:512]))
    assert walk(bytes(data)) == ([("old.png", b"data")], None)
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
    wanted = frozenset({"other"})
    assert walk(data, f"film.{suffix}", wanted=wanted) == ([("film", None)], None)


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_cut_compressed_image_is_an_error_and_no_image(suffix):
    data = COMPRESSIONS[suffix](noise(1))
    for cut in [*range(10, len(data), 101), len(data) - 1]:
        assert walk(data[:cut], f"film.{suffix}") == ([], ErrorCode.CORRUPT_ARCHIVE), cut


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_streams_one_after_another_are_one_content(suffix):
    tar = make_tar(FILMS)
    compress = COMPRESSIONS[suffix]
    parts = compress(tar[:3000]) + compress(tar[3000:])
    assert walk(parts) == (FILMS, None)
    # The library's own readers would drop what follows the first stream in silence.
    assert walk(compress(noise(1)) + b"neither stream nor padding") == (
        [],
        ErrorCode.CORRUPT_ARCHIVE,
    )


def test_a_skippable_zstd_frame_may_come_first():
    assert walk(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstd(make_tar(FILMS))) == (FILMS, None)


def test_a_compressed_tar_with_a_broken_first_header_is_a_broken_tar():
    broken = bytearray(make_tar(FILMS))
    broken[257:262] = b"-----"
    for name in ("x.tar.gz", "x.TGZ"):
        assert walk(gzip.compress(bytes(broken)), name) == ([], ErrorCode.CORRUPT_ARCHIVE)


# Tar


def test_a_tar_cut_between_two_members_is_noticed():
    data = make_tar([("a", b"1"), ("b", b"2")])
    assert walk(data[:1024]) == ([("a", b"1")], ErrorCode.CORRUPT_ARCHIVE)


def test_a_broken_header_in_the_middle_is_noticed():
    data = bytearray(make_tar(FILMS))
    data[data.index(FILMS[3][0].encode()) + 150] ^= 0x55  # in the header's checksum
    assert walk(bytes(data)) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)
    assert walk(gzip.compress(bytes(data))) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)


def test_tars_one_after_another_are_noticed():
    data = make_tar(FILMS[:2]) + make_tar(FILMS[2:])
    assert walk(data) == (FILMS[:2], ErrorCode.CORRUPT_ARCHIVE)
    assert walk(zstd(data)) == (FILMS[:2], ErrorCode.CORRUPT_ARCHIVE)


def test_a_name_in_no_known_encoding_is_readable():
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        info = tarfile.TarInfo("Röntgen.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    assert walk(buffer.getvalue()) == ([(r"R\xf6ntgen.png", b"1")], None)


def _tar_of(*infos: tuple[tarfile.TarInfo, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for info, data in infos:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _info(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def test_a_link_is_a_second_name_where_it_can_be_followed_and_a_row_where_not():
    data = _tar_of(
        (_info("a.png"), b"film"),
        (_info("hard", tarfile.LNKTYPE, "a.png"), b""),
        (_info("soft", tarfile.SYMTYPE, "a.png"), b""),
        (_info("gone", tarfile.LNKTYPE, "elsewhere"), b""),
        (_info("z.png"), b"other"),
    )
    refused = ErrorCode.UNSUPPORTED
    rest = [("soft", refused), ("gone", refused), ("z.png", b"other")]
    assert walk(data) == ([("a.png", b"film"), ("hard", b"film"), *rest], None)
    assert walk(gzip.compress(data)) == ([("a.png", b"film"), ("hard", refused), *rest], None)


def test_only_what_can_hold_a_film_has_a_row():
    kinds = (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
    infos = [(_info(f"no{n}", kind), b"") for n, kind in enumerate(kinds)]
    data = _tar_of(
        *infos, (_info("contiguous", tarfile.CONTTYPE), b"1"), (_info("new", b"Z"), b"2")
    )
    assert walk(data) == ([("contiguous", b"1"), ("new", b"2")], None)


def _sparse(name: str, size: int, data: bytes) -> bytes:
    """A GNU sparse member: `data` at 0, the rest of `size` a hole."""
    header = bytearray(make_tar([(name, data)])[:1024])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % len(data)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_sparse_file_is_filled_with_zeros(compress):
    data = _sparse("s", 2000, b"x" * 512) + make_tar([("next", b"1")])
    expected = [("s", b"x" * 512 + bytes(1488)), ("next", b"1")]
    assert walk(compress(data)) == (expected, None)


def test_a_sparse_file_of_a_gigabyte_is_a_bomb_and_the_walk_goes_on():
    data = _sparse("s", 1 << 30, b"x" * 512) + make_tar([("next", b"1")])
    limits = DecodeLimits(max_size_bytes=1 << 40)
    rows = [("s", ErrorCode.DECOMPRESSION_BOMB), ("next", b"1")]
    assert walk(data, limits=limits) == (rows, None)


@pytest.mark.parametrize("value", ["-512", "-100000", "9" * 30, "9" * 4000, "x", "", "1e3", "1024"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_pax_size_that_lies_ends_the_walk(value, compress):
    info = _info("b")
    info.pax_headers = {"size": value}
    data = _tar_of((_info("a"), b"1"), (info, b"2"), (_info("c"), b"3"), format=tarfile.PAX_FORMAT)
    rows, ended = walk(compress(data))
    assert rows[0] == ("a", b"1")
    assert ended is ErrorCode.CORRUPT_ARCHIVE


@pytest.mark.parametrize("size", [-1, -512, -(10**6), 1 << 40, 1 << 62])
def test_a_header_size_that_lies_ends_the_walk(size):
    info = _info("b")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    data = make_tar([("a", b"1")])[:1024] + header + make_tar([("c", b"3")])
    rows, ended = walk(data)
    assert rows[0] == ("a", b"1")
    assert ended is ErrorCode.CORRUPT_ARCHIVE


def test_endless_extended_headers_end_the_walk():
    info = _info("long", tarfile.GNUTYPE_LONGNAME)
    info.size = 1 << 33
    assert walk(info.tobuf() + bytes(4096)) == ([], ErrorCode.CORRUPT_ARCHIVE)
    info.type, info.size = tarfile.XHDTYPE, 0
    assert walk(info.tobuf() * 5000 + bytes(1024)) == ([], ErrorCode.CORRUPT_ARCHIVE)


# Zip


def test_directories_of_a_zip_have_no_row():
    assert walk(make_zip([("folder/", b""), ("folder/a", b"1")])) == ([("folder/a", b"1")], None)


def test_members_of_a_zip_come_in_stored_order():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in "cab":
            archive.writestr(name, name)
        archive.filelist.sort(key=lambda info: info.filename)
    assert [name for name, _ in walk(buffer.getvalue())[0]] == ["c", "a", "b"]


@pytest.mark.parametrize("kind", ZIPS)
def test_a_broken_member_of_a_zip_is_lost_alone(kind):
    data = bytearray(KINDS[kind](FILMS))
    place = data.index(FILMS[2][0].encode()) + 700
    data[place : place + 8] = b"\xaa" * 8
    rows, ended = walk(bytes(data))
    assert rows == [*FILMS[:2], (FILMS[2][0], ErrorCode.CORRUPT_ARCHIVE), *FILMS[3:]]
    assert ended is None


def _patched_zip(local: tuple[int, bytes], central: tuple[int, bytes], **options) -> bytes:
    """Three films, with bytes changed in both headers of the middle one."""
    data = bytearray(make_zip(FILMS[:3], **options))
    name = FILMS[1][0].encode()
    first, second = data.index(name) - 30, data.rindex(name) - 46
    for place, (offset, value) in ((first, local), (second, central)):
        data[place + offset : place + offset + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize(
    ("local", "central", "code"),
    [
        ((6, b"\x01\x08"), (8, b"\x01\x08"), ErrorCode.ENCRYPTED),
        ((6, b"\x41\x08"), (8, b"\x41\x08"), ErrorCode.ENCRYPTED),
        ((6, b"\x20\x08"), (8, b"\x20\x08"), ErrorCode.UNSUPPORTED),
        ((8, b"\x09\x00"), (10, b"\x09\x00"), ErrorCode.UNSUPPORTED),
        ((8, b"\x5d\x00"), (10, b"\x5d\x00"), ErrorCode.UNSUPPORTED),
        ((14, b"\0\0\0\0"), (16, b"\0\0\0\0"), ErrorCode.CORRUPT_ARCHIVE),
        ((22, b"\xff\0\0\0"), (24, b"\xff\0\0\0"), ErrorCode.CORRUPT_ARCHIVE),
        ((22, b"\xff\xff\0\0"), (24, b"\xff\xff\0\0"), ErrorCode.CORRUPT_ARCHIVE),
    ],
)
def test_a_member_that_cannot_be_read_is_a_row_of_its_own(local, central, code, readable):
    data = _patched_zip(local, central)
    rows, ended = walk(data if readable else data[:-30])
    assert rows == [FILMS[0], (FILMS[1][0], code), FILMS[2]]
    assert ended is (None if readable else ErrorCode.CORRUPT_ARCHIVE)


def test_a_link_in_a_zip_is_a_row():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert walk(buffer.getvalue()) == ([("link", ErrorCode.UNSUPPORTED)], None)


def test_a_zip_behind_a_zip_hides_nothing_in_silence():
    rows, ended = walk(make_zip(FILMS[:2]) + make_zip(FILMS[2:]))
    assert (rows, ended) == (FILMS[2:], ErrorCode.CORRUPT_ARCHIVE)


def test_a_directory_that_hides_a_member_is_noticed():
    data = bytearray(make_zip(FILMS))
    entry = data.index(b"PK\x01\x02")
    size = data.index(b"PK\x01\x02", entry + 4) - entry
    data[entry + 32 : entry + 34] = struct.pack("<H", size)  # the comment's length
    rows, ended = walk(bytes(data))
    assert (rows, ended) == ([FILMS[0], *FILMS[2:]], ErrorCode.CORRUPT_ARCHIVE)


def test_a_name_that_differs_between_the_headers_of_a_zip_is_not_believed():
    data = bytearray(make_zip(FILMS))
    data[data.rindex(FILMS[1][0].encode())] ^= 1
    rows, ended = walk(bytes(data))
    assert [content for _, content in rows if content is ErrorCode.CORRUPT_ARCHIVE] == [
        ErrorCode.CORRUPT_ARCHIVE
    ]
    assert (rows[0], rows[2:], ended) == (FILMS[0], FILMS[2:], None)


def test_more_members_than_an_end_record_can_count_are_read():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(65_600):
            archive.writestr(zipfile.ZipInfo(str(number)), b"")
    rows, ended = walk(buffer.getvalue(), wanted=frozenset({"65599"}))
    assert (len(rows), rows[-1], ended) == (65_600, ("65599", ErrorCode.EMPTY), None)


def test_a_zip_that_unpacks_itself_is_read():
    assert walk(b"MZ" + bytes(600) + make_zip(FILMS), "x.zip") == (FILMS, None)
    assert is_container(b"MZ" + bytes(510), "x.ZIP")
    assert not is_container(b"MZ" + bytes(510), "x.exe")


def test_a_spanned_marker_is_no_obstacle():
    marked = b"PK\x07\x08" + make_zip(FILMS)
    assert is_container(marked[:512])
    assert walk(marked) == (FILMS, None)
    assert walk(marked[:-10]) == (FILMS, ErrorCode.CORRUPT_ARCHIVE)


def test_zip64_members_are_recovered():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in FILMS:
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert walk(buffer.getvalue()) == (FILMS, None)
    assert walk(buffer.getvalue()[:-10]) == (FILMS, ErrorCode.CORRUPT_ARCHIVE)


def test_members_that_share_bytes_are_not_unpacked():
    """David Fifield's bomb: many names for one kernel."""
    data = make_zip([("kernel", noise(0))])
    start = data.index(b"PK\x01\x02")
    central = data[start : data.index(b"PK\x05\x06")]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 100, 100, len(central) * 100, start, 0)
    rows, ended = walk(data[:start] + central * 100 + end)
    assert [content for _, content in rows] == [ErrorCode.CORRUPT_ARCHIVE] * 99 + [noise(0)]
    assert ended is None


# Parquet


def _table(**columns) -> bytes:
    return write_parquet(pa.table(columns))


def test_a_null_is_an_empty_row_and_a_row_without_a_path_has_its_number():
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, None, {"bytes": b"2"}]
    expected = [("a", b"1"), ("b", ErrorCode.EMPTY), ("2", ErrorCode.EMPTY), ("3", b"2")]
    assert walk(_table(scan=pa.array(rows, kind))) == (expected, None)


def test_the_image_column_is_the_known_one_of_several():
    data = _table(mask=[b"m"], dcm=[b"film"], image_id=["i"])
    assert walk(data) == ([("i", b"film")], None)
    assert walk(_table(left=[b"1"], right=[b"2"])) == ([], ErrorCode.UNSUPPORTED)
    assert walk(_table(left=[b"1"], label=[7])) == ([("0", b"1")], None)


def test_the_first_column_of_text_names_the_rows():
    data = _table(image=[b"1"], id=["id"], path=[3], filename=pa.array(["f"]).dictionary_encode())
    assert walk(data) == ([("f", b"1")], None)


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), "dictionary"])
@pytest.mark.parametrize("names", [pa.large_string(), pa.string_view(), "dictionary"])
def test_bytes_and_names_are_read_whatever_arrow_calls_their_type(kind, names):
    def column(values: pa.Array, wanted) -> pa.Array:
        return values.dictionary_encode() if wanted == "dictionary" else values.cast(wanted)

    films = column(pa.array([b"1", None, b"1"]), kind)
    names = column(pa.array(["a", "b", None]), names)
    expected = [("a", b"1"), ("b", ErrorCode.EMPTY), ("2", b"1")]
    assert walk(_table(image=films, file_name=names)) == (expected, None)
    structs = pa.StructArray.from_arrays([films, names], ["bytes", "path"])
    assert walk(_table(scan=structs)) == (expected, None)


def test_a_dictionary_of_images_is_unpacked_once_and_not_for_every_row(monkeypatch):
    films = [noise(seed, 300_000) for seed in range(60)] + [b"small"] * 3000
    data = _table(image=pa.array(films).dictionary_encode())
    began = time.process_time()
    assert walk(data) == ([(str(row), film) for row, film in enumerate(films)], None)
    assert time.process_time() - began < 4
    monkeypatch.setattr("lungopacity.archive.parquet_entries._DICTIONARY_BYTES", 1_000_000)
    assert walk(data) == ([], ErrorCode.UNSUPPORTED)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[b"1", b"2"]]),
        pa.array([[{"bytes": b"1", "path": "a"}]]),
        pa.array([{"image": {"bytes": b"1"}}]),
        pa.array([[("a", b"1")]], pa.map_(pa.string(), pa.binary())),
    ],
    ids=["list", "list of structs", "struct of structs", "map"],
)
def test_images_that_are_not_one_a_row_are_no_sheet(column):
    data = _table(images=column, label=[1])
    assert walk(data) == ([], ErrorCode.UNSUPPORTED)
    with pytest.raises(ImageError, match="write one image a row"):
        list(members(io.BytesIO(data), "x", LIMITS))
    # Beside a column of images they are something else, as masks are.
    assert walk(_table(masks=column, image=[b"1"])) == ([("0", b"1")], None)


def test_digests_in_a_sheet_are_no_images():
    digests = pa.array([bytes(32)], pa.binary(32))
    assert walk(_table(sha256=digests, label=[1])) == ([], ErrorCode.NOT_AN_IMAGE)


def test_a_sheet_is_no_image():
    sheet = _table(image=["a.png"], label=[1])
    assert walk(sheet, "labels.parquet") == ([], ErrorCode.NOT_AN_IMAGE)
    assert walk(make_tar([("l.parquet", sheet), ("a", b"1")])) == (
        [("l.parquet", ErrorCode.NOT_AN_IMAGE), ("a", b"1")],
        None,
    )


# Nesting


@every_kind
@pytest.mark.parametrize("outer", ["tar", "tar.gz", "tar.zst", "deflated.zip", "hf.parquet"])
def test_a_container_in_a_container_is_entered(kind, outer):
    inner = KINDS[kind](FILMS)
    data = KINDS[outer]([("a", b"1"), (f"in.{kind}", inner), ("b", b"2")])
    expected = [("a", b"1"), *((f"in.{kind}/{name}", film) for name, film in FILMS), ("b", b"2")]
    assert walk(data) == (expected, None)


def test_a_compressed_image_in_a_container_is_its_one_member():
    data = make_tar([("deep/film.dcm.gz", gzip.compress(b"film"))])
    assert walk(data) == ([("deep/film.dcm.gz/film.dcm", b"film")], None)


def test_a_container_in_a_nested_container_is_refused_alone():
    inner = make_tar([("1", b"1"), ("deep.zip", make_zip(FILMS)), ("2", b"2")])
    rows, ended = walk(make_zip([("in.tar", inner), ("b", b"3")]))
    refused = ("in.tar/deep.zip", ErrorCode.UNSUPPORTED)
    assert rows == [("in.tar/1", b"1"), refused, ("in.tar/2", b"2"), ("b", b"3")]
    assert ended is None


@pytest.mark.parametrize("kind", [*TARS, *COMPRESSED_TARS, *ZIPS])
@pytest.mark.parametrize("outer", ["tar", "tar.gz", "stored.zip"])
def test_a_broken_nested_container_gives_its_readable_members_and_its_error(kind, outer):
    inner = KINDS[kind](FILMS)
    data = KINDS[outer]([("in", inner[: _whole_from(kind, inner) * 9 // 10]), ("b", b"2")])
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


def test_a_nested_container_may_be_larger_than_an_image_may_be():
    limits = DecodeLimits(max_size_bytes=2000)
    rows, ended = walk(make_tar([("in.zip", make_zip(FILMS))]), limits=limits)
    assert (rows, ended) == ([(f"in.zip/{name}", film) for name, film in FILMS], None)


@pytest.mark.parametrize("outer", ["tar", "tar.gz", "deflated.zip"])
def test_a_nested_container_is_entered_for_a_wanted_member_alone(outer):
    inner = make_tar([("x/1", b"1"), ("x/2", b"2")])
    data = KINDS[outer]([("in", inner), ("other", inner), ("film", b"3"), ("in/x", b"4")])
    rows, ended = walk(data, wanted=frozenset({"in/x/2", "film/y"}))
    assert rows == [
        *[("in/x/1", None), ("in/x/2", b"2")],
        *[("other", None), ("film", None), ("in/x", None)],
    ]
    assert ended is None


# Bombs


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
    wanted = frozenset({"b"})
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
    assert walk(data, wanted=frozenset({"a"})) == ([("a", b"1"), ("bomb", None), ("b", None)], None)


@pytest.mark.usefixtures("small_allowance")
def test_many_small_bombs_in_a_zip_count_together():
    files = [(str(n), zeros(1)) for n in range(20)]
    rows, ended = walk(make_zip([*files, ("film", noise(0))], zipfile.ZIP_DEFLATED))
    refused = [content for _, content in rows].count(ErrorCode.DECOMPRESSION_BOMB)
    assert 10 < refused < 20
    assert (rows[-1], ended) == (("film", noise(0)), None)


@pytest.mark.usefixtures("small_allowance")
def test_many_nested_bombs_count_together_and_spare_the_rest():
    bomb = gzip.compress(zeros(10))
    data = make_tar(
        [*((f"{n}.gz", bomb) for n in range(9)), ("z.tar.gz", gzip.compress(make_tar(FILMS)))]
    )
    rows, ended = walk(data)
    assert rows[:9] == [(f"{n}.gz", ErrorCode.DECOMPRESSION_BOMB) for n in range(9)]
    assert rows[9:] == [(f"z.tar.gz/{name}", film) for name, film in FILMS]
    assert ended is None


@pytest.mark.usefixtures("small_allowance")
def test_a_streamed_zip_without_directory_is_bounded():
    data = make_streamed_zip([("a", b"1"), ("b", zeros(40))])
    assert walk(data[:-10]) == ([("a", b"1")], ErrorCode.DECOMPRESSION_BOMB)


@pytest.mark.usefixtures("small_allowance")
@pytest.mark.parametrize(("rows", "dictionary"), [(1, False), (2000, True)])
def test_a_parquet_that_multiplies_is_stopped(rows, dictionary):
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
