"""Names of the files in a results folder, and the order of its runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lungopacity.errors import UserError
from lungopacity.results import folder
from lungopacity.storage import Store, open_store
from tests.results.records import record_of

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


@pytest.mark.parametrize(
    "key", [folder.claim_key(7), folder.claim_key(10**6), "_lock/nightly.json"]
)
def test_a_lock_in_other_results_is_no_film(key):
    assert re.search(folder.RESULTS_FILE, f"a/results/{key}")


def test_a_record_of_a_run_that_was_named_by_hand_may_be_a_film():
    assert re.search(folder.RESULTS_FILE, folder.run_key(RUN))
    assert not re.search(folder.RESULTS_FILE, folder.run_key("mine"))


def _commit(store: Store, run_id: str, before_commit: Callable[[], None] = lambda: None) -> None:
    store.write(f"metrics/{run_id}.parquet", b"x")
    folder.commit_run(store, run_id, record_of(run_id), before_commit)


def _numbers(store: Store) -> dict[str, int]:
    return {run["run_id"]: run["sequence"] for run in folder.read_runs(store)}


def test_a_run_waits_until_the_one_that_is_being_published_is_published(tmp_path):
    store = open_store(str(tmp_path))
    with ThreadPoolExecutor() as threads:

        def checked() -> None:
            second = threads.submit(_commit, store, "second")
            time.sleep(0.2)
            assert not second.done()

        _commit(store, "first", checked)
    assert _numbers(store) == {"first": 1, "second": 2}
    assert not list(store.list("_lock/"))


def test_no_two_runs_have_the_same_number(tmp_path, monkeypatch):
    """Nor if one was published since the other read which number is next."""
    store = open_store(str(tmp_path))
    stale, read_runs = [], folder.read_runs
    monkeypatch.setattr(
        folder, "read_runs", lambda *of, **but: stale.pop() if stale else read_runs(*of, **but)
    )
    for run_id in "abc":
        stale.append([])
        _commit(store, run_id)
    assert _numbers(store) == {"a": 1, "b": 2, "c": 3}
    assert not list(store.list("_lock/"))


def test_a_job_that_was_killed_while_it_published_stops_no_later_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder, "_CLAIM_S", 0.0)
    store = open_store(str(tmp_path))
    store.write(folder.claim_key(1), b"{}")
    _commit(store, "a")
    assert "was to be published before this one has not appeared" in caplog.text
    caplog.clear()
    _commit(store, "b")
    assert (_numbers(store), caplog.text) == ({"a": 2, "b": 3}, "")


def test_a_run_that_is_not_published_keeps_no_number(tmp_path):
    store = open_store(str(tmp_path))

    def refuse() -> None:
        raise UserError("not now")

    with pytest.raises(UserError, match="not now"):
        _commit(store, "refused", refuse)
    _commit(store, "a")
    assert _numbers(store) == {"a": 1}
