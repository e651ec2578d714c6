"""Turns objects of an archive into rows with pixels: fetch, unpack, decode. Every image gets a row.

Runs inside Ray tasks, for training and for screening, but does not depend on Ray.
"""

from __future__ import annotations

import io
import logging
import posixpath
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa

from lungopacity.archive.containers import (
    SHARD_SUFFIXES,
    alone_in,
    is_container,
    members,
    without_files,
)
from lungopacity.archive.content import ReadSettings, error_columns
from lungopacity.archive.decoder import borrowed_decoder
from lungopacity.archive.names import Wanted
from lungopacity.archive.unpacking import HEAD_SIZE, machine_error
from lungopacity.errors import ErrorCode, ImageError, Status
from lungopacity.results.schema import READ_SCHEMA
from lungopacity.storage import Store

log = logging.getLogger(__name__)

# Tables and notes that people keep beside films. They get a row (`rejected`; `not_an_image` or
# `empty`), but do not make a night incomplete.
_SIDECAR_SUFFIXES = (
    ".cls", ".csv", ".docx", ".htm", ".html", ".json", ".log", ".md", ".md5", ".parquet", ".pdf",
    ".sha256", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
)  # fmt: skip

_SIDECAR_NAMES = (
    ".ds_store", "desktop.ini", "license", "md5sums", "readme", "sha256sums", "thumbs.db",
)  # fmt: skip
_APPLE_DOUBLE = b"\x00\x05\x16\x07"
"""Signature of a macOS AppleDouble file (RFC 1740): metadata of a file, kept beside it under `._`
and its name."""

_GROUP_OBJECTS = 8
"""Objects that one thread fetches one after another before it hands them on. To hand over a small
object costs as much CPU as to fetch it: 780 microseconds one by one, 550 without the hand-over."""
_GROUP_BYTES = 1 << 20
"""Size that completes a group."""
_IN_HAND_BYTES = 128 << 20
"""Size of the loose objects that are fetched ahead or being decoded: a task's share of the node's
memory. A larger object comes alone."""

Fetched = list[tuple[bytes | Exception, float]]
"""For each object its bytes, or why there are none, and the seconds that fetching took."""


@dataclass
class _Pass:
    """One pass over an object that holds more than one image."""

    rows: int = 0
    reading: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class _File:
    """A file, or an error in its place, that `_rows` turns into one row or several."""

    columns: dict[str, Any]
    """Columns of the source and, in a container, of the member."""
    data: bytes | None = None
    error: Exception | None = None
    of: _Pass | None = None
    ends: bool = False
    """Marks the end of its pass, and is no file itself."""

    @property
    def name(self) -> str:
        return str(self.columns.get("member") or alone_in(self.columns["image"]))


@dataclass
class ReadFigures:
    """What reading took, for monitoring."""

    fetch_seconds: float = 0.0
    """Sum over all requests, several of which run at once."""
    fetched_bytes: int = 0
    decode_seconds: float = 0.0
    """CPU seconds of the decoder's process."""

    def taken(self) -> dict[str, float]:
        """The figures since the last call."""
        figures = dict(vars(self))
        self.fetch_seconds, self.fetched_bytes, self.decode_seconds = 0.0, 0, 0.0
        return figures


def read_images(
    store: Store,
    objects: pa.Table,
    settings: ReadSettings,
    *,
    wanted: Wanted | None = None,
    figures: ReadFigures | None = None,
) -> Iterator[pa.Table]:
    """Tables of `READ_SCHEMA`, each of up to `rows_per_table` rows.

    objects: rows of `PLAN_SCHEMA`. Loose objects come first (those larger than a film may be after
    the others), then shards; each kind in the given order. `wanted`: decode and return only these
    images, for training on the labelled part of an archive. `figures`: what reading took is added
    to them.
    """
    rows: list[dict[str, Any]] = []
    figures = figures or ReadFigures()
    for row in _rows(_files(store, objects, settings, wanted, figures), settings, figures):
        rows.append(row)
        if len(rows) == settings.rows_per_table:
            yield pa.Table.from_pylist(rows, schema=READ_SCHEMA)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=READ_SCHEMA)


def read_files(
    store: Store, objects: pa.Table, settings: ReadSettings
) -> Iterator[tuple[str, str | None, bytes]]:
    """Key, member and bytes of every file of the objects, with containers unpacked. Leaves out what
    cannot be read."""
    for file in _files(store, objects, settings, None, ReadFigures()):
        if file.data is not None:
            yield file.columns["image"], file.columns.get("member"), file.data


