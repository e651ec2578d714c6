"""How Parquet files are written."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_OPTIONS = {"compression": "zstd", "write_page_checksum": True}
"""For every Parquet file that is kept. Arrow's S3 reader passes on a flipped byte unnoticed. With a
checksum for each page, a reader that compares them raises an error instead."""


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **PARQUET_OPTIONS)
    return bytes(sink.getvalue())
