"""An archive, a model and results, to screen without Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.inventory import list_archive
from lungopacity.errors import REJECTING
from lungopacity.models.folder import training_films_parquet
from lungopacity.results.folder import part_key
from lungopacity.results.query import query
from lungopacity.results.schema import part_schema
from lungopacity.screening.job import ScreeningJob, screening_job
from lungopacity.screening.nightly import Night, nightly
from lungopacity.screening.plan import Plan, make_plan
from lungopacity.storage import open_store
from lungopacity.storage.parquet import parquet_bytes
from tests.models.tiny import write_tiny_model


class Place:
    """An archive of four objects, a model that was trained on the last, a results folder, and the
    outcome that each object is to have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archive = open_store(str(folder / "archive"))
        for name in ("Adams.png", "Baker.png", "Clark.png", "Davis.png"):
            self.archive.write(name, name.encode())
        self.model = str(folder / "model")
        write_tiny_model(self.model, training_films_parquet([_sha256("Davis.png")]))
        self.results = str(folder / "results")
        self.store = open_store(self.results)
        self.failing: dict[str, str] = {}
        """Error codes by object."""
        self.decisions: dict[str, str] = {}
        """Decisions by object; those that are missing are positive."""

    def night(self, **options) -> Night:
        return nightly(self.archive.uri, self.model, self.results, **options)

    def job(self, **options) -> ScreeningJob:
        return screening_job(self.model, self.results, **options)

    def status(self) -> dict:
        return json.loads(self.store.read("status.json"))

    def screened(self, run_id: str) -> list[str]:
        rows = query(self.results, f"SELECT image FROM predictions WHERE run_id = '{run_id}'")
        return rows["image"].to_pylist()

    def write_parts(
        self, plan: Plan, objects: pa.Table, change: Callable[[pa.Table], pa.Table] | None = None
    ) -> None:
        rows = [
            {**row, "screened_at": datetime.now(UTC), **self._outcome(row["image"])}
            for row in objects.to_pylist()
        ]
        table = pa.Table.from_pylist(rows, schema=part_schema(("Normal", "Lung_Opacity")))
        table = table if change is None else change(table)
        data = parquet_bytes(table)
        self.store.write(part_key(f"{plan.work}attempt=0/", data), data)

    def _outcome(self, image: str) -> dict:
        if code := self.failing.get(image):
            status = "rejected" if code in REJECTING else "failed"
            return {"status": status, "error_code": code}
        return {
            "content_sha256": _sha256(image),
            "status": "ok",
            "p_Normal": 0.25,
            "p_Lung_Opacity": 0.75,
            "decision": self.decisions.get(image, "positive"),
        }

    def killed(
        self,
        run_id: str = "killed",
        archive: str = "",
        change: Callable[[pa.Table], pa.Table] | None = None,
        nightly: bool = True,
        **options,
    ) -> Plan:
        """A night, or another run, that was killed before it published what it had screened."""
        job = self.job(**options)
        with TemporaryDirectory() as folder:
            plan = make_plan(
                job.results, list_archive(archive or self.archive.uri), job.model.model_id, run_id,
                Path(folder), rules=job.rules, nightly=nightly,
            )  # fmt: skip
            for file in plan.files:
                self.write_parts(plan, pq.read_table(file), change)
        return plan


def _sha256(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest()
