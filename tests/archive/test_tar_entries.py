"""Tars: links, sparse files, and false headers."""

import gzip
import io
import tarfile

import pytest

from lungopacity.archive import tar_entries
from lungopacity.archive.containers import members
from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits
from tests.archive.making import FILMS, LIMITS, make_tar, walk, zstd


def test_a_tar_cut_between_two_members_is_noticed():
    data = make_tar([("a", b"1"), ("b", b"2")])
    assert walk(data[:1024]) == ([("a", b"1")], ErrorCode.CORRUPT_ARCHIVE)


def test_a_broken_header_in_the_middle_is_noticed():
    data = bytearray(make_tar(FILMS))
    data[data.index(FILMS[3][0].encode()) + 150] ^= 0x55  # in the header's checksum
    assert walk(bytes(data)) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)
    assert walk(gzip.compress(bytes(data))) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)


@pytest.mark.skipif(hasattr(tarfile.TarInfo, "_frombuf"), reason="this Python is such a one")
def test_headers_are_checked_by_a_python_that_reads_them_with_another_method(monkeypatch):
    """The security releases of 2026 do, and ended such tars silently."""
    frombuf = tarfile.TarInfo.frombuf.__func__

    def fromtarfile(cls, tar):
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        header = cls._frombuf(block, tar.encoding, tar.errors, dircheck=True)
        header.offset = tar.fileobj.tell() - tarfile.BLOCKSIZE
        return header._proc_member(tar)

    monkeypatch.setattr(
        tarfile.TarInfo,
        "_frombuf",
        classmethod(lambda cls, *block, dircheck: frombuf(cls, *block)),
        raising=False,
    )
    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(fromtarfile))
    test_a_tar_cut_between_two_members_is_noticed()
    test_a_broken_header_in_the_middle_is_noticed()
    test_a_header_size_that_lies_ends_the_walk(-512)


def test_concatenated_tars_are_noticed():
    data = make_tar(FILMS[:2]) + make_tar(FILMS[2:])
    assert walk(data) == (FILMS[:2], ErrorCode.CORRUPT_ARCHIVE)
    assert walk(zstd(data)) == (FILMS[:2], ErrorCode.CORRUPT_ARCHIVE)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_zeros_where_an_interrupted_copy_ended_are_not_taken_for_the_end(compress):
    data = make_tar(FILMS)
    cut = data[: data.index(FILMS[3][0].encode())]
    record = 1 << 20
    filled = cut + bytes(record - len(cut) % record)  # as `tar -b 2048` does
    assert walk(compress(filled)) == (FILMS[:3], None)
    assert walk(compress(cut + bytes(2 * record))) == (FILMS[:3], ErrorCode.CORRUPT_ARCHIVE)


def test_a_tar_name_that_is_not_utf8_is_escaped():
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


def test_a_link_is_a_second_name_if_it_can_be_followed_and_an_error_row_if_not():
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


def test_a_hard_link_is_followed_to_a_hard_link():
    data = _tar_of(
        (_info("a"), b"film"),
        (_info("b", tarfile.LNKTYPE, "a"), b""),
        (_info("c", tarfile.LNKTYPE, "b"), b""),
        (_info("a"), b"newer"),
        (_info("d", tarfile.LNKTYPE, "c"), b""),
        (_info("e", tarfile.LNKTYPE, "a"), b""),
        (_info("a", tarfile.SYMTYPE, "elsewhere"), b""),
        (_info("f", tarfile.LNKTYPE, "a"), b""),
    )
    refused = ErrorCode.UNSUPPORTED
    assert walk(data)[0] == [
        ("a", b"film"),
        ("b", b"film"),
        ("c", b"film"),
        ("a", b"newer"),
        ("d", b"film"),
        ("e", b"newer"),
        ("a", refused),
        ("f", refused),
    ]


@pytest.mark.parametrize(
    ("link", "compress", "why"),
    [
        (_info("b", tarfile.SYMTYPE, "a"), bytes, "a symbolic link, which is not followed"),
        (_info("b", tarfile.SYMTYPE, "a"), gzip.compress, "a symbolic link, which is not followed"),
        (
            _info("b", tarfile.LNKTYPE, "z"),
            bytes,
            "a hard link to something else than an earlier plain file",
        ),
        (
            _info("b", tarfile.LNKTYPE, "b"),
            bytes,
            "a hard link to something else than an earlier plain file",
        ),
        (_info("b", tarfile.LNKTYPE, "a"), gzip.compress, "a hard link, which is not followed in"),
    ],
)
def test_a_link_that_is_not_followed_says_why(link, compress, why):
    data = _tar_of((_info("a"), b"film"), (link, b""))
    (_, found) = members(io.BytesIO(compress(data)), "x.tar", LIMITS)
    assert found[2].message.startswith(why)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_file_attributes_in_a_pax_header_do_not_end_the_walk(compress, monkeypatch):
    infos = [_info(name) for name in "abc"]
    infos[1].pax_headers = {"SCHILY.xattr.user.note": "x" * 20_000}
    data = compress(_tar_of(*((info, b"1") for info in infos), format=tarfile.PAX_FORMAT))
    # The limit depends on the version of Python.
    monkeypatch.setattr(tar_entries, "_MAX_PAX_BYTES", 1 << 20)
    assert walk(data) == ([("a", b"1"), ("b", b"1"), ("c", b"1")], None)
    infos[1].pax_headers = {"path": "/".join("x" * 20_000)}
    endless = compress(_tar_of(*((info, b"1") for info in infos), format=tarfile.PAX_FORMAT))
    assert walk(endless) == ([("a", b"1")], ErrorCode.CORRUPT_ARCHIVE)
    monkeypatch.setattr(tar_entries, "_MAX_PAX_BYTES", 1 << 14)
    with pytest.raises(ImageError, match=r"extended header of 200\d\d bytes, and at most 16384"):
        list(members(io.BytesIO(data), "x.tar", LIMITS))


def test_only_members_that_can_hold_a_film_have_rows():
    kinds = (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"D", b"V")
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


@pytest.mark.parametrize(
    "value", ["-5", "-512", "-100000", "9" * 30, "9" * 4000, "x", "", "1e3", "1024"]
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_pax_size_that_lies_ends_the_walk(value, compress):
    info = _info("b")
    info.pax_headers = {"size": value}
    data = _tar_of((_info("a"), b"1"), (info, b"2"), (_info("c"), b"3"), format=tarfile.PAX_FORMAT)
    rows, ended = walk(compress(data))
    assert rows[0] == ("a", b"1")
    assert ended is ErrorCode.CORRUPT_ARCHIVE
    if value.startswith("-"):
        assert len(rows) == 1


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
