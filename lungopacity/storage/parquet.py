"""How Parquet files are written."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET_OPTIONS = {"compression": "zstd", "write_page_checksum": True}
"""Of every Parquet file that is kept. Arrow's S3 reader hands a flipped byte on without a word;
with a checksum on each page, a reader that compares them has an error instead."""


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **PARQUET_OPTIONS)
    return bytes(sink.getvalue())