def _rows(
    files: Iterator[_File], settings: ReadSettings, figures: ReadFigures
) -> Iterator[dict[str, Any]]:
    with borrowed_decoder(settings) as decoder:
        before = decoder.cpu_seconds
        for file, contents in decoder.rows((file, file.data) for file in files):
            figures.decode_seconds += decoder.cpu_seconds - before
            before = decoder.cpu_seconds
            if file.error is not None:
                contents = [error_columns(file.error)]
            found = file.of or (_Pass() if len(contents) > 1 else None)
            for content in contents:
                yield {
                    **file.columns,
                    **_told_apart_from_sidecars(content, file),
                    "reading": found and found.reading,
                }
            if found is not None:
                found.rows += len(contents)
                if file.ends or file.of is None:
                    yield {
                        **_of_object(file.columns),
                        "status": Status.OK.value,
                        "reading": found.reading,
                        "shard_rows": found.rows,
                    }


def _files(
    store: Store,
    objects: pa.Table,
    settings: ReadSettings,
    wanted: Wanted | None,
    figures: ReadFigures,
) -> Iterator[_File]:
    planned = [
        ({name: value for name, value in row.items() if name != "is_shard"}, row["is_shard"])
        for row in objects.to_pylist()
    ]
    loose = [
        source
        for source, is_shard in planned
        if not is_shard and (wanted is None or wanted.has(source["image"]))
    ]
    most = settings.limits.max_size_bytes
    small = [source for source in loose if source["source_size_bytes"] <= most]
    yield from _loose(store, small, settings, figures)
    for source in loose:
        if source["source_size_bytes"] > most:
            yield from _large(store, source, settings, figures)
    for source, is_shard in planned:
        if is_shard:
            yield from _shard(store, source, settings, wanted, figures)


def _loose(
    store: Store, sources: list[dict[str, Any]], settings: ReadSettings, figures: ReadFigures
) -> Iterator[_File]:
    given_up = threading.Event()

    def fetch(group: list[dict[str, Any]]) -> Fetched:
        return [_fetched(store, source, settings) for source in group if not given_up.is_set()]

    waiting: deque[tuple[list[dict[str, Any]], Future[Fetched]]] = deque()
    in_hand = 0
    threads = ThreadPoolExecutor(settings.fetch_threads)
    try:
        for group in _groups(sources):
            # Small objects of a task are all fetched before any is decoded. If the storage runs on
            # the same cores, alternating would make each drive the other out of the caches.
            while waiting and in_hand + _size_of(group) > _IN_HAND_BYTES:
                size = _size_of(waiting[0][0])
                yield from _loose_files(*waiting.popleft(), settings, figures)
                in_hand -= size
            waiting.append((group, threads.submit(fetch, group)))
            in_hand += _size_of(group)
        while waiting:
            yield from _loose_files(*waiting.popleft(), settings, figures)
    finally:
        # A caller that stops early must not wait for the rest: minutes, if the store does not
        # answer.
        given_up.set()
        threads.shutdown(cancel_futures=True)


def _size_of(group: list[dict[str, Any]]) -> int:
    return sum(source["source_size_bytes"] for source in group)


