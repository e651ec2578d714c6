"""The images of a Parquet file with a column of encoded images, row by row."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.unpacking import Entry, Lent, Meter, corrupt
from lungopacity.errors import ErrorCode, ImageError, Stage

_IMAGE_COLUMNS = (
    "image", "bytes", "image_bytes", "content", "data", "jpg", "jpeg", "png", "dcm", "dicom",
)  # fmt: skip
_NAME_COLUMNS = ("path", "file_name", "filename", "key", "__key__", "name", "image_id", "id")


def parquet_entries(file: IO[bytes], meter: Meter) -> Iterator[Entry]:
    """One entry a row, named by the row's path, or by its number.

    The image column is binary, or a struct with a binary field `bytes` and perhaps a `path` (as
    Hugging Face datasets writes it). Raises `ImageError` (`not_an_image`) where there is none: a
    sheet; `unsupported` where it cannot be told which of several it is; what Arrow raises where the
    file is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    # Arrow would hold whole column chunks, gigabytes of them; buffered, it holds one page. One row
    # a batch, because a dictionary can make one stored image a thousand rows.
    parquet = pq.ParquetFile(
        Lent(file), pre_buffer=False, buffer_size=1024 * 1024, page_checksum_verification=True
    )
    image, name = _columns(parquet.schema_arrow)
    columns = [image] if name is None else [image, name]
    # The sizes of single columns stand in the footer too, but to ask pyarrow 26 for those of a
    # damaged footer ends the process.
    groups = (parquet.metadata.row_group(group) for group in range(parquet.num_row_groups))
    left = sum(max(0, group.total_byte_size) for group in groups)
    meter.add(size, left)
    rows = 0
    for rows, batch in enumerate(parquet.iter_batches(1, columns=columns, use_threads=False), 1):
        (value,) = _leaf(batch, image)
        names = None if name is None else _leaf(batch, name)
        entry = _entry(value, _text(names) or str(rows - 1))
        left -= entry.size or 0
        if left < 0:
            meter.add(0, -left)
            left = 0
        yield entry
    if rows != parquet.metadata.num_rows:
        raise corrupt("holds another number of rows than it states")


def _entry(value: Any, name: str) -> Entry:
    if not value.is_valid:
        empty = ImageError(ErrorCode.EMPTY, Stage.UNPACK, "the row holds no image")
        return Entry(name, 0, empty, alone=True)
    buffer = value.as_buffer()
    return Entry(name, buffer.size, partial(pa.BufferReader, buffer), alone=True)


def _columns(schema: Any) -> tuple[str, str | None]:
    """Dotted paths of the column with the images, and of the one with their names."""
    found = {field.name: field.type for field in schema if _image_path(field) is not None}
    if not found:
        raise ImageError(
            ErrorCode.NOT_AN_IMAGE, Stage.UNPACK, "a sheet: no column of it holds images"
        )
    known = [name for name in _IMAGE_COLUMNS if name in found] if len(found) > 1 else list(found)
    if not known:
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.UNPACK,
            f"{len(found)} columns of bytes, and none has a name that tells it holds the images",
        )
    column = schema.field(schema.get_field_index(known[0]))
    image = _image_path(column)
    assert image is not None
    if pa.types.is_struct(column.type):
        path = column.type.get_field_index("path")
        if path >= 0 and _is_text(column.type.field(path).type):
            return image, f"{column.name}.path"
    for name in _NAME_COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0 and _is_text(schema.field(index).type):
            return image, name
    return image, None


def _image_path(field: Any) -> str | None:
    if _is_bytes(field.type):
        return str(field.name)
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        if index >= 0 and _is_bytes(field.type.field(index).type):
            return f"{field.name}.bytes"
    return None


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _leaf(batch: Any, path: str) -> Any:
    """The column at a dotted path; a null struct has null fields."""
    if path in batch.schema.names:
        return batch.column(path)
    column, _, leaf = path.rpartition(".")
    values = batch.column(column)
    return values.flatten()[values.type.get_field_index(leaf)]


def _text(values: Any) -> str | None:
    if values is None:
        return None
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    # Parquet promises UTF-8, and nobody checks.
    buffer = values[0].as_buffer()
    return None if buffer is None else bytes(buffer).decode("utf-8", "backslashreplace")
