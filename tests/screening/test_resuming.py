"""Nights that find unfinished runs of earlier ones."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pyarrow as pa
import pytest

import lungopacity
from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.results.query import query
from lungopacity.screening import publish, screen
from lungopacity.screening.nightly import nightly
from lungopacity.screening.plan import unfinished_runs
from lungopacity.screening.report import night_summary, summary
from lungopacity.storage import LocalStore
from tests.films import tar
from tests.models.tiny import write_tiny_model


def test_a_killed_night_is_finished_first(place, tmp_path):
    place.night()
    began = place.killed(change=_of_synthetic_films).start.started_at
    # What was published since with another model is not of its kind.
    model, place.model = place.model, str(tmp_path / "other")
    write_tiny_model(place.model, seed=7)
    place.night()
    place.model = model
    finished, own = place.night().runs
    assert (finished.run_id, finished.images, own.images) == ("killed", 4, 0)
    assert (finished.synthetic, own.synthetic) == (True, False)
    assert json.loads(place.store.read("runs/killed.json"))["started_at"] == began
    # Its films were screened in seconds that nobody counted.
    assert "images/s" not in summary(finished)
    speeds = query(place.results, "SELECT images_per_s FROM runs WHERE run_id = 'killed'")
    assert speeds.to_pylist() == [{"images_per_s": None}]


def _of_synthetic_films(rows: pa.Table) -> pa.Table:
    place = rows.schema.get_field_index("synthetic")
    return rows.set_column(place, rows.schema.field(place), pa.array([True] * len(rows)))


def test_a_night_does_not_finish_runs_of_other_commands(place):
    """Such a run may be at work, and holds no lease."""
    place.killed(nightly=False)
    (own,) = place.night().runs
    assert own.images == 4
    assert [start.run_id for start in unfinished_runs(place.store)] == ["killed"]


def _cut_off(shard: pa.Table) -> pa.Table:
    """Its first film, and then a storage that does not answer."""
    (row,) = shard.to_pylist()
    row["reading"] = "the only pass"
    film = {**row, "member": "a.png", "member_index": 0}
    rest = {**row, "status": "failed", "error_code": "timeout"}
    return pa.Table.from_pylist([film, rest, {**row, "shard_rows": 2}], schema=shard.schema)


def test_a_killed_night_over_one_shard_is_finished_too(place):
    place.archive.write("x/one.tar", tar({"a.png": b"x"}))
    shard = f"{place.archive.uri}/x/one.tar"
    place.killed(archive=shard, change=_cut_off)
    assert nightly(shard, place.model, place.results, dry_run=True).unfinished == ("killed",)
    # One of its rows may pass, so the night reads it again.
    nights = [nightly(shard, place.model, place.results).runs for _ in range(2)]
    assert [[run.images for run in runs] for runs in nights] == [[2, 1], [0]]


def test_an_unfinished_run_is_not_published_over_newer_rows(place, caplog):
    """Its rows would count as newest, although a later night has read the same objects."""
    place.failing = {"Adams.png": "timeout", "Baker.png": "timeout"}
    place.killed()
    place.failing = {}
    # With other options it cannot be finished.
    (between,) = place.night(explain=True).runs
    assert between.ok == 4
    assert "killed of an earlier night will not be finished" in caplog.text
    assert "screened again: it was started with another explain" in caplog.text
    (own,) = place.night(max_images=1).runs
    assert (own.images, own.exit_code, place.status()["broken"]) == (0, 0, False)
    assert f"screened again: run {between.run_id} was published since then" in caplog.text
    told = query(place.results, "SELECT DISTINCT run_id, status FROM latest").to_pylist()
    assert told == [{"run_id": between.run_id, "status": "ok"}]


def test_a_run_that_another_overtakes_while_a_night_finishes_it_is_not_published(
    place, monkeypatch, caplog
):
    """Its rows of an earlier night would hide those of the other run."""
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    place.failing = {"Adams.png": "timeout"}
    place.killed(change=lambda rows: rows.slice(0, 3))
    place.failing = {}
    pipeline = screen._run_pipeline

    def slowly(job, plan, todo, **options) -> set[str]:
        monkeypatch.setattr(screen, "_run_pipeline", pipeline)
        lungopacity.screen(place.archive.uri, place.model, place.results)
        return pipeline(job, plan, todo, **options)

    monkeypatch.setattr(screen, "_run_pipeline", slowly)
    (own,) = place.night().runs
    assert (own.run_id != "killed", own.images) == (True, 0)
    assert "run killed could not be finished" in caplog.text
    told = query(place.results, "SELECT status, count(*) n FROM latest GROUP BY ALL").to_pylist()
    assert told == [{"status": "ok", "n": 4}]


def test_resuming_a_run_by_hand_warns_of_newer_runs(place, monkeypatch, caplog):
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    place.killed()
    assert "was published after" not in caplog.text
    run = lungopacity.screen(place.archive.uri, place.model, place.results)
    lungopacity.screen(place.archive.uri, place.model, place.results, run_id="killed")
    assert f"run {run.run_id} was published after run killed began" in caplog.text


def test_a_dry_run_counts_the_objects_of_unfinished_runs_at_most(place):
    place.killed()
    assert night_summary(place.night(dry_run=True)).splitlines()[:2] == [
        "a night would first finish the earlier run killed",
        "then screen at most 4 objects; nothing was written (--dry-run)",
    ]


@pytest.mark.parametrize(
    "start", [b'{"files": [], "rules": {}}', b"not json", {"columns": "0123456789abcdef"}]
)
def test_a_run_that_cannot_be_resumed_does_not_stop_the_night(place, start, caplog):
    plan = place.killed(change=lambda rows: rows.drop_columns("ensemble_disagreement"))
    if isinstance(start, dict):
        told = json.loads(place.store.read(f"{plan.work}run.json"))
        start = json.dumps({**told, **start}).encode()
    place.store.write(f"{plan.work}run.json", start)
    (own,) = place.night().runs
    assert (own.images, own.exit_code) == (4, 0)
    assert "_work/killed/run.json is damaged or was written by another version" in caplog.text


def test_what_an_older_version_failed_at_is_not_published_as_a_newer_ones(place, monkeypatch):
    """The newer one may read it, and no later night would try."""
    place.failing = {"Adams.png": "unsupported"}
    with monkeypatch.context() as older:
        older.setattr("lungopacity.screening.plan.versions", lambda: {"lungopacity": "0.0.1"})
        place.killed()
    place.failing = {}
    (own,) = place.night().runs
    assert (own.run_id != "killed", own.ok) == (True, 4)


def test_an_unfinished_run_that_the_storage_does_not_return_now_is_kept(place, monkeypatch):
    plan = place.killed()
    opened = LocalStore.open_local

    def late(store, name, **condition):
        if name == f"{plan.work}run.json":
            raise ImageError(ErrorCode.TIMEOUT, Stage.FETCH, "no answer in time")
        return opened(store, name, **condition)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "open_local", late)
        with pytest.raises(UserError, match=r"no answer in time\); try again"):
            place.night()
    assert place.night().runs[0].run_id == "killed"


@pytest.mark.parametrize("damage", ["a column too few", "a plan", "a defect"])
def test_an_unfinished_run_with_unreadable_files_does_not_stop_the_night(
    place, caplog, monkeypatch, damage
):
    lacking = damage == "a column too few"
    plan = place.killed(
        change=lambda rows: rows.drop_columns("ensemble_disagreement") if lacking else rows
    )
    planned = f"{plan.work}{plan.start.files[0]}.parquet"
    if damage == "a plan":
        # DuckDB alone would take it for a plan of another object.
        place.store.write(planned, place.store.read(planned).replace(b"Adams", b"Bdams"))
    elif damage == "a defect":
        finish_all = publish.Collected.finish

        def failing(collected, **options) -> None:
            if collected.plan.start.run_id == "killed":
                raise RuntimeError
            finish_all(collected, **options)

        monkeypatch.setattr(publish.Collected, "finish", failing)
    (own,) = place.night().runs
    assert own.images == 4
    assert "run killed could not be finished" in caplog.text
    assert (f"/{planned}: is damaged; choose" in caplog.text) == (damage == "a plan")
