"""Names of the files in a results folder, and the order of its runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lungopacity.results import folder
from lungopacity.storage import open_store
from tests.results.records import commit_run_without_rows, record_of

RUN = "20260101T000000Z-01234567-89abcdef"
HEX = "0123456789abcdef"
WRITTEN = [
    (folder.predictions_key("2026-01-01", RUN, HEX[:8], 3), folder.PREDICTIONS_FILE),
    (folder.metrics_key(RUN, HEX[:8]), folder.METRICS_FILE),
    (folder.explanation_key(RUN, HEX * 4, None), folder.PICTURE_FILE),
    (folder.explanation_key(RUN, HEX * 4, 2), folder.PICTURE_FILE),
    (folder.start_key(RUN), folder.WORK_FILE),
    (folder.plan_key(RUN, folder.plan_name(1, Path(__file__))), folder.WORK_FILE),
    (folder.part_key(folder.attempt_prefix(RUN), b"rows"), folder.WORK_FILE),
]


NAMES = ("predictions", "metrics", "picture", "picture of a frame", "start", "plan", "part")
"""Of the tests: keys are drawn anew in each process."""


@pytest.mark.parametrize(("key", "pattern"), WRITTEN, ids=NAMES)
def test_what_is_written_is_known_by_its_name(key, pattern):
    assert re.fullmatch(pattern, key)[1] == RUN
    for above in ("", "a/results/"):
        assert re.search(folder.RESULTS_FILE, f"{above}{key}")
    assert not re.search(folder.RESULTS_FILE, f"x{key}")
    assert [other for _, other in WRITTEN if re.fullmatch(other, key)] == [
        other for _, other in WRITTEN if other == pattern
    ]


def test_a_record_of_a_run_that_was_named_by_hand_may_be_a_film():
    assert re.search(folder.RESULTS_FILE, folder.run_key(RUN))
    assert not re.search(folder.RESULTS_FILE, folder.run_key("mine"))


def test_a_run_is_numbered_after_the_last_check_before_it_is_published(tmp_path):
    """A run that is published while the files of this one are looked up comes before it."""
    store = open_store(str(tmp_path))
    store.write("metrics/slow.parquet", b"x")
    folder.commit_run(
        store,
        "slow",
        record_of("slow", started_at="2025-01-01T00:00:00+00:00"),
        lambda: commit_run_without_rows(str(tmp_path), "quick"),
    )
    assert [(run["run_id"], run["sequence"]) for run in folder.read_runs(store)] == [
        ("quick", 1),
        ("slow", 2),
    ]
