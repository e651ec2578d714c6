"""Reads the files of a tar (V7, ustar, GNU, pax) in one forward pass."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, cast

from lungopacity.archive.unpacking import Entry, Forward, Meter, corrupt
from lungopacity.errors import ErrorCode, ImageError, Stage

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# tarfile reads a whole extended header into memory, and copies a global one to every member.
_MAX_EXTENDED_BYTES = 16 * 1024
# The extended header of a single file may hold access lists and other attributes. Python before
# 3.11.10 and 3.12.6 searched it with a pattern of quadratic cost (CVE-2024-6232): 5 s for 64 KiB.
_IS_QUICK = sys.version_info >= (3, 12, 6) or (3, 11, 10) <= sys.version_info < (3, 12)
_MAX_PAX_BYTES = 1024 * 1024 if _IS_QUICK else _MAX_EXTENDED_BYTES
_MAX_NAME = 16 * 1024
# An interrupted copy into reserved space ends in zeros, which look like an end mark. Writers fill a
# tar with zeros up to a whole record: 10 KiB by default, up to 1 MiB for tapes.
_MAX_PADDING = 1024 * 1024
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# Not files: directories, devices, and GNU's directory listings (D) and volume labels (V).
_NO_FILES = (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"D", b"V")


class _Header(tarfile.TarInfo):
    """Raises at every broken header except the end mark, where `tarfile` would end silently."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the end mark
        except tarfile.HeaderError as error:
            raise tarfile.ReadError from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        return _within_limits(super().frombuf(buf, encoding, errors))

    @classmethod
    def _frombuf(
        cls, buf: bytes | bytearray, encoding: str, errors: str, **options: bool
    ) -> _Header:
        # The releases of Python of 2026 read every header with this, past the method above.
        header: _Header = super()._frombuf(  # type: ignore[misc]
            buf, encoding, errors, **options
        )
        return _within_limits(header)


def _within_limits(header: _Header) -> _Header:
    if header.size < 0:
        raise tarfile.ReadError
    of_one = header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
    most = _MAX_PAX_BYTES if of_one else _MAX_EXTENDED_BYTES
    if header.type in _EXTENDED and header.size > most:
        raise corrupt(
            f"has an extended header of {header.size} bytes, and at most {most} are read; "
            "write it without extended attributes and access lists"
        )
    return header


def tar_entries(file: IO[bytes], meter: Meter, *, forward: bool) -> Iterator[Entry]:
    """Every file and every link, in the tar's order.

    `forward`: `file` cannot seek back, so hard links cannot be followed. If the tar cannot be read
    to its end, raises `ImageError` (`corrupt_archive`) or what `tarfile` raises.
    """
    # A name that is not UTF-8 must stop neither the shard nor the Arrow column that it goes into.
    with tarfile.open(
        fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace", tarinfo=_Header
    ) as tar:
        places: dict[str, tuple[int, int]] = {}
        end = 0
        while (member := tar.next()) is not None:
            # tarfile would keep every member in memory.
            tar.members.clear()  # type: ignore[attr-defined]
            # A pax header may set a size that leads backwards, and so into an endless loop.
            if member.size < 0 or tar.offset < max(end, member.offset_data):
                raise corrupt("has a header with an impossible size")
            if len(member.name) > _MAX_NAME:
                raise corrupt(f"has a name of {len(member.name)} characters")
            end = tar.offset
            place = (member.offset_data, member.size)
            if member.type in _LINKS:
                link = _link(file, member, places, forward)
                if isinstance(link.content, ImageError):
                    places.pop(member.name, None)
                else:
                    places[member.name] = places[member.linkname]
                yield link
            elif member.issparse():
                # The header says where the stored part ends, whatever the map of its holes says.
                content = partial(_sparse, tar, member, meter)
                yield Entry(member.name, member.size, content, alone=True)
            elif member.type not in _NO_FILES:
                if not forward:
                    places[member.name] = place
                yield Entry(member.name, member.size, partial(_stored, file, *place), alone=False)
    padding = 0
    while rest := file.read(1024 * 1024):
        if rest.count(0) < len(rest):
            raise corrupt("has data after its end mark")
        padding += len(rest)
    if padding > _MAX_PADDING:
        raise corrupt(f"ends in {padding} zeros, as an interrupted copy does")


def _stored(file: IO[bytes], start: int, size: int) -> io.BufferedIOBase:
    # tarfile's own reader loses the last kilobytes before a cut.
    return io.BufferedReader(Forward(_chunks(file, start, size)))


def _chunks(file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
    read: Callable[[int], bytes] = getattr(file, "read1", file.read)
    file.seek(start)
    while size and (chunk := read(min(size, 1024 * 1024))):
        size -= len(chunk)
        yield chunk


def _sparse(tar: tarfile.TarFile, member: tarfile.TarInfo, meter: Meter) -> io.BufferedIOBase:
    meter.add(tar.offset - member.offset_data, member.size)
    return cast(io.BufferedIOBase, tar.extractfile(member))


def _link(
    file: IO[bytes], member: tarfile.TarInfo, places: dict[str, tuple[int, int]], forward: bool
) -> Entry:
    place = places.get(member.linkname)
    if member.type == tarfile.SYMTYPE or place is None:
        if member.type == tarfile.SYMTYPE:
            why = "a symbolic link, which is not followed; put the film itself in its place"
        elif forward:
            why = (
                "a hard link, which is not followed in a compressed tar; put the film itself in "
                "its place"
            )
        else:
            why = (
                "a hard link to something else than an earlier plain file of the tar; put the film "
                "itself in its place"
            )
        refusal = ImageError(ErrorCode.UNSUPPORTED, Stage.UNPACK, why)
        return Entry(member.name, None, refusal, alone=True)
    return Entry(member.name, place[1], partial(_stored, file, *place), alone=True)
