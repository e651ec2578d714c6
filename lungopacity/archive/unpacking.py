"""Shared by the container readers: signatures, entries, and decompression with a limit.

Nothing here trusts a length that a file states about itself.
"""

from __future__ import annotations

import bz2
import errno
import io
import lzma
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any, Protocol

import pyarrow as pa

from lungopacity.errors import NO_ROOM, ErrorCode, ImageError, Stage

HEAD_SIZE = 512
"""The signature is looked for in so many bytes: one tar header."""

TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz", ".tz2", ".tar.xz",
    ".txz",
)  # fmt: skip

_FREE_BYTES = 256 * 1024 * 1024
_MAX_RATIO = 200
# Small, because a call that meets damage also loses the bytes that it had unpacked before.
_STEP = 16 * 1024
_ZSTD_STEP = 4 * 1024
# `xz -9` needs 65 MiB, but a header may ask for 4 GiB.
_XZ_MEMORY_BYTES = 256 * 1024 * 1024


class Kind(StrEnum):
    """The kind of a container, by its first bytes."""

    TAR = "tar"
    ZIP = "zip"
    PARQUET = "parquet"
    GZIP = "gzip"
    ZSTD = "zstd"
    BZIP2 = "bzip2"
    XZ = "xz"


_SIGNATURES = (
    # A spanned zip that fits in one file has a marker before its first header (APPNOTE 8.5.4).
    (Kind.ZIP, re.compile(rb"PK\x03\x04|PK\x05\x06|PK\x07\x08|PK00PK\x03\x04")),
    (Kind.PARQUET, re.compile(rb"PAR1")),
    (Kind.GZIP, re.compile(rb"\x1f\x8b\x08")),
    # A seekable or parallel zstd file may begin with a skippable frame (RFC 8878, 3.1.2).
    (Kind.ZSTD, re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    (Kind.BZIP2, re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)")),
    (Kind.XZ, re.compile(rb"\xfd7zXZ\x00")),
)
# Office files are zips, too, but never shards of films.
_OFFICE = re.compile(
    rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|docProps/|xl/|word/|ppt/|mimetype)", re.DOTALL
)
_CHECKSUM = re.compile(rb" *[0-7]+[ \0]*")


def kind_of(head: bytes) -> Kind | None:
    """The container that begins with these `HEAD_SIZE` bytes; None for every other file."""
    for kind, signature in _SIGNATURES:
        if signature.match(head):
            return None if _OFFICE.match(head) else kind
    return Kind.TAR if _is_tar(head) else None


def _is_tar(head: bytes) -> bool:
    if len(head) < HEAD_SIZE or not head[0]:
        return False
    if head[257:262] == b"ustar":
        return True
    # Tars from before POSIX have no magic. The checksum is right by chance in 1 of 10^11 files.
    if not _CHECKSUM.fullmatch(head[148:156]):
        return False
    rest = head[:148] + b" " * 8 + head[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in rest)
    return int(head[148:156].strip(b" \0"), 8) in (sum(rest), signed)


@dataclass(frozen=True)
class Entry:
    """One file of a container, not yet read."""

    name: str | None
    """None for the single file in a compressed file: it is named after that."""
    size: int | None
    """Bytes, as the container states; None if only reading tells."""
    content: Callable[[], io.BufferedIOBase] | ImageError
    """Opens the file; to be called before the next entry is taken. Or why it cannot be opened."""
    alone: bool
    """If reading the file fails, the rest of the container can still be read."""


def corrupt(what: str) -> ImageError:
    """The error of a shard that cannot be read, or not to its end."""
    return ImageError(ErrorCode.CORRUPT_ARCHIVE, Stage.UNPACK, f"the shard {what}")


def as_image_error(error: Exception) -> ImageError:
    """The `ImageError` for an exception of a library. It has the exception's type only, because
    messages may quote the content."""
    if isinstance(error, ImageError):
        return error
    return machine_error(error) or corrupt(f"cannot be read to its end ({type(error).__name__})")


_OF_THE_MACHINE = frozenset(
    {
        *NO_ROOM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENOTCONN,
        errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE,
        errno.ENOMEM,
    }
)  # fmt: skip
"""Errors of disks, file servers and limits. Not EINVAL, which an offset in a damaged file causes,
too."""


def machine_error(error: BaseException) -> ImageError | None:
    """The `ImageError` for a failure of the machine instead of the content: another task or night
    may succeed. None for any other exception."""
    cause: BaseException | None = error
    node = socket.gethostname()
    # The causes, too: zipfile reports a disk that fails as a file that is not a zip.
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return _unavailable(
                f"no disk space left on {node} to unpack it; free some, or set TMPDIR to a larger "
                "folder"
            )
        if isinstance(cause, OSError) and cause.errno in _OF_THE_MACHINE:
            return _unavailable(f"disk error on {node}: {os.strerror(cause.errno)}")
        # Arrow raises one for the memory that a damaged page claims to need.
        if isinstance(cause, MemoryError) and not isinstance(cause, pa.ArrowException):
            return _unavailable(f"not enough memory left on {node} to read it")
        cause = cause.__cause__ or cause.__context__
    return None


