"""Commit records of runs that need no results, and a run that has none."""

from __future__ import annotations

from typing import Any

from lungopacity.results.folder import commit_run
from lungopacity.results.schema import METRICS_SCHEMA
from lungopacity.storage import open_store
from lungopacity.storage.parquet import parquet_bytes


def record_of(run_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "model_id": "m",
        "archive": "a",
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T01:00:00+00:00",
        "class_names": ["Normal", "Lung_Opacity"],
        "counts": {"ok": 1},
        "files": [],
        "metrics_file": {"key": f"metrics/{run_id}.parquet"},
        **changes,
    }


def commit_run_without_rows(results: str, run_id: str) -> None:
    """Enough of a results folder for a query."""
    store = open_store(results)
    store.write(f"metrics/{run_id}.parquet", parquet_bytes(METRICS_SCHEMA.empty_table()))
    commit_run(store, run_id, record_of(run_id))
