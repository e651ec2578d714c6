"""Objects of an archive to rows with pixels: fetch, unpack, decode. Every image gives a row.

Runs inside Ray tasks, for training and for screening alike, and knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import logging
import tarfile
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lungopacity.errors import ErrorCode, ImageError, Stage, Status
from lungopacity.radiograph import DecodeLimits, Preprocessing, decode_radiograph
from lungopacity.results.schema import CONTENT_FIELDS, READ_SCHEMA
from lungopacity.storage import Store

log = logging.getLogger(__name__)

# Sheets and notes that people keep beside films. They get a row (`rejected`, `not_an_image`), but a
# night is not called incomplete because of them.
_SIDECAR_SUFFIXES = (
    ".cls", ".csv", ".htm", ".html", ".json", ".md", ".parquet", ".pdf",
    ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml",
)  # fmt: skip


@dataclass(frozen=True)
class ReadSettings:
    """How objects are read."""

    preprocessing: Preprocessing
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    fetch_threads: int = 16
    """Requests under way at once in one task; only fetching is threaded, decoding is not."""
    rows_per_table: int = 64

    def __post_init__(self) -> None:
        if self.fetch_threads < 1 or self.rows_per_table < 1:
            raise ValueError("fetch_threads and rows_per_table must be at least 1")


def read_images(
    store: Store,
    objects: pa.Table,
    settings: ReadSettings,
    *,
    wanted: frozenset[str] | None = None,
) -> Iterator[pa.Table]:
    """Tables of `READ_SCHEMA`, up to `rows_per_table` rows each, in the order of `objects`.

    objects: rows of `PLAN_SCHEMA`. `wanted`: only images of these names (key, or member name inside
    a shard) are decoded and given; for training on the labelled part of an archive.
    """
    rows: list[dict[str, Any]] = []
    for row in _rows(store, objects, settings, wanted):
        rows.append(row)
        if len(rows) == settings.rows_per_table:
            yield pa.Table.from_pylist(rows, schema=READ_SCHEMA)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=READ_SCHEMA)


def _rows(
    store: Store, objects: pa.Table, settings: ReadSettings, wanted: frozenset[str] | None
) -> Iterator[dict[str, Any]]:
    planned = objects.to_pylist()
    loose = [
        source
        for source in planned
        if not source["is_shard"] and (wanted is None or source["image"] in wanted)
    ]
    yield from _loose_rows(store, loose, settings)
    for source in planned:
        if source["is_shard"]:
            yield from _shard_rows(store, source, settings, wanted)


def _loose_rows(
    store: Store, sources: list[dict[str, Any]], settings: ReadSettings
) -> Iterator[dict[str, Any]]:
    def fetch(source: dict[str, Any]) -> bytes:
        # The listed size is enough to refuse a giant before its bytes are taken.
        settings.limits.check_size(source["source_size_bytes"])
        return store.read(source["image"], etag=source["source_etag"])

    waiting: deque[tuple[dict[str, Any], Future[bytes]]] = deque()
    with ThreadPoolExecutor(settings.fetch_threads) as threads:
        for source in sources:
            waiting.append((source, threads.submit(fetch, source)))
            # Twice the threads: always work in hand, never the whole chunk in memory.
            if len(waiting) > 2 * settings.fetch_threads:
                yield _loose_row(*waiting.popleft(), settings)
        while waiting:
            yield _loose_row(*waiting.popleft(), settings)


def _loose_row(
    source: dict[str, Any], fetched: Future[bytes], settings: ReadSettings
) -> dict[str, Any]:
    row = _source_columns(source)
    try:
        data = fetched.result()
    except Exception as error:
        return row | _error_columns(error, source["image"])
    return row | _content_columns(data, source["image"], settings)


def _shard_rows(
    store: Store, source: dict[str, Any], settings: ReadSettings, wanted: frozenset[str] | None
) -> Iterator[dict[str, Any]]:
    row = {**_source_columns(source), "reading": uuid.uuid4().hex}
    given = 0
    try:
        with store.open_local(source["image"], etag=source["source_etag"]) as file:
            for index, name, data in _tar_members(file, settings.limits, wanted):
                if isinstance(data, ImageError):
                    content = _error_columns(data, name)
                elif data is None:
                    continue
                else:
                    content = _content_columns(data, name, settings)
                given += 1
                yield {**row, "member": name, "member_index": index, **content}
    except Exception as error:
        # The shard itself, or its rest: members that were already given keep their rows.
        given += 1
        yield row | _error_columns(error, "")
    yield {**row, "status": Status.OK.value, "shard_rows": given}


def _tar_members(
    file: Any, limits: DecodeLimits, wanted: frozenset[str] | None
) -> Iterator[tuple[int, str, bytes | ImageError | None]]:
    """Index, name and bytes of each regular file; None in place of bytes that nobody wants.

    Names are data: nothing is ever written under them. Raises `ImageError` (`corrupt_archive`)
    where the tar cannot be walked to its end.
    """
    try:
        # A name in no known encoding must not stop the shard, nor the Arrow column it goes into.
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
        ) as tar:
            files = (member for member in tar if member.isfile())
            for index, member in enumerate(files):
                if wanted is not None and member.name not in wanted:
                    yield index, member.name, None
                else:
                    yield index, member.name, _member_bytes(tar, member, limits)
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise _corrupt(f"cannot be walked to its end ({type(error).__name__})") from error
    # tarfile stops silently at a broken header, and at a file cut between two members. A whole
    # tar has a block of zeros there (POSIX.1-1988 ustar).
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise _corrupt("ends early, or has a broken header in its middle")


def _corrupt(what: str) -> ImageError:
    return ImageError(ErrorCode.CORRUPT_ARCHIVE, Stage.UNPACK, f"the shard {what}")


def _member_bytes(
    tar: tarfile.TarFile, member: tarfile.TarInfo, limits: DecodeLimits
) -> bytes | ImageError:
    try:
        limits.check_size(member.size)
    except ImageError as error:
        return error
    reader = tar.extractfile(member)
    assert reader is not None
    data = reader.read()
    if len(data) < member.size:
        raise _corrupt("ends inside a member")
    return data


def _source_columns(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source[name] for name in source if name != "is_shard"}


def _content_columns(data: bytes, name: str, settings: ReadSettings) -> dict[str, Any]:
    """The content columns of `READ_SCHEMA`, and the pixels, of one file's bytes."""
    digest = hashlib.sha256(data).hexdigest()
    try:
        radiograph = decode_radiograph(
            data, limits=settings.limits, at_least=settings.preprocessing.image_size
        )
        pixels = settings.preprocessing.square(radiograph.pixels)
    except Exception as error:
        return {"content_sha256": digest, **_error_columns(error, name)}
    facts = {
        column.name: getattr(radiograph, column.name)
        for column in CONTENT_FIELDS
        if hasattr(radiograph, column.name)
    }
    return {
        **facts,
        "content_sha256": digest,
        "status": Status.OK.value,
        "pixels": pixels.tobytes(),
    }


def _error_columns(error: Exception, name: str) -> dict[str, Any]:
    if not isinstance(error, ImageError):
        # The type alone: an unforeseen message could quote a header.
        log.error("unforeseen %s while an image was read", type(error).__name__)
        error = ImageError(ErrorCode.INTERNAL, Stage.DECODE, f"unforeseen {type(error).__name__}")
    sidecar = error.code is ErrorCode.NOT_AN_IMAGE and name.lower().endswith(_SIDECAR_SUFFIXES)
    return {
        "status": (Status.REJECTED if sidecar else Status.FAILED).value,
        "error_code": error.code.value,
        "error_stage": error.stage.value,
        "error_message": error.message,
    }
