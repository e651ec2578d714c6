"""An Arrow table as text or bytes for the command line."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq


def rendered(table: pa.Table, output_format: str) -> bytes:
    """The table as `table` (aligned text), `csv`, `json` (one object a line) or `parquet`."""
    if output_format == "csv":
        sink = io.BytesIO()
        pa.csv.write_csv(table, sink)
        return sink.getvalue()
    if output_format == "json":
        lines = (
            json.dumps(_finite(row), default=str, allow_nan=False) for row in table.to_pylist()
        )
        return "".join(f"{line}\n" for line in lines).encode()
    if output_format == "parquet":
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()
    assert output_format == "table", output_format
    return _aligned(table).encode()


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _aligned(table: pa.Table) -> str:
    numeric = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in table.schema]
    cells = [[_cell(value) for value in column.to_pylist()] for column in table.columns]
    widths = [
        max([len(name), *(len(cell) for cell in column)])
        for name, column in zip(table.column_names, cells, strict=True)
    ]

    def line(values: list[str]) -> str:
        parts = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    rows = [list(row) for row in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(line(row) for row in [table.column_names, rule, *rows]) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
