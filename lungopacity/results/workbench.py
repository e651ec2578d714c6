"""DuckDB for tables of any size: beyond its memory limit it spills to disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.errors import NO_ROOM, UserError
from lungopacity.runtime import end_if_told
from lungopacity.storage.parquet import PARQUET_OPTIONS
from lungopacity.storage.scratch import scratch

_MEMORY = "1GiB"
_ROWS_PER_FILE = 1_000_000
_ROWS_PER_BATCH = 50_000


@dataclass(frozen=True)
class ExportedFile:
    """A Parquet file with part of a query's answer."""

    path: Path
    rows: int


def is_full_disk(error: Exception) -> bool:
    """Whether an error of Python, Arrow or DuckDB means that the disk is full. DuckDB runs out of
    memory when it can spill nothing more to disk."""
    import duckdb

    if isinstance(error, duckdb.Error) and not isinstance(error, duckdb.OutOfMemoryException):
        signs = ("max_temp_directory_size", *map(os.strerror, NO_ROOM))
        return any(sign in str(error) for sign in signs)
    return isinstance(error, duckdb.OutOfMemoryException) or (
        isinstance(error, OSError) and error.errno in NO_ROOM
    )


def reason_of(error: Exception) -> str:
    """What DuckDB says of SQL that it refuses, with the names that it suggests, on one line."""
    return " ".join(str(error).split("\n\n")[0].split())


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty local folder, removed after the block.

    Raises `UserError` if the disk is full in the block.
    """
    with scratch() as folder:
        try:
            yield folder
        except Exception as error:
            if isinstance(error, RuntimeError) and "Query interrupted" in str(error):
                # What DuckDB raises instead of what our handler of a signal raised in it.
                end_if_told()
                raise KeyboardInterrupt from error
            if not is_full_disk(error):
                raise
            raise UserError(
                f"temporary files cannot be written: no space left in {folder.parent}; free "
                "some, or set TMPDIR to a folder with more space"
            ) from error


@contextmanager
def tables_in_memory(database: str = "") -> Iterator[tuple[Any, Path]]:
    """A DuckDB connection and an empty local folder, both gone after the block. Raises as
    `temporary_folder` does.

    What a sort or a join cannot hold in memory goes to the folder: DuckDB would write it, with
    names of patients, to the current one. database: a file in the folder for the tables.
    """
    import duckdb

    with (
        temporary_folder() as folder,
        duckdb.connect(folder / database if database else ":memory:") as connection,
    ):
        connection.execute(f"SET temp_directory = {quoted(folder / 'spill')}")
        connection.execute("SET TimeZone = 'UTC'")
        yield connection, folder


@contextmanager
def workbench() -> Iterator[tuple[Any, Path]]:
    """The same, with DuckDB's tables in the folder, too."""
    with tables_in_memory("tables.duckdb") as (connection, folder):
        connection.execute(f"SET memory_limit = '{_MEMORY}'")
        # Every query that needs an order has an ORDER BY.
        connection.execute("SET preserve_insertion_order = false")
        yield connection, folder


def quoted(text: object) -> str:
    """The text as an SQL string literal."""
    return "'" + str(text).replace("'", "''") + "'"


def view_of_files(connection: Any, name: str, paths: Sequence[Path], schema: pa.Schema) -> None:
    """Create a view of local Parquet files with the schema's columns; empty without files."""
    if paths:
        columns = ", ".join(f'"{column}"' for column in schema.names)
        # hive_partitioning off: a parent folder such as `modality=CR` would override that column.
        files = f"read_parquet([{', '.join(map(quoted, paths))}], hive_partitioning = false)"
        connection.execute(f"CREATE VIEW {name} AS SELECT {columns} FROM {files}")
    else:
        connection.register(name, schema.empty_table())


def export(
    connection: Any,
    sql: str,
    schema: pa.Schema,
    folder: Path,
    stem: str,
    change: Callable[[pa.Table], pa.Table] | None = None,
) -> list[ExportedFile]:
    """Write the answer to `sql`, in its order, as `<folder>/<stem>-NNNNN.parquet` with this schema,
    up to a million rows each.

    `change` is applied to each piece of up to 50,000 rows.
    """
    files: list[ExportedFile] = []
    writer: pq.ParquetWriter | None = None
    room = 0
    try:
        for batch in connection.sql(sql).to_arrow_reader(_ROWS_PER_BATCH):
            table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            table = table if change is None else change(table)
            while table.num_rows:
                if writer is None:
                    path = folder / f"{stem}-{len(files):05d}.parquet"
                    writer, room = pq.ParquetWriter(path, schema, **PARQUET_OPTIONS), _ROWS_PER_FILE
                    files.append(ExportedFile(path, 0))
                piece, table = table.slice(0, room), table.slice(room)
                writer.write_table(piece)
                files[-1] = ExportedFile(files[-1].path, files[-1].rows + piece.num_rows)
                room -= piece.num_rows
                if not room:
                    writer.close()
                    writer = None
    finally:
        if writer is not None:
            writer.close()
    return files


def spool(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Write the tables to one local Parquet file as they come."""
    with pq.ParquetWriter(path, schema, compression="lz4") as writer:
        for table in tables:
            writer.write_table(table)
