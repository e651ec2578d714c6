"""What a night reports: log lines, the summaries of its runs, and `status.json`."""

from __future__ import annotations

import hashlib
import signal
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lungopacity
from lungopacity import observe, progress
from lungopacity.archive.inventory import list_archive
from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.evaluation.metrics import Metric
from lungopacity.models import OperatingPoint, load_model, save_operating_point
from lungopacity.results.query import query
from lungopacity.runtime import head_watch, signals
from lungopacity.screening import nightly, screen
from lungopacity.screening.plan import unfinished_runs
from lungopacity.screening.report import night_summary, summary
from lungopacity.storage import LocalStore
from lungopacity.storage.lease import Lease


def test_one_object_is_not_called_objects():
    night = nightly.Night("results", (), planned=1)
    assert night_summary(night).startswith("a night would screen 1 object; ")


def test_every_long_stage_of_a_night_is_logged(place, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "_QUICK_S", 0.0)
    place.night()
    place.night()
    stages = [
        "Listing the archive: 4 objects", "leaving out the objects that 1 published run screened\n",
        "collecting its rows and publishing them", "Collecting: 1 of 1 files",
        "Publishing: 4 of 4 images", "Removing its work: 3 of 3 files",
    ]  # fmt: skip
    assert [stage for stage in stages if stage not in caplog.text] == []


def test_films_under_review_are_reported_wherever_positive_ones_are(place):
    model = load_model(place.model)
    save_operating_point(place.model, model, "our-site", OperatingPoint(0.9, review_from=0.5))
    place.decisions = {"Adams.png": "review", "Baker.png": "review", "Clark.png": "negative"}
    (run,) = place.night(operating_point="our-site").runs
    assert "positive  1 at operating point our-site\n  review    2, between its two" in summary(run)
    assert (place.status()["positive"], place.status()["review"]) == (1, 2)
    told = query(place.results, "SELECT positive, review FROM runs").to_pylist()
    assert told == [{"positive": 1, "review": 2}]


def test_a_night_that_rejects_everything_is_reported(place):
    place.failing = {item.key: "wrong_body_part" for item in place.archive.list()}
    (run,) = place.night().runs
    assert (run.rejected, run.exit_code) == (4, 1)
    assert "NOTHING   was scored: every image was rejected" in summary(run)
    assert (place.status()["exit_code"], place.status()["nothing_scored"]) == (1, [run.run_id])
    # A night that has nothing to do has missed nothing.
    assert place.night().exit_code == 0
    assert place.status()["nothing_scored"] == []


def test_a_failed_night_reports_what_it_had_published(place, tmp_path):
    place.killed()
    with pytest.raises(UserError, match="no list lies there"):
        place.night(inventory=str(tmp_path / "none.parquet"))
    told = place.status()
    assert (told["state"], told["exit_code"]) == ("failed", 2)
    assert "no list lies there" in told["message"]
    assert (told["runs"], told["images"]) == (["killed"], 4)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "ended by Ctrl-C; the next night continues"),
        (SystemExit(143), 143, "ended by SIGTERM; the next night continues"),
        # Its own 1, or none, would pass for a night that is done.
        (SystemExit(1), 2, "Ray ended this command (exit code 1); the next night continues"),
        (SystemExit(None), 2, "Ray ended this command (exit code None); the next night continues"),
        (
            ImageError(ErrorCode.TIMEOUT, Stage.FETCH, "no answer"),
            2,
            "the storage failed: no answer; try again",
        ),
        (ZeroDivisionError("of Adams"), 2, "unforeseen ZeroDivisionError; see the job's log"),
    ],
)
def test_an_ended_night_reports_what_ended_it(place, monkeypatch, error, code, message):
    def ended(*_, **__):
        raise error

    monkeypatch.setattr(screen, "_run_pipeline", ended)
    with pytest.raises(type(error)):
        place.night()
    told = place.status()
    assert (told["state"], told["exit_code"], told["message"]) == ("failed", code, message)


def test_a_night_that_ray_ends_because_of_a_sigterm_reports_the_sigterm(place, monkeypatch):
    def ended(*_, **__):
        signals._here.told_by = signal.SIGTERM
        raise SystemExit(1)

    monkeypatch.setattr(signals._here, "told_by", None)
    monkeypatch.setattr(screen, "_run_pipeline", ended)
    with pytest.raises(SystemExit):
        place.night()
    assert place.status()["exit_code"] == 143


