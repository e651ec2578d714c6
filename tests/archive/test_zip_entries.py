"""Zips: members that cannot be read, and members that no directory lists."""

import io
import struct
import zipfile
import zlib

import pytest

from lungopacity.archive.containers import is_container
from lungopacity.archive.names import Wanted
from lungopacity.errors import ErrorCode
from tests.archive.making import (
    FILMS,
    KINDS,
    ZIPS,
    make_streamed_zip,
    make_tar,
    make_zip,
    noise,
    walk,
)


def test_directories_of_a_zip_have_no_row():
    assert walk(make_zip([("folder/", b""), ("folder/a", b"1")])) == ([("folder/a", b"1")], None)
    # One with content is not a directory.
    assert walk(make_zip([("film/", b"1")])) == ([("film/", b"1")], None)


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (0, [("films/1", b"1")]),
        (10, [("films/1", b"1")]),
        (3, [("films\\", ErrorCode.EMPTY), ("films\\1", b"1")]),  # a letter like others on Unix
    ],
)
def test_backslashes_separate_folders_in_a_zip_of_windows(system, expected):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (("films\\", b""), ("films\\1", b"1")):
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, data)
    assert walk(buffer.getvalue()) == (expected, None)


def _named(raw: bytes, extra: bytes = b"") -> bytes:
    """A zip of one member whose name has these bytes, without the flag of UTF-8."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("x" * len(raw))
        info.extra = extra
        archive.writestr(info, b"1")
    return buffer.getvalue().replace(b"x" * len(raw), raw)


@pytest.mark.parametrize(
    ("raw", "field", "name"),
    [
        ("Röntgen/ü漢.png".encode(), None, "Röntgen/ü漢.png"),  # as `zip` writes on Linux
        ("Röntgen/ü.png".encode("cp437"), None, "Röntgen/ü.png"),
        (b"R?ntgen.png", "Röntgen.png", "Röntgen.png"),
        (b"R?ntgen.png", None, "R?ntgen.png"),
    ],
)
def test_a_name_is_read_in_the_encoding_that_it_is_written_in(raw, field, name):
    extra = b""
    if field is not None:
        path = struct.pack("<BI", 1, zlib.crc32(raw)) + field.encode()
        extra = struct.pack("<2H", 0x7075, len(path)) + path
    data = _named(raw, extra)
    assert walk(data) == ([(name, b"1")], None)
    assert walk(data[:-10]) == ([(name, b"1")], ErrorCode.CORRUPT_ARCHIVE)


def test_a_name_that_was_changed_after_its_unicode_path_was_written_counts():
    path = struct.pack("<BI", 1, zlib.crc32(b"old.png")) + b"other.png"
    data = _named(b"new.png", struct.pack("<2H", 0x7075, len(path)) + path)
    assert walk(data) == ([("new.png", b"1")], None)


def test_members_of_a_zip_come_in_stored_order():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in "cab":
            archive.writestr(name, name)
        archive.filelist.sort(key=lambda info: info.filename)
    assert [name for name, _ in walk(buffer.getvalue())[0]] == ["c", "a", "b"]


@pytest.mark.parametrize("kind", ZIPS)
def test_a_broken_member_of_a_zip_costs_no_other(kind):
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


@pytest.mark.parametrize("marker", [b"", b"PK00"])
@pytest.mark.parametrize("make", [make_zip, make_streamed_zip])
def test_concatenated_zips_are_noticed_and_both_are_read(make, marker):
    data = marker + make(FILMS[:2]) + make(FILMS[2:])
    assert walk(data) == (FILMS, ErrorCode.CORRUPT_ARCHIVE)


def test_the_directory_of_a_nested_zip_is_not_taken_for_that_of_a_cut_one():
    inner = make_zip(FILMS[1:3])
    data = make_zip([FILMS[0], ("in.zip", inner), FILMS[3], FILMS[4]])
    nested = [(f"in.zip/{name}", film) for name, film in FILMS[1:3]]
    rows, ended = walk(data[: data.index(FILMS[4][1]) + 100])
    assert (rows, ended) == ([FILMS[0], *nested, FILMS[3]], ErrorCode.CORRUPT_ARCHIVE)
    # A cut member that holds a whole zip is not read in part.
    outer = make_zip([FILMS[0], ("in.tar", make_tar([("in.zip", inner), FILMS[3]]))])
    rows, ended = walk(outer[: outer.index(FILMS[3][1])])
    assert (rows, ended) == (FILMS[:1], ErrorCode.CORRUPT_ARCHIVE)


def test_data_after_a_zip_are_noticed():
    data = make_zip(FILMS[:2])
    assert walk(data + bytes(600)) == (FILMS[:2], None)
    assert walk(data + make_zip(FILMS[2:])[:3000]) == (FILMS[:2], ErrorCode.CORRUPT_ARCHIVE)


def test_the_flag_of_utf8_may_be_set_in_only_one_header():
    data = bytearray(make_zip(FILMS))
    data[data.index(FILMS[1][0].encode()) - 30 + 7] &= ~0x08
    assert walk(bytes(data)) == (FILMS, None)


def test_a_directory_that_leaves_out_a_member_is_noticed():
    data = bytearray(make_zip(FILMS))
    entry = data.index(b"PK\x01\x02")
    size = data.index(b"PK\x01\x02", entry + 4) - entry
    data[entry + 32 : entry + 34] = struct.pack("<H", size)  # the comment's length
    rows, ended = walk(bytes(data))
    assert (rows, ended) == ([FILMS[0], *FILMS[2:]], ErrorCode.CORRUPT_ARCHIVE)


def test_members_are_recovered_where_the_directory_seems_to_lie_before_the_zip():
    data = bytearray(make_zip(FILMS))
    data[-4] ^= 2  # of the directory's offset, from which zipfile computes those of the members
    assert walk(bytes(data)) == (FILMS, ErrorCode.CORRUPT_ARCHIVE)


def test_a_member_whose_two_names_differ_is_an_error():
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
    rows, ended = walk(buffer.getvalue(), wanted=Wanted(frozenset({"65599"})))
    assert (len(rows), rows[-1], ended) == (65_600, ("65599", ErrorCode.EMPTY), None)


def test_a_self_extracting_zip_is_read():
    assert walk(b"MZ" + bytes(600) + make_zip(FILMS), "x.zip") == (FILMS, None)
    assert is_container(b"MZ" + bytes(510), "x.ZIP")
    assert not is_container(b"MZ" + bytes(510), "x.exe")


def test_a_zip_with_a_spanned_marker_is_read():
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


def _local(
    data: bytes, sizes: tuple[int, int], method: int = 0, flags: int = 0, extra=b""
) -> bytes:
    """A member with the name a, of which a descriptor may have to follow."""
    crc = zlib.crc32(data) if any(sizes) else 0
    lengths = (*sizes, 1, len(extra))
    return (
        struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, flags, method, 0, 0, crc, *lengths)
        + b"a"
        + extra
        + data
    )


@pytest.mark.parametrize("sizes", ["<2I", "<2Q"])
@pytest.mark.parametrize("signature", [b"PK\x07\x08", b""])
def test_what_follows_an_empty_streamed_member_is_recovered(sizes, signature):
    member = _local(b"\x03\x00", (0, 0), zipfile.ZIP_DEFLATED, 8)
    descriptor = signature + bytes(4) + struct.pack(sizes, 2, 0)
    rows = [("a", ErrorCode.EMPTY), ("b", b"1")]
    data = member + descriptor + make_zip([("b", b"1")])[:-10]
    assert walk(data) == (rows, ErrorCode.CORRUPT_ARCHIVE)


def test_a_member_is_recovered_by_whatever_tells_its_size():
    film = FILMS[0][1]
    size, crc = len(film), zlib.crc32(film)
    time = b"UT\x05\x00" + bytes(5)
    zip64 = struct.pack("<2H2Q", 1, 16, size, size)
    unknown = (0xFFFFFFFF, 0xFFFFFFFF)
    for member in (
        _local(film, (size, size), flags=8) + struct.pack("<4s3I", b"PK\x07\x08", crc, size, size),
        _local(film, unknown, extra=time + zip64),
    ):
        rows, ended = walk(member + make_zip([("b", b"1")])[:-10])
        assert (rows[-1], ended) == (("b", b"1"), ErrorCode.CORRUPT_ARCHIVE)
        assert rows[0][0] == "a"


def test_a_recovered_member_is_compared_with_the_checksum_of_its_descriptor():
    data = bytearray(make_streamed_zip(FILMS)[:-10])
    data[data.index(FILMS[2][1][100:200]) + 50] ^= 1  # noise is stored as it is, even by deflate
    assert walk(bytes(data)) == (FILMS[:2], ErrorCode.CORRUPT_ARCHIVE)


def test_members_before_those_of_the_directory_are_read_and_then_those_of_the_directory():
    data = bytearray(make_zip(FILMS[:3]))
    last = data.rindex(b"PK\x03\x04")
    data[last + 6] |= 8
    data[last + 14 : last + 26] = bytes(12)  # sizes that only the directory has
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    second = data.index(b"PK\x01\x02", start + 4)
    entries = data[second:end]
    record = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, len(entries), start, 0)
    rows, ended = walk(bytes(data[:start] + entries + record))
    assert (rows, ended) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)


def test_an_end_record_may_leave_the_number_of_members_to_zip64():
    data = make_zip(FILMS)
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 5, 5, end - start, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
    last = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    assert walk(data[:end] + record + locator + last) == (FILMS, None)


def test_members_that_share_bytes_are_not_unpacked():
    """David Fifield's bomb: many members that share the same bytes."""
    data = make_zip([("kernel", noise(0))])
    start = data.index(b"PK\x01\x02")
    central = data[start : data.index(b"PK\x05\x06")]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 100, 100, len(central) * 100, start, 0)
    rows, ended = walk(data[:start] + central * 100 + end)
    assert [content for _, content in rows] == [ErrorCode.CORRUPT_ARCHIVE] * 99 + [noise(0)]
    assert ended is None