def _groups(sources: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Groups of sources to fetch. The first are small, so that the first object comes early."""
    group: list[dict[str, Any]] = []
    size, most = 0, 1
    for source in sources:
        group.append(source)
        size += source["source_size_bytes"]
        if len(group) == most or size >= _GROUP_BYTES:
            yield group
            group, size, most = [], 0, min(2 * most, _GROUP_OBJECTS)
    if group:
        yield group


def _fetched(
    store: Store, source: dict[str, Any], settings: ReadSettings
) -> tuple[bytes | Exception, float]:
    began = time.perf_counter()
    try:
        settings.limits.check_size(source["source_size_bytes"])
        data = store.read(source["image"], etag=source["source_etag"])
    except Exception as error:
        return error, 0.0
    return data, time.perf_counter() - began


def _loose_files(
    sources: list[dict[str, Any]],
    fetched: Future[Fetched],
    settings: ReadSettings,
    figures: ReadFigures,
) -> Iterator[_File]:
    for source, (data, seconds) in zip(sources, fetched.result(), strict=True):
        if isinstance(data, Exception):
            yield _File(source, error=_reported(data))
            continue
        figures.fetch_seconds += seconds
        figures.fetched_bytes += len(data)
        if is_container(data[:HEAD_SIZE], source["image"]):
            # The content says that it is a shard, whatever its name.
            yield from _unpacked(io.BytesIO(data), source, settings, None, _Pass())
        else:
            yield _File(source, data)


def _large(
    store: Store, source: dict[str, Any], settings: ReadSettings, figures: ReadFigures
) -> Iterator[_File]:
    """An object larger than a film may be: a shard by its content, or refused before its bytes are
    fetched."""
    try:
        head = store.read_head(source["image"], HEAD_SIZE, etag=source["source_etag"])
        if not is_container(head, source["image"]):
            settings.limits.check_size(source["source_size_bytes"])
    except Exception as error:
        yield _File(source, error=_reported(error))
        return
    yield from _shard(store, source, settings, None, figures)


def _shard(
    store: Store,
    source: dict[str, Any],
    settings: ReadSettings,
    wanted: Wanted | None,
    figures: ReadFigures,
) -> Iterator[_File]:
    found = _Pass()
    began = time.perf_counter()
    try:
        with store.open_local(source["image"], etag=source["source_etag"]) as file:
            figures.fetch_seconds += time.perf_counter() - began
            figures.fetched_bytes += source["source_size_bytes"]
            head = file.read(HEAD_SIZE)
            file.seek(0)
            if is_container(head, source["image"]):
                yield from _unpacked(file, source, settings, wanted, found)
                return
            # Named like a shard, but not one: read it like any other object.
            settings.limits.check_size(source["source_size_bytes"])
            data = file.read()
    except Exception as error:
        yield _File(source, error=_reported(error))
        return
    yield _File(source, data)


def _unpacked(
    file: IO[bytes],
    source: dict[str, Any],
    settings: ReadSettings,
    wanted: Wanted | None,
    found: _Pass,
) -> Iterator[_File]:
    """The members of a container, then the end of its pass. If the container cannot be read to its
    end, members that were read keep their rows."""
    files = 0
    try:
        for index, name, data in members(file, source["image"], settings.limits, wanted):
            files += 1
            columns = {**source, "member": name, "member_index": index}
            if name == alone_in(source["image"]):
                del columns["member"]  # a compressed single film has the key of its object
            if isinstance(data, bytes):
                yield _File(columns, data, of=found)
            elif data is not None:
                yield _File(columns, error=_reported(data), of=found)
        if not files:
            raise without_files()
    except Exception as error:
        yield _File(source, error=_reported(error), of=found)
    yield _File(source, of=found, ends=True)


def _of_object(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: columns[name] for name in columns if name not in ("member", "member_index")}


def _told_apart_from_sidecars(content: dict[str, Any], file: _File) -> dict[str, Any]:
    code, data = content.get("error_code"), file.data or b""
    is_sidecar = False
    if code in (ErrorCode.EMPTY, ErrorCode.NOT_AN_IMAGE):
        # Logs are often empty. A Parquet file that is empty, or that has the bytes of something
        # else, may be a shard whose upload failed; a table without images was unpacked.
        is_lost_shard = file.name.lower().endswith(SHARD_SUFFIXES) and (
            code == ErrorCode.EMPTY or bool(data)
        )
        of_macos = posixpath.basename(file.name).startswith("._") and data.startswith(_APPLE_DOUBLE)
        is_sidecar = of_macos or (is_sidecar_name(file.name) and not is_lost_shard)
    return {**content, "status": Status.REJECTED.value} if is_sidecar else content


def is_sidecar_name(key: str) -> bool:
    """Whether it is the name of a table or note, or of a system file such as Thumbs.db."""
    name = posixpath.basename(alone_in(key)).lower()
    return name.endswith(_SIDECAR_SUFFIXES) or name in _SIDECAR_NAMES


def _reported(error: Exception) -> Exception:
    if not isinstance(error, ImageError):
        error = machine_error(error) or error
    if not isinstance(error, ImageError):
        log.error("unforeseen %s while an image was read", type(error).__name__)
    # The traceback's frames hold what they had read, hundreds of megabytes of a bomb, in reference
    # cycles: it would all stay in memory until the garbage collector runs.
    error.__cause__ = error.__context__ = error.__traceback__ = None
    return error
