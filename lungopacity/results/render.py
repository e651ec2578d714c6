"""Render an Arrow table as text or bytes for the command line."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pyarrow.csv

from lungopacity.errors import UserError
from lungopacity.results.schema import METADATA
from lungopacity.storage.parquet import parquet_bytes
from lungopacity.words import finite, printable


def rendered(table: pa.Table, output_format: str) -> bytes:
    """The table as `table` (aligned text), `csv`, `json` (one object per line) or `parquet`.

    Raises `UserError` if the format cannot represent a column.
    """
    write = {"csv": _csv, "json": _json, "parquet": _parquet, "table": _aligned}[output_format]
    try:
        return write(table)
    # Python has no dates before year 1 or after year 9999.
    except (pa.ArrowException, OverflowError, ValueError) as error:
        raise UserError(
            f"column {_refused(table, write)} cannot be written as {output_format}; choose another "
            "--format, such as json, or cast it: CAST(… AS VARCHAR)"
        ) from error


def _refused(table: pa.Table, write: Callable[[pa.Table], bytes]) -> str:
    """The first column that cannot be written, and its type."""
    for number, field in enumerate(table.schema):
        try:
            write(table.select([number]))
        except (pa.ArrowException, OverflowError, ValueError):
            return f"'{field.name}' ({field.type})"
    return "types"


def _csv(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pa.csv.write_csv(table, sink)
    return sink.getvalue()


def _json(table: pa.Table) -> bytes:
    (name, times), *_ = [*Counter(table.column_names).most_common(1), ("", 0)]
    if times > 1:
        raise UserError(
            f"column '{name}' occurs {times} times, but JSON allows it once; rename it with AS"
        )
    lines = (json.dumps(finite(row), default=str, allow_nan=False) for row in table.to_pylist())
    return "".join(f"{line}\n" for line in lines).encode()


def _parquet(table: pa.Table) -> bytes:
    return parquet_bytes(table.replace_schema_metadata(METADATA))


def _aligned(table: pa.Table) -> bytes:
    numeric = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in table.schema]
    names = [_cell(name) for name in table.column_names]
    cells = [[_cell(value) for value in column.to_pylist()] for column in table.columns]
    widths = [
        max([len(name), *(len(cell) for cell in column)])
        for name, column in zip(names, cells, strict=True)
    ]

    def line(values: list[str]) -> str:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rows = [list(row) for row in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [line(row) for row in [names, rule, *rows]]
    return "".join(f"{line}\n" for line in lines).encode()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        # Metrics hold counts as floats, of a million images and more.
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return printable(str(value))
