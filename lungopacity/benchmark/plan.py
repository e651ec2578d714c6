"""What planning a night costs as the archive grows, from an inventory file and a history."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.inventory import list_archive
from lungopacity.archive.inventory_report import read_inventory
from lungopacity.errors import UserError
from lungopacity.models import load_model
from lungopacity.progress import Progress
from lungopacity.results.folder import PREDICTIONS, commit_run
from lungopacity.results.schema import (
    METRICS_SCHEMA,
    PLAN_SCHEMA,
    class_column,
    predictions_schema,
)
from lungopacity.results.workbench import workbench
from lungopacity.runtime import alone
from lungopacity.screening.history import History
from lungopacity.screening.plan import make_plan
from lungopacity.screening.rules import Rules
from lungopacity.storage import open_store
from lungopacity.storage.parquet import PARQUET_OPTIONS, parquet_bytes

CLASSES = ("Normal", "Lung_Opacity")
_RULES = Rules(positive_class=CLASSES[1])
_ROWS_PER_BATCH = 100_000
_ROWS_PER_FILE = 1_000_000
_SCREENED = 0.99
"""Share of the archive that earlier runs have screened. The rest is the night's."""
_WHEN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class PlanCost:
    """One size of archive."""

    keys: int
    """In the inventory."""
    history_rows: int
    """Published predictions that the inventory is compared with."""
    planned: int
    seconds: float
    """From opening the inventory, or listing the archive, to the plan in the results folder."""
    peak_mib: float
    """Largest resident memory of the process that plans."""


def plan_costs(
    sizes: Sequence[int], images: str | None = None, model: str | None = None
) -> list[PlanCost]:
    """Make an inventory and a history of each size, and plan one night over them.

    `images`: URI of an archive to list and plan as a first night instead; the sizes are then
    ignored. `model`: URI of the model to plan for; None: a made-up one. Each plan is made in a
    process of its own, whose memory is measured. Raises `UserError` for a size below 100.
    """
    model_id = "model" if model is None else load_model(model).model_id
    if images is not None:
        return [alone(_measured_archive, images, model_id)]
    if min(sizes, default=0) < 100:
        raise UserError("--keys must be at least 100")
    costs = []
    with Progress("Planning", total=len(sizes), unit="sizes") as progress:
        for keys in sizes:
            with TemporaryDirectory(prefix="lungopacity-") as folder:
                _write_archive(Path(folder), keys, model_id)
                costs.append(alone(_measured, folder, keys, model_id))
            progress.advance(1)
    return costs


def table(costs: Sequence[PlanCost]) -> str:
    """The costs as aligned text; `us a key`: microseconds for each key of the inventory."""
    titles = ("keys", "history", "planned", "seconds", "MiB", "us a key")
    lines = ["{:>12} {:>12} {:>10} {:>9} {:>7} {:>9}".format(*titles)]
    lines += [
        f"{cost.keys:>12,} {cost.history_rows:>12,} {cost.planned:>10,} {cost.seconds:>9.2f} "
        f"{cost.peak_mib:>7.0f} {1e6 * cost.seconds / cost.keys:>9.2f}"
        for cost in costs
    ]
    return "\n".join(lines)


def _measured_archive(images: str, model_id: str) -> PlanCost:
    with TemporaryDirectory(prefix="lungopacity-") as scratch:
        results = open_store(f"{scratch}/results")
        began = time.perf_counter()
        plan = make_plan(
            results, list_archive(images), model_id, "night", Path(scratch), rules=_RULES
        )
        seconds = time.perf_counter() - began
    objects = plan.start.objects
    return PlanCost(objects, 0, objects, seconds, peak_mib_of_process())


def _measured(folder: str, keys: int, model_id: str) -> PlanCost:
    """Runs in a process of its own."""
    archive, results = f"{folder}/archive", open_store(f"{folder}/results")
    began = time.perf_counter()
    inventory = read_inventory(f"{folder}/inventory.parquet", archive)
    history = History.read(results, inventory.uri, model_id, _RULES, None)
    with TemporaryDirectory(prefix="lungopacity-") as scratch:
        plan = make_plan(
            results,
            inventory,
            model_id,
            "night",
            Path(scratch),
            rules=_RULES,
            history=history,
        )
    seconds = time.perf_counter() - began
    return PlanCost(
        keys=keys,
        history_rows=int(keys * _SCREENED),
        planned=plan.start.objects,
        seconds=seconds,
        peak_mib=peak_mib_of_process(),
    )


