"""SQL over published runs: the views `predictions`, `latest`, `metrics` and `runs`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lungopacity.errors import UserError, first_line
from lungopacity.results.folder import read_runs
from lungopacity.results.schema import METRICS_SCHEMA, predictions_schema
from lungopacity.results.workbench import is_full_disk, reason_of, tables_in_memory
from lungopacity.storage import Store, open_store

if TYPE_CHECKING:
    import pyarrow.dataset

_NO_RUN = {"class_names": ()}
_RUNS_SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("model_id", pa.string()),
        ("positive_class", pa.string()),
        ("synthetic", pa.bool_()),
        ("archive", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("finished_at", pa.timestamp("us", tz="UTC")),
        ("images", pa.int64()),
        ("ok", pa.int64()),
        ("rejected", pa.int64()),
        ("failed", pa.int64()),
        ("positive", pa.int64()),
        ("review", pa.int64()),
        ("images_per_s", pa.float64()),
        ("record", pa.string()),
    ]
)
"""`record` is the whole commit record as JSON."""

# `latest` takes all rows of an object from one run: a shard that could not be opened one night has
# a single row for that night, and a row per member for the next.
# Models with different positive classes may have the same id, so each row names the positive class.
# `places` is in a schema of its own, which SHOW TABLES does not list. `threshold` uses it, too.
_LATEST = """
CREATE SCHEMA internal;
CREATE TABLE internal.places AS SELECT * FROM run_places;
CREATE VIEW latest AS SELECT * EXCLUDE (place) FROM (
    SELECT predictions.*, place, positive_class
    FROM predictions JOIN internal.places USING (run_id)
    QUALIFY place = max(place) OVER (PARTITION BY archive, image, model_id, positive_class)
)"""


def query(results_uri: str, sql: str) -> pa.Table:
    """DuckDB's answer to `sql`. The SQL can access no other files and no network.

    Raises `UserError` for SQL that DuckDB refuses, and if the results folder cannot be read.
    """
    import duckdb

    store = open_store(results_uri)
    records = _committed(store)
    with files_of_runs(store):
        predictions, metrics = predictions_of(store, records), _metrics(store, records)
    with tables_in_memory() as (connection, _):
        rows = connection.from_arrow(predictions)
        rows.project(_columns(predictions.schema.names, rows.columns)).create_view("predictions")
        connection.register("metrics", metrics)
        connection.register("runs", _runs_table(records))
        connection.register("run_places", run_places(records))
        connection.execute(_LATEST)
        connection.unregister("run_places")
        connection.execute("SET enable_external_access = false")
        try:
            _check_statements([one.type.name for one in connection.extract_statements(sql)])
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            if _OF_A_FILE.search(str(error)):
                raise _unreadable(store, error) from error
            raise UserError(f"SQL: {reason_of(error)}") from error


def _columns(written: Sequence[str], names: Sequence[str]) -> str:
    """SQL that selects every column, but makes one of those whose names differ only in case: SQL
    ignores case, so all but the first of them could not be asked for.

    written: names of the columns in the files. names: as DuckDB calls them, no two alike.
    """
    same: defaultdict[str, list[str]] = defaultdict(list)
    for in_files, name in zip(written, names, strict=True):
        same[in_files.lower()].append(f'"{name}"')
    return ", ".join(
        alike[0] if len(alike) == 1 else f"coalesce({', '.join(alike)}) AS {alike[0]}"
        for alike in same.values()
    )


def _check_statements(kinds: Sequence[str]) -> None:
    """kinds: types of the statements, as DuckDB names them. Raises `UserError` unless there is
    exactly one, a SELECT."""
    if kinds == ["MULTI"]:
        raise UserError("SQL: PIVOT must list the values: PIVOT … ON column IN ('a', 'b')")
    if len(kinds) != 1:
        raise UserError(f"SQL: {len(kinds)} statements; give a single one that begins with SELECT")
    if kinds != ["SELECT"]:
        raise UserError(f"SQL: {kinds[0]} is not allowed; begin with SELECT")


@contextmanager
def files_of_runs(store: Store) -> Iterator[None]:
    """A block that reads files named by commit records.

    Raises `UserError` if one cannot be read.
    """
    import duckdb

    try:
        yield
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        if isinstance(error, duckdb.Error) and not (
            _OF_A_FILE.search(str(error)) or is_full_disk(error)
        ):
            raise
        raise _unreadable(store, error) from error


_OF_A_FILE = re.compile("reading the (stream registered|Arrow source)")
"""DuckDB's words if Arrow, which reads the files for it, failed."""
_MAY_PASS = re.compile(
    r"AWS Error (?!NO_SUCH_KEY|RESOURCE_NOT_FOUND)|\[errno (?!2\])", re.IGNORECASE
)
"""Arrow's words if the storage did not return a file that may be there and sound."""
_REFUSED = re.compile(r"AWS Error ACCESS_DENIED|\[errno 13\]", re.IGNORECASE)
"""Of these, if the storage refused the read."""