def _unavailable(why: str) -> ImageError:
    return ImageError(ErrorCode.UNAVAILABLE, Stage.UNPACK, why)


class Allowance:
    """How many bytes the containers in one object may together unpack beyond `_MAX_RATIO`."""

    def __init__(self) -> None:
        self.left_bytes = _FREE_BYTES


class Meter:
    """Compares the compressed bytes of one container with the bytes that they unpack to."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self._excess_bytes = 0

    def add(self, taken: int, given: int) -> None:
        """Count so many compressed and unpacked bytes. If they are too many, counts nothing and
        raises `ImageError` (`decompression_bomb`)."""
        excess = self._excess_bytes + given - _MAX_RATIO * taken
        if excess > self.allowance.left_bytes:
            raise ImageError(
                ErrorCode.DECOMPRESSION_BOMB,
                Stage.UNPACK,
                f"unpacks to more than {_MAX_RATIO} times its size and {_FREE_BYTES} bytes",
            )
        self._excess_bytes = excess

    def settle(self) -> None:
        """Charge a finished container to the allowance, so that a thousand small bombs may unpack
        no more than one."""
        self.allowance.left_bytes -= max(0, self._excess_bytes)
        self._excess_bytes = 0


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Inflater:
    """zlib with the interface of `bz2` and `lzma`."""

    def __init__(self, wbits: int) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        given = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        # If the output is full, zlib may hold more of it even if it has taken all input.
        self.needs_input = not self._zlib.unconsumed_tail and len(given) < max_length
        return given


def unpacked(file: IO[bytes], kind: Kind, meter: Meter) -> Iterator[bytes]:
    """The content of a compressed file from its position on, with all its streams and frames.

    If it is damaged or cut, raises what the libraries raise, after the bytes before the damage.
    Raises `ImageError` (`decompression_bomb`).
    """
    if kind is Kind.ZSTD:
        return _zstd(file, meter)
    make: dict[Kind, Callable[[], _Unpacker]] = {
        Kind.GZIP: lambda: _Inflater(31),
        Kind.BZIP2: bz2.BZ2Decompressor,
        Kind.XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES),
    }
    return _streams(file, make[kind], meter)


def inflated(file: IO[bytes], meter: Meter) -> Iterator[bytes]:
    """The content of one raw deflate stream (RFC 1951); leaves `file` right after the stream.
    Raises as `unpacked` does."""
    unpacker = _Inflater(-15)
    yield from _stream(unpacker, b"", file, meter)
    file.seek(-len(unpacker.unused_data), io.SEEK_CUR)


def _streams(file: IO[bytes], make: Callable[[], _Unpacker], meter: Meter) -> Iterator[bytes]:
    # Python's own readers of bzip2 and xz silently drop what they cannot read after one stream.
    waiting = file.read(_STEP)
    while waiting:
        unpacker = make()
        yield from _stream(unpacker, waiting, file, meter)
        waiting = unpacker.unused_data.lstrip(b"\0")
        while not waiting and (more := file.read(_STEP)):
            waiting = more.lstrip(b"\0")


def _stream(unpacker: _Unpacker, waiting: bytes, file: IO[bytes], meter: Meter) -> Iterator[bytes]:
    while not unpacker.eof:
        if unpacker.needs_input and not waiting:
            waiting = file.read(_STEP)
            if not waiting:
                raise EOFError
        given = unpacker.decompress(waiting, _STEP)
        meter.add(len(waiting), len(given))
        waiting = b""
        if given:
            yield given


def _zstd(file: IO[bytes], meter: Meter) -> Iterator[bytes]:
    # Tested with pyarrow 26: a cut frame, junk after a frame and a window above 128 MiB raise
    # OSError, and a frame of zeros takes no more memory than one step.
    taken = file.tell()
    stream = pa.CompressedInputStream(pa.PythonFile(Lent(file), mode="r"), "zstd")
    while given := stream.read(_ZSTD_STEP):
        meter.add(file.tell() - taken, len(given))
        taken = file.tell()
        yield given


class Lent(io.RawIOBase):
    """Wraps a file for Arrow, which would close the file itself."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class Forward(io.RawIOBase):
    """Chunks as a file that can only seek forward, by reading."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._position = 0
        self._failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._chunk and not self._next():
            return 0
        size = min(len(buffer), len(self._chunk))
        buffer[:size] = self._chunk[:size]
        self._chunk = self._chunk[size:]
        self._position += size
        return size

    def _next(self) -> bool:
        # After it has raised, a generator looks as if it had ended, so keep the failure.
        if self._failure is not None:
            raise self._failure
        try:
            self._chunk = memoryview(next(self._chunks, b""))
        except Exception as error:
            self._failure = error
            raise
        return bool(self._chunk)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        target = offset if whence == io.SEEK_SET else self._position + offset
        if whence == io.SEEK_END or target < self._position:
            raise io.UnsupportedOperation
        while self._position < target and self.read(min(target - self._position, _STEP)):
            pass
        return self._position