def test_the_status_names_nobody_where_names_are_hashed(place, hidden, tmp_path):
    listed = pa.concat_tables(list_archive(place.archive.uri).tables).to_pylist()
    listed[0]["source_etag"] = None
    pq.write_table(pa.Table.from_pylist(listed), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"has no e_tag for 'Adams\.png'"):
        place.night(**hidden, inventory=str(tmp_path / "list.parquet"))
    told = place.status()
    assert (told["exit_code"], told["message"]) == (2, "stopped; the job's log says why")


def test_a_night_that_may_not_remove_its_work_is_published_all_the_same(place, monkeypatch, caplog):
    delete = LocalStore.delete

    def refusing(store, key):
        if key.startswith("_work/"):
            raise UserError(f"{key} cannot be deleted: access denied")
        delete(store, key)

    monkeypatch.setattr(LocalStore, "delete", refusing)
    (run,) = place.night().runs
    assert (run.images, run.exit_code) == (4, 0)
    told = place.status()
    assert (told["state"], told["runs"], told["positive"]) == ("finished", [run.run_id], 4)
    assert "the run is published, but its work files could not be removed (_work/" in caplog.text
    assert place.night().runs[0].images == 0
    # Withdrawn, it does not come back with the rows that it was withdrawn for.
    place.store.delete(f"runs/{run.run_id}.json")
    assert unfinished_runs(place.store) == []
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    with pytest.raises(
        UserError, match=r"was published before, and its work files are still in .*_work/"
    ):
        lungopacity.screen(place.archive.uri, place.model, place.results, run_id=run.run_id)
    (anew,) = place.night().runs
    assert (anew.run_id != run.run_id, anew.images) == (True, 4)


def test_a_night_that_is_ended_while_its_work_is_removed_reports_its_run(
    place, monkeypatch, caplog
):
    delete = LocalStore.delete

    def ending(store, key):
        if key.startswith("_work/") and not key.endswith("run.json"):
            raise SystemExit(143)
        delete(store, key)

    monkeypatch.setattr(LocalStore, "delete", ending)
    with pytest.raises(SystemExit):
        place.night()
    told = place.status()
    (published,) = query(place.results, "SELECT run_id FROM runs")["run_id"].to_pylist()
    assert (told["state"], told["runs"], told["positive"]) == ("failed", [published], 4)
    assert f"run {published} is published; `lungopacity clean` removes the rest" in caplog.text
    # Without it, the rest would be taken for work of a new run with this id.
    assert place.store.head(f"_work/{published}/run.json") is not None


def test_a_night_that_ends_with_the_head_of_its_cluster_tells_that_in_the_status(
    place, monkeypatch
):
    told: list[dict] = []

    def screened(_job, plan, todo, **_) -> set[str]:
        head_watch._tell("the head is gone")
        told.append(place.status())
        place.write_parts(plan, todo)
        return set()

    monkeypatch.setattr(screen, "_run_pipeline", screened)
    place.night()
    (status,) = told
    assert [status[name] for name in ("state", "exit_code", "message", "runs")] == [
        "failed", 2, "the head is gone", [],
    ]  # fmt: skip
    head_watch._tell("too late")
    assert place.status()["state"] == "finished"


def _taken_over(place) -> None:
    place.store.write("_lock/nightly.json", b'{"token": "of another"}')
    place.store.write("status.json", b'{"state": "of another"}')


def test_a_night_that_lost_its_lease_leaves_the_status_to_the_other(place, monkeypatch):
    def screened(_job, plan, todo, **_) -> set[str]:
        place.write_parts(plan, todo)
        _taken_over(place)
        return set()

    monkeypatch.setattr(screen, "_run_pipeline", screened)
    with pytest.raises(UserError, match=r"the lease 'nightly' was lost \(.*\); nothing was publ"):
        place.night()
    assert place.status() == {"state": "of another"}


def test_a_night_that_lost_its_lease_stops_at_once_and_reports_its_runs(place, monkeypatch):
    place.killed()
    place.archive.write("Evans.png", b"new")
    monkeypatch.setattr(nightly, "Lease", partial(Lease, seconds=0.5))
    monkeypatch.setattr(observe, "gauge", lambda *_: None)

    def screening(*_, landed, **__) -> set[str]:
        _taken_over(place)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            landed.add(Counter({"objects": 0}))
            time.sleep(0.01)
        pytest.fail("nobody ended it")

    monkeypatch.setattr(screen, "_run_pipeline", screening)
    with pytest.raises(UserError, match=r"taken it over\); only killed was published; the next"):
        place.night()


