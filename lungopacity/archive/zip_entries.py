"""Reads the files of a zip by its central directory or, if that is lost, by their own headers."""

from __future__ import annotations

import contextlib
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from functools import partial
from typing import IO

from lungopacity.archive.unpacking import Entry, Forward, Meter, corrupt, inflated, machine_error
from lungopacity.errors import ErrorCode, ImageError, Stage

# Local file header, APPNOTE 4.3.7: signature, version, flags, method, time, date, CRC-32,
# compressed size, size, lengths of name and extra field.
_LOCAL = struct.Struct("<4s5H3I2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_SPANNED = (b"PK\x07\x08", b"PK00")
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"
_ENCRYPTED = 0x1 | 0x40
_PATCHED = 0x20
_STREAMED = 0x8
_UTF8 = 0x800
_OF_WINDOWS = (0, 10)
"""Systems of FAT and of NTFS (APPNOTE 4.4.2.2)."""
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075
"""Tags of extra fields (APPNOTE 4.5.3 and 4.6.9)."""
_IN_ZIP64 = 0xFFFFFFFF
_IN_ZIP64_COUNT = 0xFFFF
_MAX_END = 22 + 0xFFFF
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_UNBOUNDED = (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def zip_entries(file: IO[bytes], meter: Meter) -> Iterator[Entry]:
    """Every file, in the order in which they are stored.

    Raises `ImageError` (`corrupt_archive`) after the members that were found, if the central
    directory cannot be read, states another number of members than it lists, does not list the
    member at the beginning of the zip, or is followed by other data.
    """
    try:
        directory = zipfile.ZipFile(file)
        infos = sorted(directory.infolist(), key=lambda info: info.header_offset)
        starts = [info.header_offset for info in infos] + [directory.start_dir]
        if starts[0] < 0:
            raise zipfile.BadZipFile
    except Exception as error:
        # A MemoryError may also come from a directory that states too large a size.
        if not isinstance(error, MemoryError) and (failed := machine_error(error)) is not None:
            raise failed from error
        # Whatever zipfile failed on, the members may still be there.
        yield from _recovered(file, meter)
        raise corrupt("has no readable central directory") from None
    file.seek(0)
    unlisted = starts[0] > 4 and file.read(4) in (_LOCAL_SIGNATURE, *_SPANNED)
    reached = 0
    if unlisted:
        reached = yield from _recovered(file, meter, starts[0])
    # If they reach further, the directory is that of a nested zip, and this one is cut.
    if reached <= starts[0]:
        for info, following in zip(infos, starts[1:], strict=True):
            yield from _entry(file, info, following, meter)
    if unlisted:
        raise corrupt("begins with members that its directory does not list")
    _check_end(file, len(infos))


def _check_end(file: IO[bytes], listed: int) -> None:
    """Raises `ImageError` if the end record (APPNOTE 4.3.16) states another number of members, or
    anything but zeros follows it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _MAX_END))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    (stated,) = struct.unpack_from("<H", tail, end + 10)
    # Some writers wrap the number at 65,536.
    if stated not in (listed % 0x10000, _IN_ZIP64_COUNT):
        # zipfile trusts the length of a damaged name or comment, and so skips members.
        raise corrupt("has a directory that lists another number of members than it states")
    (comment_size,) = struct.unpack_from("<H", tail, end + 20)
    if tail[end + 22 + comment_size :].strip(b"\0"):
        raise corrupt("has data after its end record")


def _entry(file: IO[bytes], info: zipfile.ZipInfo, following: int, meter: Meter) -> Iterator[Entry]:
    name = _name_of(info)
    if info.create_system in _OF_WINDOWS:
        # Older versions of .NET, among others, separate folders so, against APPNOTE 4.4.17.
        name = name.replace("\\", "/")
    if name.endswith("/") and not info.file_size:
        return
    content = _refusal(info) or partial(_open, file, info, following, meter)
    yield Entry(name, info.file_size, content, alone=True)


def _refusal(info: zipfile.ZipInfo) -> ImageError | None:
    if info.flag_bits & _ENCRYPTED:
        return ImageError(ErrorCode.ENCRYPTED, Stage.UNPACK, "the member needs a password")
    if info.flag_bits & _PATCHED or info.compress_type not in _METHODS:
        return ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            f"zip compression method {info.compress_type} is not read",
        )
    if stat.S_ISLNK(info.external_attr >> 16):
        return ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            "a symbolic link, which is not followed; put the film itself in its place",
        )
    return None


def _open(
    file: IO[bytes], info: zipfile.ZipInfo, following: int, meter: Meter
) -> io.BufferedIOBase:
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    signature, *_, name_size, extra_size = _LOCAL.unpack(header)
    start = info.header_offset + _LOCAL.size + name_size + extra_size
    if signature != _LOCAL_SIGNATURE:
        raise _broken("its header is not where the directory says")
    # No checksum covers the name, but it is stored twice. A wrong name would give the film's score
    # to another patient. Some writers set the flag of UTF-8 in only one of the headers.
    if _decoded(file.read(name_size), info.flag_bits) != info.orig_filename:
        raise _broken("its two headers differ")
    # Overlapping members can unpack the same bytes a thousand times (D. Fifield, WOOT 2019).
    if start + info.compress_size > following:
        raise _broken("it overlaps the next one")
    meter.add(info.compress_size, info.file_size)
    file.seek(start)
    reader = zipfile.ZipExtFile(file, "r", info)
    if info.compress_type not in _UNBOUNDED:
        return reader
    # zipfile unpacks all it has read of these methods at once; 4 KiB of bzip2 can give 82 MB.
    return io.BufferedReader(Forward(iter(partial(reader.read, 4096), b"")))


def _broken(why: str) -> ImageError:
    return ImageError(ErrorCode.CORRUPT_ARCHIVE, Stage.UNPACK, f"the member is broken: {why}")


def _recovered(
    file: IO[bytes], meter: Meter, until: int | None = None
) -> Generator[Entry, None, int]:
    """Members by their local headers, up to the first that begins at `until`, is cut, or whose end
    is unknown. Returns how far they reach."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    position = 4 if file.read(4) in _SPANNED else 0
    while position != until and (info := _local_info(file, position)) is not None:
        data_starts = file.tell()
        if info.flag_bits & _STREAMED and not info.compress_size:
            # The sizes come after the data, and only deflate shows where the data end.
            if info.flag_bits & _ENCRYPTED or info.compress_type != zipfile.ZIP_DEFLATED:
                return data_starts
            _measure(file, info, meter)
            position = file.tell()
        else:
            position = data_starts + info.compress_size
            if info.flag_bits & _STREAMED:
                file.seek(position)
                _skip_descriptor(file, info)
                position = file.tell()
        if position > size:
            break
        yield from _entry(file, info, size, meter)
    return position


def _local_info(file: IO[bytes], position: int) -> zipfile.ZipInfo | None:
    file.seek(position)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(_LOCAL_SIGNATURE):
        return None
    _, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack(header)
    raw_name, extra = file.read(name_size), file.read(extra_size)
    if len(raw_name) + len(extra) < name_size + extra_size:
        return None
    info = zipfile.ZipInfo(_decoded(raw_name, flags))
    info.header_offset, info.flag_bits, info.compress_type, info.CRC = position, flags, method, crc
    info.file_size, info.compress_size = _zip64_sizes(extra, size, packed)
    info.extra = extra
    return info


def _name_of(info: zipfile.ZipInfo) -> str:
    # Not `info.filename`, which depends on the version of Python.
    name = info.orig_filename
    if not info.flag_bits & _UTF8:
        raw = name.encode("cp437")
        # Linux and macOS write UTF-8 without its flag. No word in cp437 looks like it.
        with contextlib.suppress(UnicodeDecodeError):
            name = raw.decode("utf-8")
        for tag, value in _fields(info.extra):
            if tag == _UNICODE_PATH and value[1:5] == struct.pack("<I", zlib.crc32(raw)):
                name = value[5:].decode("utf-8", "backslashreplace")
    return name.partition("\0")[0]


def _decoded(name: bytes, flags: int) -> str:
    return name.decode("utf-8" if flags & _UTF8 else "cp437", "backslashreplace")


def _zip64_sizes(extra: bytes, size: int, packed: int) -> tuple[int, int]:
    """Size and compressed size, from the Zip64 field (APPNOTE 4.5.3) if the header refers to it."""
    for tag, field in _fields(extra):
        if tag == _ZIP64:
            values = [value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            if size == _IN_ZIP64 and values:
                size = values.pop(0)
            if packed == _IN_ZIP64 and values:
                packed = values.pop(0)
    return size, packed


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each extra field (APPNOTE 4.5)."""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<2H", extra)
        yield tag, extra[4 : 4 + length]
        extra = extra[4 + length :]


def _measure(file: IO[bytes], info: zipfile.ZipInfo, meter: Meter) -> None:
    start, info.CRC, info.file_size = file.tell(), 0, 0
    for chunk in inflated(file, Meter(meter.allowance)):
        info.CRC = zlib.crc32(chunk, info.CRC)
        info.file_size += len(chunk)
    info.compress_size = file.tell() - start
    _skip_descriptor(file, info)


def _skip_descriptor(file: IO[bytes], info: zipfile.ZipInfo) -> None:
    """Move past the data descriptor (APPNOTE 4.3.9), which may lack its signature, and may have
    sizes of 4 or 8 bytes."""
    start = file.tell()
    data = file.read(24)
    for signature in (_DESCRIPTOR_SIGNATURE, b""):
        # In this order: of an empty member, 16 bytes of either form are the same.
        for sizes in ("<I2Q", "<I2I"):
            try:
                descriptor = signature + struct.pack(
                    sizes, info.CRC, info.compress_size, info.file_size
                )
            except struct.error:
                continue
            if data.startswith(descriptor):
                file.seek(start + len(descriptor))
                return
    raise corrupt("has a member whose data descriptor does not match it")
