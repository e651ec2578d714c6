"""SQL over committed runs: the views `predictions`, `latest`, `metrics` and `runs`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.dataset

from lungopacity.errors import UserError, first_line
from lungopacity.results.folder import read_runs
from lungopacity.results.schema import METRICS_SCHEMA, predictions_schema
from lungopacity.results.workbench import is_full_disk
from lungopacity.storage import Store, open_store

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

# All rows of one object come from one run: a shard that could not be opened one night has one row
# then, and the next night a row for each member.
# Models that decide about different classes may have one id: a row tells which class its decision
# is about. `places` lies where SHOW TABLES does not look. `threshold` asks it, too.
_LATEST = """
CREATE SCHEMA internal;
CREATE TABLE internal.places AS SELECT * FROM run_places;
CREATE VIEW latest AS SELECT * EXCLUDE (place) FROM (
    SELECT predictions.*, place, positive_class
    FROM predictions JOIN internal.places USING (run_id)
    QUALIFY place = max(place) OVER (PARTITION BY archive, image, model_id, positive_class)
)"""


def query(results_uri: str, sql: str) -> pa.Table:
    """The answer of DuckDB to `sql`. No other file or network is within its reach.

    Raises `UserError` for SQL that DuckDB refuses, and for a results folder that cannot be read.
    """
    import duckdb

    store = open_store(results_uri)
    records = _committed(store)
    with files_of_runs(store):
        predictions, metrics = predictions_of(store, records), _metrics(store, records)
    with duckdb.connect() as connection:
        connection.register("predictions", predictions)
        connection.register("metrics", metrics)
        connection.register("runs", _runs_table(records))
        connection.register("run_places", run_places(records))
        connection.execute(_LATEST)
        connection.unregister("run_places")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_external_access = false")
        try:
            _check_question([one.type.name for one in connection.extract_statements(sql)])
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            if _OF_A_FILE in str(error):
                raise _unreadable(store, error) from error
            raise UserError(f"SQL: {_first_lines(str(error))}") from error


def _check_question(kinds: Sequence[str]) -> None:
    """kinds: of the statements, as DuckDB names them."""
    if kinds == ["MULTI"]:
        raise UserError("SQL: PIVOT needs the values by name, as PIVOT … ON column IN ('a', 'b')")
    if len(kinds) != 1:
        raise UserError(
            f"SQL: {len(kinds)} questions; one is answered at a time, begin with SELECT"
        )
    if kinds != ["SELECT"]:
        raise UserError(f"SQL: {kinds[0]} is not answered; begin with SELECT")


@contextmanager
def files_of_runs(store: Store) -> Iterator[None]:
    """Around the reading of what commit records name.

    Raises `UserError` where a file cannot be read.
    """
    import duckdb

    try:
        yield
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        if isinstance(error, duckdb.Error) and not (
            _OF_A_FILE in str(error) or is_full_disk(error)
        ):
            raise
        raise _unreadable(store, error) from error


_OF_A_FILE = "reading the stream registered"
"""DuckDB's words where Arrow, which reads the files for it, could not."""
_PASSES = re.compile(r"AWS Error (?!NO_SUCH_KEY|RESOURCE_NOT_FOUND)|\[errno (?!2\])", re.IGNORECASE)
"""Arrow's words where the storage did not give a file; of one that is damaged it has others."""


def _unreadable(store: Store, error: Exception) -> UserError:
    told = first_line(error)
    if is_full_disk(error):
        return UserError(
            f"{store.uri}: the published runs cannot be worked through ({told}); free memory and "
            "space, or name a larger folder by TMPDIR"
        )
    mend = "try again; check the network and permissions" if _PASSES.search(told) else "restore it"
    return UserError(
        f"{store.uri}: a file that a commit record names cannot be read ({told}); {mend}"
    )


def runs(results_uri: str) -> pa.Table:
    """The published runs, oldest first. Raises `UserError` where there is none."""
    return _runs_table(_committed(open_store(results_uri)))


def _committed(store: Store) -> list[dict[str, Any]]:
    records = read_runs(store)
    if not records:
        raise UserError(
            f"{store.uri}: no finished run lies there; give the --output of `lungopacity screen`"
        )
    return records


def _runs_table(runs: Iterable[dict[str, Any]]) -> pa.Table:
    """Commit records as a table, one row a run."""
    rows = []
    for run in runs:
        row = {name: run.get(name) for name in _RUNS_SCHEMA.names}
        row |= {name: run["counts"].get(name, 0) for name in ("ok", "rejected", "failed")}
        row |= {name: datetime.fromisoformat(run[name]) for name in ("started_at", "finished_at")}
        rows.append({**row, "record": json.dumps(run, sort_keys=True)})
    return pa.Table.from_pylist(rows, schema=_RUNS_SCHEMA)


def run_places(runs: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`run_id`, `place`, its place in the order of publishing, as `read_runs` gives them, and
    `positive_class`, which the run's decisions are about."""
    return pa.table(
        {
            "run_id": pa.array([run["run_id"] for run in runs], pa.string()),
            "place": pa.array(range(len(runs)), pa.int32()),
            "positive_class": pa.array([run["positive_class"] for run in runs], pa.string()),
        }
    )


def predictions_of(store: Store, runs: Sequence[Mapping[str, Any]]) -> pa.dataset.Dataset:
    """The rows of these runs, with their `screened_on`. Damaged pages raise when they are read."""
    # Models with other classes have other columns; a row has nulls in those of the others.
    schema = pa.unify_schemas([predictions_schema(run["class_names"]) for run in (*runs, _NO_RUN)])
    files = [file["key"] for run in runs for file in run["files"]]
    partition = pa.field("screened_on", pa.date32())
    return _dataset(store, files, schema.append(partition), partitioned_by=pa.schema([partition]))


def _metrics(store: Store, runs: Sequence[dict[str, Any]]) -> pa.dataset.Dataset:
    return _dataset(store, [run["metrics_file"]["key"] for run in runs], METRICS_SCHEMA)


def _dataset(
    store: Store, keys: list[str], schema: pa.Schema, partitioned_by: pa.Schema | None = None
) -> pa.dataset.Dataset:
    filesystem, root = store.arrow_filesystem()
    if not keys:
        return pa.dataset.dataset(schema.empty_table())
    partitioning = (
        pa.dataset.HivePartitioning(partitioned_by) if partitioned_by is not None else None
    )
    return pa.dataset.dataset(
        [f"{root}/{key}" for key in keys],
        schema=schema,
        format=pa.dataset.ParquetFileFormat(
            default_fragment_scan_options=pa.dataset.ParquetFragmentScanOptions(
                page_checksum_verification=True
            )
        ),
        filesystem=filesystem,
        partitioning=partitioning,
        partition_base_dir=root,
    )


def _first_lines(message: str) -> str:
    return " ".join(message.split("\n\n")[0].split())
