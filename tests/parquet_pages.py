"""Damage to the pages of Parquet files, and the checksums that reveal it."""

from __future__ import annotations

import io

import pyarrow.parquet as pq


def with_flipped_page(data: bytes) -> bytes:
    """The file with one bit changed, at the end of its first column's last page."""
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    last = first + column.total_compressed_size - 1
    return data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :]


def has_page_checksums(data: bytes) -> bool:
    """Whether a reader can tell that a page of the file was changed."""
    try:
        pq.read_table(io.BytesIO(with_flipped_page(data)), page_checksum_verification=True)
    except OSError as error:
        return "CRC checksum verification failed" in str(error)
    return False
