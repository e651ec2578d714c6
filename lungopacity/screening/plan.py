"""What a run has to screen, kept under `_work/` so that a killed run can go on where it stopped."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.inventory import Archive
from lungopacity.errors import UserError
from lungopacity.results.folder import check_run_id, read_run, work_prefix
from lungopacity.storage import Store


@dataclass(frozen=True)
class RunStart:
    """What a run was started with; a later attempt under the same id must be given the same."""

    run_id: str
    model_id: str
    archive: str
    started_at: str
    """ISO 8601, UTC. Its date is the run's partition, also when the run ends after midnight."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """What is scored and what is rejected, and the fingerprint of the key for names."""

    @property
    def screened_on(self) -> str:
        return self.started_at[:10]


@dataclass(frozen=True)
class Plan:
    """A run and its objects."""

    start: RunStart
    objects: pa.Table
    """`PLAN_SCHEMA`, sorted by `image`."""
    resumed: bool

    @property
    def work(self) -> str:
        """Key prefix of everything that the run writes before it is published."""
        return work_prefix(self.start.run_id)


def new_run_id(model_id: str) -> str:
    """Sorts by time; two runs never share one."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model_id[:8]}-{uuid.uuid4().hex[:4]}"


def make_plan(
    results: Store,
    archive: Archive,
    model_id: str,
    run_id: str,
    limit: int | None = None,
    rules: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan the run, or take up the plan of an attempt under this id that was not published.

    `limit`: only the first so many objects, by key. Raises `UserError` where the run is published
    already, or was started with another archive, model or other `rules`.
    """
    check_run_id(run_id)
    if read_run(results, run_id) is not None:
        raise UserError(
            f"run '{run_id}' is published already in {results.uri}; choose another --run-id"
        )
    work = work_prefix(run_id)
    if results.head(f"{work}run.json") is not None:
        return _taken_up(results, archive, model_id, run_id, rules or {})
    start = RunStart(
        run_id=run_id,
        model_id=model_id,
        archive=archive.uri,
        started_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        rules=dict(rules or {}),
    )
    objects = archive.objects if limit is None else archive.objects.slice(0, limit)
    results.write(f"{work}plan.parquet", parquet_bytes(objects))
    results.write(f"{work}run.json", json.dumps(asdict(start)).encode())
    return Plan(start=start, objects=objects, resumed=False)


def _taken_up(
    results: Store, archive: Archive, model_id: str, run_id: str, rules: Mapping[str, Any]
) -> Plan:
    work = work_prefix(run_id)
    start = RunStart(**json.loads(results.read(f"{work}run.json")))
    for name, then, now in (
        ("archive", start.archive, archive.uri),
        ("model", start.model_id, model_id),
        *((name, start.rules.get(name), value) for name, value in rules.items()),
    ):
        if then != now:
            raise UserError(
                f"run '{run_id}' was begun with {name} {then}, not {now}; "
                "give the same, or choose another --run-id"
            )
    objects = pq.read_table(pa.BufferReader(results.read(f"{work}plan.parquet")))
    return Plan(start=start, objects=objects, resumed=True)


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as one Parquet file, zstd."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
