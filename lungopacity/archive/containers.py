"""Reads every file of a shard: tar, compressed tar, zip, Parquet, and one of them inside another.

A shard is whatever hospitals hand over: cut, damaged, nested, hostile. No file is lost silently:
each gives a row, or is covered by the one error at the end.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator
from itertools import chain
from tempfile import SpooledTemporaryFile
from typing import IO

from lungopacity.archive.names import Wanted
from lungopacity.archive.parquet_entries import parquet_entries
from lungopacity.archive.tar_entries import tar_entries
from lungopacity.archive.unpacking import (
    HEAD_SIZE,
    TAR_SUFFIXES,
    Allowance,
    Entry,
    Forward,
    Kind,
    Meter,
    as_image_error,
    corrupt,
    kind_of,
    unpacked,
)
from lungopacity.archive.zip_entries import zip_entries
from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph import DecodeLimits

SHARD_SUFFIXES = (*TAR_SUFFIXES, ".zip", ".parquet")
"""Objects with these endings are planned as containers before their content is seen."""

_COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_PROGRAMS = (b"MZ", b"\x7fELF", b"#!")
_MAX_DEPTH = 1
_SPOOL_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024

Member = tuple[int, str, bytes | ImageError | None]


def is_container(head: bytes, name: str = "") -> bool:
    """Whether a file with these first 512 bytes (or all, if it is smaller) is a container: tar, zip
    (but no office document), Parquet, gzip, zstd, bzip2 or xz.

    The content decides. Only an empty tar and a self-extracting zip are recognised by name.
    """
    return _kind(head, name) is not None


def alone_in(name: str) -> str:
    """The name of the single file in a compressed file with this name."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in _COMPRESSED_SUFFIXES else name


def without_files() -> ImageError:
    """The error of a container that was read to its end and held no file."""
    return ImageError(ErrorCode.EMPTY, Stage.UNPACK, "a container without files")


def members(
    file: IO[bytes], name: str, limits: DecodeLimits, wanted: Wanted | None = None
) -> Iterator[Member]:
    """Running index, name and bytes of each file in the container, in the container's order.

    file: seekable, the whole object. name: its key; only decides what the content leaves open. A
    member that cannot be read has its `ImageError` instead of bytes, and one that is not wanted has
    None and is not read. A container inside the container is entered, and its members are named
    `<its name>/<their name>`; a container inside that one is `unsupported`. Inside a container, a
    compressed single file keeps its name, such as `a.png.gz`.

    Names are data: nothing is ever written under them. Raises `ImageError`, after all readable
    members: `corrupt_archive` if the container cannot be read to its end, `decompression_bomb`; for
    Parquet without images `not_an_image`, and without a clear image column `unsupported`.
    """
    yield from _Walk(limits, wanted).walk(file, name)


