"""The bookkeeping of nights, without Ray. Scores do not matter here."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lungopacity
from lungopacity.archive.inventory import list_archive, take_inventory
from lungopacity.errors import UserError
from lungopacity.models import OperatingPoint, load_model, save_operating_point
from lungopacity.results.query import query
from lungopacity.screening import finish, history, screen
from lungopacity.screening.job import screening_job
from lungopacity.screening.pseudonyms import read_key_map, write_key_map
from lungopacity.screening.report import summary
from lungopacity.screening.retry import left_alone
from lungopacity.storage import LocalStore, open_store
from tests.models.tiny import write_tiny_model
from tests.test_readme import RESULTS, rows_of, words_in


def test_a_full_disk_of_the_driver_is_reported_with_what_to_do(place, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"no space left in .*; free some, or set TMPDIR to"):
        place.night()


@pytest.mark.parametrize("listed", [False, True])
def test_results_inside_the_archive_are_not_screened(place, hidden, tmp_path, caplog, listed):
    caplog.set_level("INFO")
    place.results = f"{place.archive.uri}/results"
    place.store = open_store(place.results)
    hidden["key_map"] = f"{place.archive.uri}/names"
    assert place.night(**hidden).runs[0].images == 4
    if listed:
        objects = take_inventory(place.archive.uri).objects
        pq.write_table(objects.drop_columns("is_shard"), tmp_path / "list.parquet")
        hidden["inventory"] = str(tmp_path / "list.parquet")
    (quiet,) = place.night(**hidden).runs
    assert quiet.images == 0
    assert (
        f"objects of {place.archive.uri} are left out, which lie in {place.results}: "
        in caplog.text
    )


def test_other_results_inside_the_archive_are_not_screened(place, caplog):
    """Results of another command, or a copy, in a place that this command does not write to."""
    caplog.set_level("INFO")
    place.night()
    place.killed()
    old = {
        item.key: item.key.replace("attempt=0/", f"attempt={'0' * 32}/")
        for item in place.store.list()
    }
    for key, name in old.items():
        place.archive.write(f"2025/old results/{name}", place.store.read(key))
    place.archive.write(f"2025/old results/explanations/run/{'0' * 64}.png", b"a picture")
    # Names that people give are none of them.
    films = {"predictions/a.png", "metrics/a-1.parquet", "x/runs/a.json", "explanations/run/a.png"}
    for key in films:
        place.archive.write(key, b"a film")
    place.results = str(place.folder / "new results")
    place.store = open_store(place.results)
    (run,) = place.night().runs
    told = films | {"Adams.png", "Baker.png", "Clark.png", "Davis.png"}
    assert set(place.screened(run.run_id)) == told | {"2025/old results/status.json"}
    assert f"7 objects of {place.archive.uri} are left out, which are named like" in caplog.text


def test_results_that_are_the_archive_are_refused(place):
    place.results = place.archive.uri
    before = [item.key for item in place.archive.list()]
    with pytest.raises(UserError, match="results cannot be written to the archive itself"):
        place.night()
    assert [item.key for item in place.archive.list()] == before


def test_a_key_map_is_tried_before_anything_is_screened(place, hidden, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file: is in the way of"):
        place.night(**hidden, key_map=str(tmp_path / "file/map"))
    assert not list(place.store.list("_work/"))
    # A run that was begun may go on with another place for the names.
    place.killed(**hidden, key_map=str(tmp_path / "full"))
    monkeypatch.chdir(tmp_path)
    finished, _ = place.night(**hidden, key_map="keys").runs
    assert finished.run_id == "killed"
    assert len(read_key_map(str(tmp_path / "keys"), "killed")) == 4
    assert not list((tmp_path / "keys").glob(".*"))
    (told,) = query(place.results, "SELECT record FROM runs WHERE run_id = 'killed'").to_pylist()
    assert json.loads(told["record"])["settings"]["key_map"] == str(tmp_path / "keys")


@pytest.mark.parametrize(
    ("results", "key_map", "message"),
    [
        ("results", "results", "lies inside the results"),
        ("results", "./results/names", "lies inside the results"),
        ("s3://bucket", None, "the results take up the whole bucket; give --key-map URI"),
    ],
)
def test_a_key_map_in_a_wrong_place_is_refused(
    place, hidden, tmp_path, monkeypatch, results, key_map, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        screening_job(place.model, results, **hidden, key_map=key_map)


def test_hashed_names_lie_in_the_order_of_their_hashes(place, hidden):
    place.archive.write("Evans.tar", b"x")
    run = place.night(**hidden).runs[0]
    (key,) = [item.key for item in place.store.list("predictions/")]
    rows = pq.read_table(f"{place.results}/{key}")
    hashes = rows["image"].to_pylist()
    assert hashes == sorted(hashes)
    assert len(set(rows["screened_at"].to_pylist())) == 1, "it follows the order of the names"
    names = read_key_map(f"{place.results}-key-map", run.run_id)
    assert sorted(names[hashed] for hashed in hashes) == [
        "Adams.png", "Baker.png", "Clark.png", "Davis.png", "Evans.tar",
    ]  # fmt: skip


def test_a_night_over_one_object_does_not_reveal_its_hashed_name(place, hidden, monkeypatch):
    """Neither after it ends, nor while it works and its lock and status can be read."""
    work, seen = place.write_parts, []

    def write_parts(*arguments):
        seen.extend(place.store.read(key) for key in ("_lock/nightly.json", "status.json"))
        work(*arguments)

    monkeypatch.setattr(place, "write_parts", write_parts)
    one = f"{place.archive.uri}/Adams.png"
    (run,) = lungopacity.nightly(one, place.model, place.results, **hidden).runs
    assert (run.images, place.status()["archive"]) == (1, place.archive.uri)
    assert len(seen) == 2
    assert not any(b"Adams" in told for told in [*seen, place.store.read("status.json")])


def test_an_object_that_is_as_it_once_was_is_screened_again(place):
    """An object restored from a backup: `latest` shows the newer content, not this one."""
    place.night()
    film = place.folder / "archive" / "Adams.png"
    written = film.stat()
    place.archive.write("Adams.png", b"another film")
    assert [place.night().runs[0].images for _ in range(2)] == [1, 0]
    before = query(place.results, "SELECT source_etag FROM latest WHERE image = 'Adams.png'")
    place.archive.write("Adams.png", b"Adams.png")
    os.utime(film, ns=(written.st_atime_ns, written.st_mtime_ns))  # its etag is that of then
    (run,) = place.night().runs
    assert place.screened(run.run_id) == ["Adams.png"]
    after = query(place.results, "SELECT source_etag FROM latest WHERE image = 'Adams.png'")
    assert after.num_rows == before.num_rows == 1
    assert after != before


def test_another_model_screens_everything_anew(place, tmp_path):
    place.night()
    place.model = str(tmp_path / "other")
    write_tiny_model(place.model, seed=7, synthetic=True)
    runs = [place.night().runs[0] for _ in range(2)]
    assert [(run.images, run.synthetic) for run in runs] == [(4, True), (0, True)]
    counted = query(place.results, "SELECT count(*) n, count_if(synthetic) marked FROM latest")
    assert counted.to_pylist() == [{"n": 8, "marked": 4}]


def test_the_same_model_with_another_positive_class_decides_everything_anew(place, tmp_path):
    place.night()
    place.killed()
    place.model = str(tmp_path / "other")
    write_tiny_model(place.model, positive_class="Normal")
    (run,) = place.night().runs
    assert run.images == 4
    counted = query(
        place.results,
        "SELECT l.positive_class AS class, count(DISTINCT l.model_id) m, count(*) n "
        "FROM latest l JOIN runs USING (run_id, positive_class) GROUP BY ALL ORDER BY class",
    )
    assert counted.to_pylist() == [
        {"class": "Lung_Opacity", "m": 1, "n": 4},
        {"class": "Normal", "m": 1, "n": 4},
    ]
    with pytest.raises(UserError, match="was started with positive_class Lung_Opacity, not with"):
        place.killed()
    assert place.night().runs[0].images == 0


def test_decisions_at_another_operating_point_are_counted(place, tmp_path, caplog):
    place.failing |= {"Adams.png": "timeout", "Baker.png": "empty"}
    place.night(max_failed_fraction=1)
    place.model = str(tmp_path / "other")
    write_tiny_model(place.model, operating_point=OperatingPoint(0.2))
    place.failing.clear()
    assert place.night().runs[0].images == 1
    # Not those without a decision, whether they are screened again or not.
    assert "2 objects keep decisions made at another operating point" in caplog.text
    caplog.clear()
    place.night()
    assert "2 objects keep decisions made at another operating point" in caplog.text
    place.failing["Evans.png"] = "timeout"
    place.archive.write("Evans.png", b"new")
    (run,) = place.night().runs
    key = f"runs/{run.run_id}.json"
    record = json.loads(place.store.read(key))
    for setting in ("by_view", "positive_class"):  # which the earliest records lack
        del record["settings"][setting]
    place.store.write(key, json.dumps(record).encode())
    kept = OperatingPoint(0.2)
    for name, then, model in (
        ("threshold", "0.2", {}),
        ("review_from", "None", {"operating_point": replace(kept, review_from=0.1)}),
        ("by_view", "None", {"operating_point": replace(kept, by_view={"PA": kept})}),
        ("positive_class", "Lung_Opacity", {"operating_point": kept, "positive_class": "Normal"}),
    ):
        write_tiny_model(str(tmp_path / name), **model)
        with pytest.raises(UserError, match=f"decided with {name} {then}, but .* now has"):
            lungopacity.retry(place.results, run.run_id, model=str(tmp_path / name))


def test_at_most_so_many_a_night_and_the_next_night_goes_on(place):
    assert place.night(dry_run=True).planned == 4
    assert [place.night(max_images=3).runs[0].images for _ in range(3)] == [3, 1, 0]
    with pytest.raises(UserError, match="--max-images must be at least 1"):
        place.night(max_images=0)


def test_hashed_names_are_known_again_under_the_same_key(place, hidden):
    assert [place.night(**key).runs[0].images for key in ({}, hidden, hidden)] == [4, 4, 0]
    place.archive.write("Evans.png", b"new")
    assert place.night(**hidden).runs[0].images == 1
    # A key alone hides no names of objects, so these are known whatever the key.
    keys = [{"hmac_key": hidden["hmac_key"]}] * 2 + [{}]
    assert [place.night(**key).runs[0].images for key in keys] == [1, 0, 0]


def test_a_night_may_go_by_an_inventory(place, tmp_path):
    listed = pa.concat_tables(list_archive(place.archive.uri).tables)
    pq.write_table(listed.slice(0, 3), tmp_path / "list.parquet")
    assert place.night(inventory=str(tmp_path / "list.parquet")).runs[0].images == 3
    assert place.night().runs[0].images == 1


def test_an_archive_is_one_however_its_uri_is_written(place):
    place.night()
    archive = f"file://{place.archive.uri}/"
    (run,) = lungopacity.nightly(archive, place.model, place.results).runs
    assert run.images == 0
    # As in the run's record: by it a scheduler finds what the night was of.
    assert place.status()["archive"] == place.archive.uri
    # A copy is another: its films are nowhere in the results, though they are the same.
    shutil.copytree(place.archive.uri, place.folder / "copy")
    (run,) = lungopacity.nightly(str(place.folder / "copy"), place.model, place.results).runs
    assert run.images == 4


def test_what_fails_every_night_keeps_nothing_else_waiting(place):
    place.failing = dict.fromkeys(("Adams.png", "Baker.png"), "forbidden")
    nights = [place.night(max_images=2).runs[0].run_id for _ in range(3)]
    assert [place.screened(run_id) for run_id in nights] == [
        ["Adams.png", "Baker.png"],
        ["Clark.png", "Davis.png"],
        ["Adams.png", "Baker.png"],
    ]
    # Of these, too, the one that was tried longest ago comes first.
    (one,) = place.night(max_images=1).runs
    (other,) = place.night(max_images=1).runs
    assert place.screened(one.run_id) + place.screened(other.run_id) == [
        "Adams.png",
        "Baker.png",
    ]


def test_what_another_version_failed_at_is_tried_again_once(place, monkeypatch):
    place.failing = {"Adams.png": "unsupported", "Baker.png": "internal", "Clark.png": "empty"}
    (run,) = place.night(max_failed_fraction=1).runs
    assert place.night().runs[0].images == 0
    assert lungopacity.retry(place.results, run.run_id) is None
    assert left_alone(place.results, run.run_id) == {"unsupported": 1, "internal": 1, "empty": 1}
    for module in (history, finish):
        monkeypatch.setattr(module, "versions", lambda: {"lungopacity": "another"})
    assert left_alone(place.results, run.run_id) == {"empty": 1}
    assert [place.night().runs[0].images for _ in range(2)] == [2, 0]


def test_a_forbidden_object_does_not_stop_a_retry(place, monkeypatch):
    place.failing = {"Adams.png": "forbidden", "Baker.png": "missing"}
    (run,) = place.night(max_failed_fraction=1).runs
    head = LocalStore.head

    def refusing(store, key):
        if key == "Adams.png":
            raise UserError("cannot be read")
        return head(store, key)

    monkeypatch.setattr(LocalStore, "head", refusing)
    monkeypatch.setattr(screen, "done_with_ray", lambda: None)
    del place.failing["Baker.png"]
    again = lungopacity.retry(place.results, run.run_id)
    assert (again.ok, again.failed) == (1, 1)
    with pytest.raises(UserError, match="cannot be read"):
        lungopacity.retry(place.results, again.run_id)


def test_a_key_map_without_a_name_is_reported(place, hidden, tmp_path):
    place.failing = {"Adams.png": "timeout"}
    hidden["key_map"] = str(tmp_path / "names")
    (run,) = place.night(**hidden, max_failed_fraction=1).runs
    write_key_map(hidden["key_map"], run.run_id, {})
    with pytest.raises(UserError, match="1 of the names that the run hashed are missing"):
        lungopacity.retry(place.results, run.run_id, hmac_key=hidden["hmac_key"])


def test_an_object_that_is_never_readable_does_not_make_every_night_broken(place):
    place.failing = {"Adams.png": "forbidden"}
    (first,) = place.night(max_failed_fraction=0.5).runs
    assert (first.failed, first.failed_again, first.exit_code) == (1, 0, 1)
    (quiet,) = place.night(baseline=first.run_id).runs
    # Nor that the archive has drifted: nothing is new.
    assert {shift.name: shift.n for shift in quiet.drift}["status"] == 0
    assert (quiet.images, quiet.failed_again, quiet.broken, quiet.exit_code) == (1, 1, False, 1)
    assert "again     1 of these could not be read before, either" in summary(quiet)
    assert "drift     status: too few images to say (0 images)" in summary(quiet)
    assert (place.status()["failed_again"], place.status()["broken"]) == (1, False)
    # Nor that a device has spoilt all films.
    assert place.status()["nothing_scored"] == []
    assert "NOTHING" not in summary(quiet)
    place.failing["new.png"] = "forbidden"
    place.archive.write("new.png", b"x")
    (night,) = place.night().runs
    assert (night.failed, night.failed_again, night.exit_code) == (2, 1, 2)
    assert place.status()["nothing_scored"] == [night.run_id]
    assert (place.status()["counts"]["failed"], place.status()["failed_again"]) == (2, 1)
    del place.failing["Adams.png"]
    (cured,) = place.night(max_failed_fraction=0.5).runs
    recorded = []
    for run in (first, quiet, night, cured):
        record = json.loads(place.store.read(f"runs/{run.run_id}.json"))
        recorded.append((record["failed_again"], record["broken"]))
    assert recorded == [(0, False), (1, False), (1, True), (1, False)]


def test_a_run_is_retried_from_another_folder_than_its_model_was_named_in(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    place.model, model = "model", place.model
    place.failing["Adams.png"] = "timeout"
    point = OperatingPoint(0.3, review_from=0.1, by_view={"PA": OperatingPoint(0.2)})
    save_operating_point(model, load_model(model), "ours", point)
    (run,) = place.night(
        max_failed_fraction=1.0,
        accept=["lateral_view"],
        reject_quality=["blank"],
        operating_point="ours",
        explain=True,
    ).runs
    record = json.loads(place.store.read(f"runs/{run.run_id}.json"))
    assert record["model"] == model
    monkeypatch.chdir("/")
    monkeypatch.setattr(screen, "done_with_ray", lambda: None)
    (place.folder / "labels.csv").write_text("image,label\nAdams.png,Normal\n")
    again = lungopacity.retry(place.results, run.run_id, labels=str(place.folder / "labels.csv"))
    # What fails again does not make it a broken run.
    assert (again.images, again.labelled, again.exit_code) == (1, 1, 1)
    # Its rows stand beside those of the run: by the same rules.
    told = json.loads(place.store.read(f"runs/{again.run_id}.json"))
    assert told["settings"] == record["settings"]
    assert told["settings"]["by_view"] == {"PA": {"threshold": 0.2, "review_from": None}}


def test_a_run_that_does_not_say_its_model_is_retried_with_one_that_is_given(place):
    place.failing["Adams.png"] = "timeout"
    (run,) = place.night(max_failed_fraction=1.0).runs
    key = f"runs/{run.run_id}.json"
    record = json.loads(place.store.read(key))
    del record["model"]
    place.store.write(key, json.dumps(record).encode())
    with pytest.raises(UserError, match="does not record where its model is; give --model URI"):
        lungopacity.retry(place.results, run.run_id)


def test_every_field_of_a_commit_record_is_documented(place, monkeypatch):
    monkeypatch.setattr(screen, "done_with_ray", lambda: None)
    place.failing["Adams.png"] = "timeout"
    (run,) = place.night(max_failed_fraction=1.0).runs
    place.night(baseline=run.run_id)
    lungopacity.retry(place.results, run.run_id)
    records = query(place.results, "SELECT record FROM runs")["record"].to_pylist()
    told = [name for row in rows_of("in the record", RESULTS) for name in words_in(row[0])]
    assert sorted(told) == sorted({name for record in records for name in json.loads(record)})
