"""Reads the images of a Parquet file with a column of encoded images, row by row."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.unpacking import Entry, Lent, Meter, corrupt
from lungopacity.errors import ErrorCode, ImageError, Stage

_IMAGE_COLUMNS = (
    "image", "bytes", "image_bytes", "content", "data", "jpg", "jpeg", "png", "dcm", "dicom",
)  # fmt: skip
_DICTIONARY_ROWS = 1 << 16
_DICTIONARY_BYTES = 128 * 1024 * 1024
"""Limit for a row group with a dictionary; Arrow takes four times as much memory."""
_NAME_COLUMNS = ("path", "file_name", "filename", "key", "__key__", "name", "image_id", "id")


def parquet_entries(file: IO[bytes], meter: Meter) -> Iterator[Entry]:
    """One entry per row, named by the row's path, else by a column of names (`_NAME_COLUMNS`), else
    by the row's number.

    The image column is binary, or a struct with a binary field `bytes` and perhaps a `path` (as
    Hugging Face datasets writes it). There may be several columns with known names, of which each
    row fills one; a row that fills two is refused. Raises `ImageError`: `not_an_image` for a table
    without image column; `unsupported` if it is unclear which column holds the images, or if they
    are nested deeper. Raises what Arrow raises for a damaged file.
    """
    size = file.seek(0, io.SEEK_END)
    # By default Arrow holds whole column chunks, maybe gigabytes; with a buffer it holds one page.
    parquet = pq.ParquetFile(
        Lent(file), pre_buffer=False, buffer_size=1024 * 1024, page_checksum_verification=True
    )
    columns = _columns(parquet.schema_arrow)
    paths = {path: None for column in columns for path in (column.image, *column.names)}
    # The footer has the sizes of single columns, too, but pyarrow 26 crashes if it is asked for
    # those of a damaged footer.
    groups = (parquet.metadata.row_group(group) for group in range(parquet.num_row_groups))
    sizes = [max(0, group.total_byte_size) for group in groups]
    left = sum(sizes)
    meter.add(size, left)
    # One row per batch: by the dictionary of a page, one stored image can become a thousand rows.
    rows_at_once = 1
    if any(pa.types.is_dictionary(column.kind) for column in columns):
        # If the column is a dictionary in Arrow, too, each batch holds the row group's whole one.
        rows_at_once = _DICTIONARY_ROWS
        if max(sizes, default=0) > _DICTIONARY_BYTES:
            raise ImageError(
                ErrorCode.UNSUPPORTED,
                Stage.UNPACK,
                f"images in a dictionary of more than {_DICTIONARY_BYTES} bytes; write them "
                "without a dictionary",
            )
    rows = 0
    batches = parquet.iter_batches(rows_at_once, columns=list(paths), use_threads=False)
    singly = (batch.slice(row, 1) for batch in batches for row in range(batch.num_rows))
    for rows, batch in enumerate(singly, 1):
        entry = _entry(batch, columns, str(rows - 1))
        left -= entry.size or 0
        if left < 0:
            meter.add(0, -left)
            left = 0
        yield entry
    if rows != parquet.metadata.num_rows:
        raise corrupt("holds another number of rows than it states")


@dataclass(frozen=True)
class _Column:
    """Dotted paths of a column with images, and of the columns that may name its rows, best
    first."""

    image: str
    kind: Any
    names: tuple[str, ...]


def _entry(row: Any, columns: Sequence[_Column], number: str) -> Entry:
    """The entry of a batch of one row. `number`: its name if it has no other."""
    values = [(column, _leaf(row, column.image)[0]) for column in columns]
    filled = [
        (column, value) for column, value in values if value.is_valid and value.as_buffer().size
    ]
    column, value = (filled or values)[0]
    names = (_text(_leaf(row, path)) for path in column.names)
    name = next(filter(None, names), number)
    if len(filled) > 1:
        paths = ", ".join(column.image for column, _ in filled)
        several = ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            f"the row holds {len(filled)} images ({paths}); write one image per row",
        )
        return Entry(name, 0, several, alone=True)
    if not value.is_valid:
        empty = ImageError(ErrorCode.EMPTY, Stage.UNPACK, "the row holds no image")
        return Entry(name, 0, empty, alone=True)
    buffer = value.as_buffer()
    return Entry(name, buffer.size, partial(pa.BufferReader, buffer), alone=True)


def _columns(schema: Any) -> list[_Column]:
    """The columns that may hold a row's image; usually one."""
    found = {field.name: images for field in schema if (images := _images_in(field)) is not None}
    if not found:
        if any(_holds_bytes(field.type) for field in schema):
            raise ImageError(
                ErrorCode.UNSUPPORTED,
                Stage.UNPACK,
                "images in lists or deeper structs are not read; write one image per row",
            )
        raise ImageError(ErrorCode.NOT_AN_IMAGE, Stage.UNPACK, "a table without a column of images")
    if any(schema.names.count(name) > 1 for name in found):
        # Parquet allows equal names, and a join may write them; columns are read by name here.
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            "another column has the same name as the column of images; rename one",
        )
    known = [name for name in _IMAGE_COLUMNS if name in found] if len(found) > 1 else list(found)
    if not known:
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            f"{len(found)} columns of bytes, and none has a known name; rename the one with the "
            "images to 'image'",
        )
    return [_Column(*found[name], _names_of(schema, name)) for name in known]


def _names_of(schema: Any, column: str) -> tuple[str, ...]:
    names = []
    kind = schema.field(schema.get_field_index(column)).type
    if pa.types.is_struct(kind):
        path = kind.get_field_index("path")
        # Null if the writer took the bytes from memory instead of a file.
        if path >= 0 and _is_text(kind.field(path).type):
            names.append(f"{column}.path")
    known = [name for name in _NAME_COLUMNS if schema.get_field_index(name) >= 0]
    # Without a text, a number names the row: labels that say 7 mean the row whose id is 7.
    for may_name in (_is_text, _is_whole):
        for name in known:
            if may_name(schema.field(name).type):
                return (*names, name)
    return tuple(names)


def _images_in(field: Any) -> tuple[str, Any] | None:
    if _is_bytes(field.type):
        return field.name, field.type
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        if index >= 0 and _is_bytes(field.type.field(index).type):
            return f"{field.name}.bytes", field.type.field(index).type
    return None


def _holds_bytes(kind: Any) -> bool:
    parts = (kind.field(part).type for part in range(kind.num_fields))
    return _is_bytes(kind) or any(map(_holds_bytes, parts))


def _is_bytes(kind: Any) -> bool:
    # Not bytes of a fixed size: images have none, but digests in tables do.
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(_plain(kind)) for test in is_bytes)


def _is_text(kind: Any) -> bool:
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(_plain(kind)) for test in is_text)


def _is_whole(kind: Any) -> bool:
    return bool(pa.types.is_integer(_plain(kind)))


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _leaf(batch: Any, path: str) -> Any:
    """The column at a dotted path, no longer a dictionary; a null struct has null fields."""
    if path in batch.schema.names:
        values = batch.column(path)
    else:
        column, _, leaf = path.rpartition(".")
        struct = batch.column(column)
        values = struct.flatten()[struct.type.get_field_index(leaf)]
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _text(values: Any) -> str | None:
    if _is_whole(values.type):
        return str(values[0]) if values[0].is_valid else None
    # Parquet promises UTF-8, but nothing checks it.
    buffer = values[0].as_buffer()
    return None if buffer is None else bytes(buffer).decode("utf-8", "backslashreplace")