def _unreadable(store: Store, error: Exception) -> UserError:
    reason = first_line(error)
    if is_full_disk(error):
        return UserError(
            f"{store.uri}: not enough memory or disk space to read the published runs ({reason}); "
            "free some, or set TMPDIR to a folder with more space"
        )
    fix = "restore it"
    if _REFUSED.search(reason):
        fix = "check the credentials and permissions"
    elif _MAY_PASS.search(reason):
        fix = "try again; check the network and permissions"
    return UserError(
        f"{store.uri}: a file that a commit record names cannot be read ({reason}); {fix}"
    )


def runs(results_uri: str) -> pa.Table:
    """The published runs, oldest first. Raises `UserError` if there are none."""
    return _runs_table(_committed(open_store(results_uri)))


def _committed(store: Store) -> list[dict[str, Any]]:
    records = read_runs(store)
    if not records:
        raise UserError(
            f"{store.uri}: no published run there; give the --output of `lungopacity screen`"
        )
    return records


def _runs_table(runs: Iterable[dict[str, Any]]) -> pa.Table:
    """Commit records as a table, one row per run."""
    rows = []
    for run in runs:
        row = {name: run.get(name) for name in _RUNS_SCHEMA.names}
        row |= {name: run["counts"].get(name, 0) for name in ("ok", "rejected", "failed")}
        row |= {name: datetime.fromisoformat(run[name]) for name in ("started_at", "finished_at")}
        rows.append({**row, "record": json.dumps(run, sort_keys=True)})
    return pa.Table.from_pylist(rows, schema=_RUNS_SCHEMA)


def run_places(runs: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row per run: `run_id`, `place` (its index in `runs`, which are ordered as by `read_runs`)
    and `positive_class` (the class that the run's decisions are about)."""
    return pa.table(
        {
            "run_id": pa.array([run["run_id"] for run in runs], pa.string()),
            "place": pa.array(range(len(runs)), pa.int32()),
            "positive_class": pa.array([run["positive_class"] for run in runs], pa.string()),
        }
    )


def predictions_of(store: Store, runs: Sequence[Mapping[str, Any]]) -> pa.dataset.Dataset:
    """The rows of these runs, with the column `screened_on`. Damaged pages raise when read."""
    # Models with other classes have other columns; a row has nulls in the columns of other models.
    schema = pa.unify_schemas([predictions_schema(run["class_names"]) for run in (*runs, _NO_RUN)])
    files = [file["key"] for run in runs for file in run["files"]]
    partition = pa.field("screened_on", pa.date32())
    return _dataset(store, files, schema.append(partition), partitioned_by=pa.schema([partition]))


def _metrics(store: Store, runs: Sequence[dict[str, Any]]) -> pa.dataset.Dataset:
    return _dataset(store, [run["metrics_file"]["key"] for run in runs], METRICS_SCHEMA)


def _dataset(
    store: Store, keys: list[str], schema: pa.Schema, partitioned_by: pa.Schema | None = None
) -> pa.dataset.Dataset:
    # Imports pandas, which takes longer than all that screening needs before Ray starts.
    import pyarrow.dataset as ds

    filesystem, root = store.arrow_filesystem()
    if not keys:
        return ds.dataset(schema.empty_table())
    partitioning = ds.HivePartitioning(partitioned_by) if partitioned_by is not None else None
    return ds.dataset(
        [f"{root}/{key}" for key in keys],
        schema=schema,
        format=ds.ParquetFileFormat(
            default_fragment_scan_options=ds.ParquetFragmentScanOptions(
                page_checksum_verification=True
            )
        ),
        filesystem=filesystem,
        partitioning=partitioning,
        partition_base_dir=root,
    )
