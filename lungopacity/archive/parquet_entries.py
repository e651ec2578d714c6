"""The images of a Parquet file with a column of encoded images, row by row."""

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
"""Of a row group; Arrow takes four times as much."""
_NAME_COLUMNS = ("path", "file_name", "filename", "key", "__key__", "name", "image_id", "id")


def parquet_entries(file: IO[bytes], meter: Meter) -> Iterator[Entry]:
    """One entry a row, named by the row's path, else by a column of names (`_NAME_COLUMNS`), else
    by its number.

    The image column is binary, or a struct with a binary field `bytes` and perhaps a `path` (as
    Hugging Face datasets writes it). Of several with known names, the one counts that the row
    fills; a row that fills two is refused. Raises `ImageError` (`not_an_image`) where there is
    none: a sheet; `unsupported` where it cannot be told which of several it is, or where bytes lie
    deeper; what Arrow raises where the file is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    # Arrow would hold whole column chunks, gigabytes of them; buffered, it holds one page.
    parquet = pq.ParquetFile(
        Lent(file), pre_buffer=False, buffer_size=1024 * 1024, page_checksum_verification=True
    )
    columns = _columns(parquet.schema_arrow)
    paths = {path: None for column in columns for path in (column.image, *column.names)}
    # The sizes of single columns stand in the footer too, but to ask pyarrow 26 for those of a
    # damaged footer ends the process.
    groups = (parquet.metadata.row_group(group) for group in range(parquet.num_row_groups))
    sizes = [max(0, group.total_byte_size) for group in groups]
    left = sum(sizes)
    meter.add(size, left)
    # One row a batch, because the pages' dictionary can make one stored image a thousand rows.
    rows_at_once = 1
    if any(pa.types.is_dictionary(column.kind) for column in columns):
        # Of a column that is a dictionary in Arrow, too, every batch holds the row group's whole.
        rows_at_once = _DICTIONARY_ROWS
        if max(sizes, default=0) > _DICTIONARY_BYTES:
            raise ImageError(
                ErrorCode.UNSUPPORTED,
                Stage.UNPACK,
                f"images in a dictionary of more than {_DICTIONARY_BYTES} bytes; write plain ones",
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
    """Dotted paths of a column with images and of what may name its rows, best first."""

    image: str
    kind: Any
    names: tuple[str, ...]


def _entry(row: Any, columns: Sequence[_Column], number: str) -> Entry:
    """Of a batch of one row. `number`: its name, where it has none."""
    values = [(column, _leaf(row, column.image)[0]) for column in columns]
    filled = [
        (column, value) for column, value in values if value.is_valid and value.as_buffer().size
    ]
    column, value = (filled or values)[0]
    names = (_text(_leaf(row, path)) for path in column.names)
    name = next(filter(None, names), number)
    if len(filled) > 1:
        told = ", ".join(column.image for column, _ in filled)
        several = ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            f"the row holds {len(filled)} images ({told}); write one image a row",
        )
        return Entry(name, 0, several, alone=True)
    if not value.is_valid:
        empty = ImageError(ErrorCode.EMPTY, Stage.UNPACK, "the row holds no image")
        return Entry(name, 0, empty, alone=True)
    buffer = value.as_buffer()
    return Entry(name, buffer.size, partial(pa.BufferReader, buffer), alone=True)


def _columns(schema: Any) -> list[_Column]:
    """The columns that may hold a row's image; mostly one."""
    found = {field.name: images for field in schema if (images := _images_in(field)) is not None}
    if not found:
        if any(_holds_bytes(field.type) for field in schema):
            raise ImageError(
                ErrorCode.UNSUPPORTED,
                Stage.UNPACK,
                "images in lists or deeper structs are not read; write one image a row",
            )
        raise ImageError(
            ErrorCode.NOT_AN_IMAGE, Stage.UNPACK, "a sheet: no column of it holds images"
        )
    if any(schema.names.count(name) > 1 for name in found):
        # Parquet allows it, as a join of tables writes it, and nothing can be asked for by name.
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            "another column has the name of that with the images; rename one",
        )
    known = [name for name in _IMAGE_COLUMNS if name in found] if len(found) > 1 else list(found)
    if not known:
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            f"{len(found)} columns of bytes, and none has a name that tells it holds the images",
        )
    return [_Column(*found[name], _names_of(schema, name)) for name in known]


def _names_of(schema: Any, column: str) -> tuple[str, ...]:
    names = []
    kind = schema.field(schema.get_field_index(column)).type
    if pa.types.is_struct(kind):
        path = kind.get_field_index("path")
        # Null where the writer took the bytes from memory, and not from a file.
        if path >= 0 and _is_text(kind.field(path).type):
            names.append(f"{column}.path")
    known = [name for name in _NAME_COLUMNS if schema.get_field_index(name) >= 0]
    # Numbers name rows where no text does: labels that say 7 mean the row whose id is 7.
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
    # Not those of a fixed size: no images have one, and the digests of sheets do.
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
    # Parquet promises UTF-8, and nobody checks.
    buffer = values[0].as_buffer()
    return None if buffer is None else bytes(buffer).decode("utf-8", "backslashreplace")