@pytest.mark.parametrize(
    ("labels", "told", "warning"),
    [
        ("Adams.png,Normal\nBaker.png,Edema\nEvans.png,Normal", (2, 1), ""),
        ("films/Adams.png,Normal", (0, 0),
         "the labels name 'films/Adams.png', an image is 'Adams.png'"),
        ("Adams.png,pneumonia", (1, 0),
         "one label is 'pneumonia', the model knows Normal, Lung_Opacity"),
        ("Adams.png,Normal\nDavis.png,Normal", (2, 2), "calibrated on 1 of the labelled films"),
    ],
)  # fmt: skip
def test_labels_that_match_nothing_or_measure_nothing_are_reported(
    place, tmp_path, caplog, labels, told, warning
):
    (tmp_path / "labels.csv").write_text(f"image,label\n{labels}\n")
    (run,) = place.night(labels=str(tmp_path / "labels.csv")).runs
    assert (run.labelled, run.of_classes) == told
    line = f"labels    match {told[0]} of 4 images, {told[1]} with one of the model's classes"
    known = "Davis" in labels
    line += "; 1 that it was trained or selected on are left out" if known else ""
    unmatched = len(labels.splitlines()) - told[0]
    line += f"; labels that match none: {unmatched}" if unmatched else ""
    assert f"{line}\n" in summary(run)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(warning)
    assert all(warning in line for line in warned)


def test_labelled_films_without_a_score_are_told_beside_the_accuracy(place, tmp_path):
    place.failing = {"Adams.png": "poor_quality", "Clark.png": "truncated"}
    named = "".join(f"{name}.png,Lung_Opacity\n" for name in ("Adams", "Baker", "Clark", "Davis"))
    (tmp_path / "labels.csv").write_text(f"image,label\n{named}")
    (run,) = place.night(labels=str(tmp_path / "labels.csv")).runs
    told = summary(run)
    assert "4 with one of the model's classes; 2 of these have no score; 1 that it was" in told
    assert "  accuracy  1.0000 against the labels of 1 film\n" in told
    several = Metric("all", "films_of_several_images", None, 3, None, None, 4)
    told = summary(replace(run, metrics=[several, *run.metrics]))
    assert "; 3 in files of several images, any of which the label may mean, are left out" in told


@pytest.mark.parametrize("point", ["our-site", None])
def test_films_that_the_point_in_use_was_picked_on_are_reported(place, tmp_path, caplog, point):
    digest = hashlib.sha256(b"Adams.png").hexdigest()
    model = load_model(place.model)
    save_operating_point(place.model, model, "our-site", OperatingPoint(0.5), [digest])
    (tmp_path / "labels.csv").write_text("image,label\nAdams.png,Normal\nBaker.png,Normal\n")
    (run,) = place.night(labels=str(tmp_path / "labels.csv"), operating_point=point).runs
    assert run.picked_on == (point is not None)
    told = "operating point our-site was picked on 1 of these films: judge its decisions on other"
    assert (told in summary(run)) == (point is not None)
    warning = "operating point our-site was picked on 1 of the films in the metrics against"
    assert (warning in caplog.text) == (point is not None)


def test_the_warning_of_labels_names_nobody_where_names_are_hashed(place, hidden, tmp_path, caplog):
    for folder in ("x", "y"):
        place.archive.write(f"{folder}/Doe_Jane.png", b"x")
    (tmp_path / "labels.csv").write_text("image,label\nDoe_John.png,Normal\nDoe_Jane.png,Normal\n")
    place.night(**hidden, labels=str(tmp_path / "labels.csv"))
    assert "match none of 6 images" in caplog.text
    assert "1 matches between labels and images are ambiguous: these images get no" in caplog.text
    assert "Doe" not in caplog.text
    assert "Adams" not in caplog.text


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_unreadable_predictions_are_reported_with_what_to_do(place, damage):
    run = place.night().runs[0]
    (key,) = [item.key for item in place.store.list("predictions/")]
    if damage == "gone":
        place.store.delete(key)
    else:
        place.store.write(key, b"PAR1 no more")
    told = "a file that a commit record names cannot be read"
    for asked in (
        lambda: place.night(baseline=run.run_id),
        lambda: place.night(),
        lambda: lungopacity.retry(place.results, run.run_id),
        lambda: query(place.results, "SELECT count(image) FROM predictions"),
    ):
        with pytest.raises(UserError, match=told):
            asked()


def test_a_status_that_cannot_be_written_costs_no_night(place, monkeypatch, caplog):
    write = LocalStore.write

    def failing(store, key, data, **conditions):
        if key == "status.json":
            raise UserError("no space")
        write(store, key, data, **conditions)

    monkeypatch.setattr(LocalStore, "write", failing)
    night = place.night()
    assert night.runs[0].images == 4
    assert "status.json could not be written: no space" in caplog.text
    # Who reads that file is told of no night, so the exit code tells that.
    assert (night.runs[0].exit_code, night.exit_code) == (0, 1)