def peak_mib_of_process() -> float:
    """Largest resident memory so far."""
    # Not getrusage, whose maximum is inherited from the process that started this one.
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return int(line.split()[1]) / 1024


def _write_archive(folder: Path, keys: int, model_id: str) -> None:
    """An inventory of this many keys, and one published run over all but the last hundredth."""
    with pq.ParquetWriter(folder / "inventory.parquet", _INVENTORY, **PARQUET_OPTIONS) as writer:
        for objects in archive_objects(0, keys):
            writer.write_table(objects.select(_INVENTORY.names))
    schema = predictions_schema(CLASSES)
    files = []
    results = folder / "results"
    (results / PREDICTIONS).mkdir(parents=True)
    screened = int(keys * _SCREENED)
    for number, start in enumerate(range(0, screened, _ROWS_PER_FILE)):
        key = f"{PREDICTIONS}/screened_on=2026-01-01/first-{number:05d}.parquet"
        (results / key).parent.mkdir(exist_ok=True)
        rows = min(_ROWS_PER_FILE, screened - start)
        with pq.ParquetWriter(results / key, schema, **PARQUET_OPTIONS) as writer:
            for objects in archive_objects(start, start + rows):
                writer.write_table(scored_rows(objects, f"{folder}/archive", schema, model_id))
        files.append({"key": key, "rows": rows})
    metrics = "metrics/first.parquet"
    (results / metrics).parent.mkdir()
    (results / metrics).write_bytes(parquet_bytes(METRICS_SCHEMA.empty_table()))
    commit_run(
        open_store(str(results)),
        "first",
        {
            "run_id": "first",
            "model_id": model_id,
            "archive": open_store(f"{folder}/archive").uri,
            "started_at": _WHEN.isoformat(),
            "finished_at": _WHEN.isoformat(),
            "class_names": list(CLASSES),
            "settings": {},
            "counts": {"ok": screened},
            "files": files,
            "metrics_file": {"key": metrics, "rows": 0},
        },
    )


_INVENTORY = pa.schema([field for field in PLAN_SCHEMA if field.name != "is_shard"])


def archive_objects(start: int, stop: int, rows: int = _ROWS_PER_BATCH) -> Iterator[pa.Table]:
    """Keys as archives have them: a folder for each study, in no order; etags are MD5 sums."""
    with workbench() as (connection, _):
        for at in range(start, stop, rows):
            end = min(stop, at + rows)
            yield (
                connection.sql(f"""
                    SELECT printf('2026/%08d/%s.dcm', i % 99991, md5(i::VARCHAR)) AS image,
                           md5('content ' || i) AS source_etag,
                           (300000 + i % 50000)::BIGINT AS source_size_bytes,
                           TIMESTAMPTZ '2026-01-01 00:00:00+00' AS source_modified_at
                    FROM range({at}, {end}) numbers(i)""")
                .to_arrow_table()
                .cast(_INVENTORY)
            )


def scored_rows(
    objects: pa.Table, archive: str, schema: pa.Schema, model_id: str = "model"
) -> pa.Table:
    """A row of `schema` for each of the objects, with random scores."""
    count = objects.num_rows
    p_N = np.random.default_rng(count).random(count, np.float32)
    known = {name: objects[name] for name in objects.column_names} | {
        name: pa.repeat(pa.scalar(value), count)
        for name, value in (
            ("run_id", "first"),
            ("model_id", model_id),
            ("archive", archive),
            ("format", "dicom"),
            ("status", "ok"),
            ("decision", "negative"),
            ("predicted_label", CLASSES[0]),
            ("screened_at", pa.scalar(_WHEN, pa.timestamp("us", tz="UTC"))),
        )
    }
    etags = objects["source_etag"]
    known["content_sha256"] = pa.compute.binary_join_element_wise(etags, etags, "")
    for number, name in enumerate(CLASSES):
        known[class_column("p", name)] = pa.array(np.abs(number - p_N))
        known[class_column("logit", name)] = pa.array(p_N)
    columns = {field.name: known.get(field.name, pa.nulls(count, field.type)) for field in schema}
    return pa.table(columns).cast(schema)
