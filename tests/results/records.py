"""Commit records of runs that need no results."""

from __future__ import annotations

from typing import Any


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
