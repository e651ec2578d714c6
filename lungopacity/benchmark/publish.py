"""What publishing a run costs as the run grows, from part files to the commit record."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from lungopacity.archive.inventory import Inventory
from lungopacity.benchmark.plan import CLASSES, archive_objects, peak_mib_of_process, scored_rows
from lungopacity.errors import UserError
from lungopacity.models import ModelSpec, OperatingPoint
from lungopacity.progress import Progress
from lungopacity.radiograph import Preprocessing
from lungopacity.results.folder import commit_run, part_key
from lungopacity.results.schema import part_schema
from lungopacity.runtime import alone
from lungopacity.screening.aggregate import run_metrics
from lungopacity.screening.parts import ROWS_PER_PART
from lungopacity.screening.plan import Plan, make_plan
from lungopacity.screening.publish import collect, remove_work
from lungopacity.screening.rules import Rules
from lungopacity.storage import open_store
from lungopacity.storage.parquet import parquet_bytes

_SPEC = ModelSpec("classical-cnn", {}, CLASSES, CLASSES[1], Preprocessing(), OperatingPoint(0.5))
_ROWS_PER_JOB = 100 * ROWS_PER_PART


@dataclass(frozen=True)
class PublishCost:
    """One size of run."""

    rows: int
    """Images that are published."""
    part_files: int
    """Part files that the attempts left, of up to 512 rows each."""
    published_mib: float
    """Size of the published Parquet files."""
    collect_seconds: float
    """To fetch the part files and find that nothing is missing."""
    seconds: float
    """For everything: also to sort, write, measure, commit, and remove the part files."""
    peak_mib: float
    """Largest resident memory of the process that publishes."""


def publish_costs(sizes: Sequence[int]) -> list[PublishCost]:
    """Write the part files of a run of each size, and publish it.

    Each run is published in a process of its own, whose memory is measured. Raises `UserError` for
    a size below 100.
    """
    if min(sizes, default=0) < 100:
        raise UserError("--keys must be at least 100")
    costs = []
    with Progress("Publishing", total=len(sizes), unit="sizes") as progress:
        for rows in sizes:
            with TemporaryDirectory(prefix="lungopacity-") as folder:
                _write_parts(folder, rows)
                costs.append(alone(_measured, folder, rows))
            progress.advance(1)
    return costs


def table(costs: Sequence[PublishCost]) -> str:
    """The costs as aligned text; `us a row`: microseconds in all for each row."""
    titles = ("rows", "parts", "MiB out", "collect s", "all s", "MiB", "us a row")
    lines = ["{:>12} {:>8} {:>9} {:>10} {:>9} {:>7} {:>9}".format(*titles)]
    lines += [
        f"{cost.rows:>12,} {cost.part_files:>8,} {cost.published_mib:>9.1f} "
        f"{cost.collect_seconds:>10.2f} {cost.seconds:>9.2f} {cost.peak_mib:>7.0f} "
        f"{1e6 * cost.seconds / cost.rows:>9.2f}"
        for cost in costs
    ]
    return "\n".join(lines)


def _inventory(folder: str, rows: int) -> Inventory:
    def tables() -> Iterator[pa.Table]:
        for objects in archive_objects(0, rows):
            yield objects.append_column("is_shard", pa.repeat(pa.scalar(False), objects.num_rows))

    return Inventory(open_store(f"{folder}/archive").uri, tables())


def _write_parts(folder: str, rows: int) -> None:
    """Write the plan, and the part files that two attempts at it would have left."""
    with TemporaryDirectory(prefix="lungopacity-") as scratch:
        _planned(folder, rows, scratch)
    jobs = [(folder, at, min(rows, at + _ROWS_PER_JOB)) for at in range(0, rows, _ROWS_PER_JOB)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        list(pool.map(_write_some, jobs))


def _planned(folder: str, rows: int, scratch: str) -> Plan:
    """The plan of the one run. A second call takes the same plan up again."""
    results, rules = open_store(f"{folder}/results"), Rules(_SPEC.positive_class)
    inventory = _inventory(folder, rows)
    return make_plan(results, inventory, "model", "first", Path(scratch), rules=rules)


def _write_some(job: tuple[str, int, int]) -> None:
    folder, start, stop = job
    results, schema = open_store(f"{folder}/results"), part_schema(CLASSES)
    archive = open_store(f"{folder}/archive").uri
    for number, objects in enumerate(archive_objects(start, stop, ROWS_PER_PART)):
        data = parquet_bytes(scored_rows(objects, archive, schema))
        results.write(part_key(f"_work/first/attempt={number % 2}/", data), data)


def _measured(folder: str, rows: int) -> PublishCost:
    """Runs in a process of its own."""
    results = open_store(f"{folder}/results")
    with TemporaryDirectory(prefix="lungopacity-") as scratch:
        plan = _planned(folder, rows, scratch)
        parts = sum(1 for _ in results.list(f"{plan.work}attempt="))
        began = time.perf_counter()
        with collect(results, plan, CLASSES) as collected:
            assert not collected.missing(Path(scratch), "left")
            collect_seconds = time.perf_counter() - began
            collected.finish(synthetic_model=False)
            files = collected.write(results, None)
            metrics = run_metrics(collected.connection.table("final"), _SPEC, 1.0)
        record = {"run_id": "first", "files": files, "metrics": len(metrics)}
        commit_run(results, "first", record)
        remove_work(results, plan)
        seconds = time.perf_counter() - began
    sizes = {item.key: item.size_bytes for item in results.list()}
    return PublishCost(
        rows=sum(file["rows"] for file in files),
        part_files=parts,
        published_mib=sum(sizes[file["key"]] for file in files) / 2**20,
        collect_seconds=collect_seconds,
        seconds=seconds,
        peak_mib=peak_mib_of_process(),
    )