class _Walk:
    """The walk through one object, and what the containers in it share."""

    def __init__(self, limits: DecodeLimits, wanted: Wanted | None) -> None:
        self._limits = limits
        self._wanted = wanted
        self._allowance = Allowance()
        self._given = 0

    def walk(
        self, file: IO[bytes], name: str, prefix: str = "", depth: int = 0
    ) -> Iterator[Member]:
        """The members of one container. Raises only `ImageError`."""
        meter = Meter(self._allowance)
        try:
            for entry in _entries(file, name, meter):
                # The single file in a compressed file has no name of its own.
                own = prefix.removesuffix("/") or alone_in(name)
                member = own if entry.name is None else prefix + entry.name
                yield from self._entry(entry, member, depth)
        except ImageError:
            raise
        except Exception as error:
            raise as_image_error(error) from error
        finally:
            meter.settle()

    def _entry(self, entry: Entry, name: str, depth: int) -> Iterator[Member]:
        wanted = self._wanted is None or self._wanted.has(name)
        entered = self._wanted is None or (depth < _MAX_DEPTH and self._wanted.may_lie_in(name))
        if not (wanted or entered):
            yield self._member(name, None)
        elif isinstance(entry.content, ImageError):
            yield self._member(name, entry.content if wanted else None)
        else:
            try:
                with entry.content() as reader:
                    head = _take(reader, HEAD_SIZE)
                    if not is_container(head):
                        data = self._content(reader, head, entry.size) if wanted else None
                        yield self._member(name, data)
                    elif depth == _MAX_DEPTH:
                        yield self._member(name, _too_deep())
                    else:
                        yield from self._nested(reader, head, name, entry.alone)
            except Exception as error:
                if not entry.alone:
                    raise
                yield self._member(name, as_image_error(error))

    def _member(self, name: str, data: bytes | ImageError | None) -> Member:
        self._given += 1
        return self._given - 1, name, data

    def _content(
        self, reader: io.BufferedIOBase, head: bytes, size: int | None
    ) -> bytes | ImageError:
        try:
            if size is not None:
                self._limits.check_size(size)
        except ImageError as error:
            return error
        most = self._limits.max_size_bytes + 1 if size is None else size
        data = _take(reader, most, head)
        if size is None:
            try:
                self._limits.check_size(len(data))
            except ImageError as error:
                return error
        elif len(data) < size:
            raise corrupt("ends inside a member")
        return data

    def _nested(
        self, reader: io.BufferedIOBase, head: bytes, name: str, alone: bool
    ) -> Iterator[Member]:
        # On disk if large: the size limit of an image does not apply to a nested container.
        with SpooledTemporaryFile(max_size=_SPOOL_BYTES) as spool:
            spool.write(head)
            failure = _copy(reader, spool)
            # A failed checksum does not say where the damage is. A stream that ends early is right
            # up to its end.
            if failure is not None and alone:
                raise failure
            before = self._given
            try:
                yield from self.walk(spool, posixpath.basename(name), f"{name}/", _MAX_DEPTH)
            except ImageError as error:
                yield self._member(name, error)
            if failure is not None:
                raise failure
            if self._given == before:
                yield self._member(name, without_files())


def _entries(file: IO[bytes], name: str, meter: Meter) -> Iterator[Entry]:
    file.seek(0)
    head = file.read(HEAD_SIZE)
    file.seek(0)
    match _kind(head, name):
        case None:
            raise corrupt("does not begin with the signature of a container")
        case Kind.TAR:
            return tar_entries(file, meter, forward=False)
        case Kind.ZIP:
            return zip_entries(file, meter)
        case Kind.PARQUET:
            return parquet_entries(file, meter)
        case kind:
            return _compressed_entries(unpacked(file, kind, meter), name, meter)


def _kind(head: bytes, name: str) -> Kind | None:
    kind, name = kind_of(head), name.lower()
    if kind is None and name.endswith(".tar") and len(head) == HEAD_SIZE and not any(head):
        return Kind.TAR
    if kind is None and name.endswith(".zip") and head.startswith(_PROGRAMS):
        return Kind.ZIP
    return kind


def _compressed_entries(chunks: Iterator[bytes], name: str, meter: Meter) -> Iterator[Entry]:
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_SIZE:
            break
    stream = io.BufferedReader(Forward(chain([head], chunks)))
    # Also by name: a tar with a broken first header is a broken tar, and not an image.
    if kind_of(head[:HEAD_SIZE]) is Kind.TAR or name.lower().endswith(TAR_SUFFIXES):
        yield from tar_entries(stream, meter, forward=True)
    else:
        yield Entry(None, None, lambda: stream, alone=False)


def _take(reader: io.BufferedIOBase, size: int, head: bytes = b"") -> bytes:
    """`head` and what follows it in `reader`, together `size` bytes or as many as there are.

    Allocates only for bytes that were read, and returns them without a copy.
    """
    taken = io.BytesIO()
    taken.write(head)
    while (left := size - taken.tell()) > 0 and (chunk := reader.read(min(left, _CHUNK_BYTES))):
        taken.write(chunk)
    return taken.getvalue()


def _copy(reader: io.BufferedIOBase, target: IO[bytes]) -> Exception | None:
    """Copy all of `reader` into `target`. Returns the exception that ended the reading, if any."""
    while True:
        try:
            # Not `read`, which loses what it has read if the next bytes are missing.
            chunk = reader.read1(_CHUNK_BYTES)
        except Exception as error:
            return error
        if not chunk:
            return None
        target.write(chunk)


def _too_deep() -> ImageError:
    return ImageError(
        ErrorCode.UNSUPPORTED, Stage.UNPACK, "a container in a nested container is not read"
    )
