"""The progress line and the gauges of a run while its part files are written."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity import observe, progress
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.screening.landed import Landed


@pytest.mark.parametrize("shards", [1, 0])
def test_gauges_and_progress_cover_all_files_of_a_round(tmp_path, monkeypatch, caplog, shards):
    caplog.set_level("INFO")
    figures: dict[str, float] = {}
    monkeypatch.setattr(observe, "gauge", figures.__setitem__)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for path in files:
        rows = [
            {"image": f"{path.stem}-{n}", "source_etag": "e", "source_size_bytes": 1,
             "source_modified_at": datetime.now(UTC), "is_shard": path in files[:shards] and n == 0}
            for n in range(10)
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), path)
    with Landed(50, files) as landed:
        for _ in files:
            landed.add(Counter({"ok": 11, "failed": 1, "objects": 9}))
    assert figures == {"objects_planned": 50, "objects_waiting": 3, "images_done": 36}
    told = caplog.messages[-1]
    # How many images there will be is known only where each object is one.
    assert told.startswith("Screening: 36 images" if shards else "Screening: 36 of 30 images")
    assert told.endswith(", 3 failed, 27 of 30 objects" if shards else ", 3 failed")
