"""Nights without Ray: their bookkeeping. What a film scores does not matter here."""

from __future__ import annotations

import errno
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lungopacity
from lungopacity import progress
from lungopacity.archive.inventory import list_archive, take_inventory
from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.models import OperatingPoint, load_model, save_operating_point
from lungopacity.results.query import query
from lungopacity.screening import finish, history, publish, screen
from lungopacity.screening.job import screening_job
from lungopacity.screening.nightly import nightly
from lungopacity.screening.pseudonyms import read_key_map, write_key_map
from lungopacity.screening.report import summary
from lungopacity.screening.retry import left_alone
from lungopacity.storage import LocalStore, open_store
from tests.films import tar
from tests.models.tiny import write_tiny_model


def test_a_killed_night_is_finished_first(place):
    place.killed()
    finished, own = place.night().runs
    assert (finished.run_id, finished.images, own.images) == ("killed", 4, 0)
    # Its films were screened in seconds that nobody counted.
    assert "images/s" not in summary(finished)
    speeds = query(place.results, "SELECT images_per_s FROM runs WHERE run_id = 'killed'")
    assert speeds.to_pylist() == [{"images_per_s": None}]


def test_a_killed_night_over_one_shard_is_finished_too(place):
    place.archive.write("x/one.tar", tar({"a.png": b"x"}))
    shard = f"{place.archive.uri}/x/one.tar"
    place.killed(archive=shard)
    assert nightly(shard, place.model, place.results, dry_run=True).unfinished == ("killed",)
    assert [run.images for run in nightly(shard, place.model, place.results).runs] == [1, 0]


@pytest.mark.parametrize("start", [b"{}", b"not json", "of another version"])
def test_a_run_of_before_that_cannot_be_taken_up_does_not_stop_the_night(place, start, caplog):
    plan = place.killed(change=lambda rows: rows.drop_columns("ensemble_disagreement"))
    if isinstance(start, str):
        told = json.loads(place.store.read(f"{plan.work}run.json"))
        start = json.dumps({**told, "columns": "0123456789abcdef"}).encode()
    place.store.write(f"{plan.work}run.json", start)
    (own,) = place.night().runs
    assert (own.images, own.exit_code) == (4, 0)
    assert "_work/killed/run.json is damaged or of another version" in caplog.text


def test_a_run_of_before_that_the_storage_does_not_give_at_the_moment_is_kept(place, monkeypatch):
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


@pytest.mark.parametrize(
    "damage", ["no Parquet", "a column too few", "a page", "a plan's page", "a defect"]
)
def test_a_run_of_before_whose_files_cannot_be_read_does_not_stop_the_night(
    place, caplog, monkeypatch, damage
):
    lacking = damage == "a column too few"
    plan = place.killed(
        change=lambda rows: rows.drop_columns("ensemble_disagreement") if lacking else rows
    )
    part, planned = (
        f"{plan.work}attempt=0/part.parquet",
        f"{plan.work}{plan.start.files[0]}.parquet",
    )
    if damage == "no Parquet":
        place.store.write(part, b"PAR1 no more")
    elif damage == "a page":
        place.store.write(part, _with_a_lost_page(place.store.read(part), "decision"))
    elif damage == "a plan's page":
        place.store.write(planned, _with_a_lost_page(place.store.read(planned), "repeated"))
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


def _with_a_lost_page(data: bytes, column: str) -> bytes:
    group = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    places = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    start = places[column].data_page_offset
    return data[:start] + b"\xff" * 40 + data[start + 40 :]


def test_a_full_disk_of_the_driver_is_told_with_the_mend(place, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(
        UserError, match=r"no space left in .*; free some, or name a larger folder by TMPDIR"
    ):
        place.night()


@pytest.mark.parametrize("listed", [False, True])
def test_results_inside_the_archive_are_no_films(place, hidden, tmp_path, caplog, listed):
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
    assert f"objects of {place.archive.uri} are left out, which lie below results/" in caplog.text


def test_results_of_before_inside_the_archive_are_no_films(place, caplog):
    """Of another command, or a copy: they do not lie where this one writes to."""
    caplog.set_level("INFO")
    place.night()
    place.killed()
    old = {item.key: item.key for item in place.store.list()} | {
        "_work/killed/attempt=0/part.parquet": f"_work/killed/attempt={'0' * 32}/part.parquet"
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
    assert f"7 objects of {place.archive.uri} are left out, which bear" in caplog.text


def test_results_that_are_the_archive_are_refused(place):
    place.results = place.archive.uri
    before = [item.key for item in place.archive.list()]
    with pytest.raises(UserError, match="the archive is what is written to, too"):
        place.night()
    assert [item.key for item in place.archive.list()] == before


def test_a_key_map_is_tried_before_anything_is_screened(place, hidden, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
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
        ("s3://bucket", None, "the results take the whole bucket; say with --key-map URI"),
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


def test_an_object_that_is_as_it_once_was_is_screened_again(place):
    """Restored from a backup: what was screened long ago is not what `latest` shows."""
    place.night()
    place.archive.write("Adams.png", b"another film")
    place.night()
    before = query(place.results, "SELECT source_etag FROM latest WHERE image = 'Adams.png'")
    place.archive.write("Adams.png", b"Adams.png")
    (run,) = place.night().runs
    assert place.screened(run.run_id) == ["Adams.png"]
    after = query(place.results, "SELECT source_etag FROM latest WHERE image = 'Adams.png'")
    assert after.num_rows == before.num_rows == 1
    assert after != before


def test_every_long_stage_of_a_night_is_told(place, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "_QUICK_S", 0.0)
    place.night()
    place.night()
    stages = [
        "Listing the archive: 4 objects", "leaving out what 1 published runs have screened",
        "is put together and published", "Collecting: 1 of 1 files",
        "Publishing: 4 of 4 images", "Removing its work: 3 of 3 files",
    ]  # fmt: skip
    assert [stage for stage in stages if stage not in caplog.text] == []


def test_another_model_screens_everything_anew(place, tmp_path):
    place.night()
    place.model = str(tmp_path / "other")
    write_tiny_model(place.model, seed=7)
    assert place.night().runs[0].images == 4
    counted = query(place.results, "SELECT count(DISTINCT model_id) m, count(*) n FROM latest")
    assert counted.to_pylist() == [{"m": 2, "n": 8}]


def test_the_same_model_with_another_positive_class_decides_everything_anew(place, tmp_path):
    place.night()
    place.killed()
    place.model = str(tmp_path / "other")
    write_tiny_model(place.model, positive_class="Normal")
    (run,) = place.night().runs
    assert run.images == 4
    counted = query(place.results, "SELECT count(DISTINCT model_id) m, count(*) n FROM latest")
    assert counted.to_pylist() == [{"m": 1, "n": 8}]
    with pytest.raises(UserError, match="was begun with positive_class Lung_Opacity, not Normal"):
        place.killed()
    assert place.night().runs[0].images == 0


def test_what_another_operating_point_decided_is_counted(place, tmp_path, caplog):
    place.failing["Adams.png"] = "timeout"
    place.night()
    first = place.model
    place.model = str(tmp_path / "other")
    write_tiny_model(place.model, operating_point=OperatingPoint(0.2))
    place.failing.clear()
    assert place.night().runs[0].images == 1
    assert "4 objects were decided at another operating point, and stay so" in caplog.text
    place.night()
    assert "3 objects were decided at another operating point" in caplog.text
    place.failing["Evans.png"] = "timeout"
    place.archive.write("Evans.png", b"new")
    (run,) = place.night().runs
    with pytest.raises(UserError, match=r"decided with threshold 0\.2, .* does with 0\.5"):
        lungopacity.retry(place.results, run.run_id, model=first)


def test_at_most_so_many_a_night_and_the_next_night_goes_on(place):
    assert place.night(dry_run=True).planned == 4
    assert [place.night(max_images=3).runs[0].images for _ in range(3)] == [3, 1, 0]
    with pytest.raises(UserError, match="--max-images must be at least 1"):
        place.night(max_images=0)


def test_hashed_names_are_known_again_under_the_same_key(place, hidden):
    assert [place.night(**hidden).runs[0].images for _ in range(2)] == [4, 0]
    place.archive.write("Evans.png", b"new")
    assert place.night(**hidden).runs[0].images == 1


def test_a_night_may_go_by_an_inventory(place, tmp_path):
    listed = pa.concat_tables(list_archive(place.archive.uri).tables)
    pq.write_table(listed.slice(0, 3), tmp_path / "list.parquet")
    assert place.night(inventory=str(tmp_path / "list.parquet")).runs[0].images == 3
    assert place.night().runs[0].images == 1


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
    place.failing = {"Adams.png": "decoder_crash", "Baker.png": "internal", "Clark.png": "empty"}
    (run,) = place.night(max_failed_fraction=1).runs
    assert place.night().runs[0].images == 0
    assert lungopacity.retry(place.results, run.run_id) is None
    assert left_alone(place.results, run.run_id) == {"decoder_crash": 1, "internal": 1, "empty": 1}
    for module in (history, finish):
        monkeypatch.setattr(module, "versions", lambda: {"lungopacity": "another"})
    assert left_alone(place.results, run.run_id) == {"empty": 1}
    assert [place.night().runs[0].images for _ in range(2)] == [2, 0]


def test_an_object_that_may_not_be_seen_stops_no_retry(place, monkeypatch):
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


def test_a_key_map_that_lacks_a_name_is_told(place, hidden):
    place.failing = {"Adams.png": "timeout"}
    (run,) = place.night(**hidden, max_failed_fraction=1).runs
    write_key_map(f"{place.results}-key-map", run.run_id, {})
    with pytest.raises(UserError, match="lacks 1 of the names that the run hashed"):
        lungopacity.retry(place.results, run.run_id, hmac_key=hidden["hmac_key"])


def test_an_object_that_is_never_given_does_not_call_every_night_broken(place):
    place.failing = {"Adams.png": "forbidden"}
    (first,) = place.night(max_failed_fraction=0.5).runs
    assert (first.failed, first.failed_again, first.exit_code) == (1, 0, 1)
    (quiet,) = place.night(baseline=first.run_id).runs
    # Nor that the archive has drifted: nothing is new.
    assert {shift.name: shift.n for shift in quiet.drift}["status"] == 0
    assert (quiet.images, quiet.failed_again, quiet.broken, quiet.exit_code) == (1, 1, False, 1)
    assert "again     1 of these could not be read before either" in summary(quiet)
    assert (place.status()["failed_again"], place.status()["broken"]) == (1, False)
    place.failing["new.png"] = "forbidden"
    place.archive.write("new.png", b"x")
    (night,) = place.night().runs
    assert (night.failed, night.failed_again, night.exit_code) == (2, 1, 2)


def test_films_that_a_person_is_to_look_at_are_told_wherever_positive_ones_are(place):
    model = load_model(place.model)
    save_operating_point(place.model, model, "our-site", OperatingPoint(0.9, review_from=0.5))
    place.decisions = {"Adams.png": "review", "Baker.png": "review", "Clark.png": "negative"}
    (run,) = place.night(operating_point="our-site").runs
    assert "positive  1 at operating point our-site\n  review    2, between its two" in summary(run)
    assert (place.status()["positive"], place.status()["review"]) == (1, 2)
    told = query(place.results, "SELECT positive, review FROM runs").to_pylist()
    assert told == [{"positive": 1, "review": 2}]


def test_a_night_that_rejects_everything_is_told(place):
    place.failing = {item.key: "wrong_body_part" for item in place.archive.list()}
    (run,) = place.night().runs
    assert (run.rejected, run.exit_code) == (4, 1)
    assert "NOTHING   was scored: every image was rejected" in summary(run)
    assert (place.status()["exit_code"], place.status()["nothing_scored"]) == (1, [run.run_id])
    # A night that has nothing to do has missed nothing.
    assert place.night().exit_code == 0
    assert place.status()["nothing_scored"] == []


def test_a_night_that_fails_tells_what_it_had_published(place, tmp_path):
    place.killed()
    with pytest.raises(UserError, match="the inventory cannot be read"):
        place.night(inventory=str(tmp_path / "none.parquet"))
    told = place.status()
    assert (told["state"], told["exit_code"]) == ("failed", 2)
    assert "the inventory cannot be read" in told["message"]
    assert (told["runs"], told["images"]) == (["killed"], 4)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "ended by Ctrl-C; the next night goes on"),
        (SystemExit(143), 143, "ended by SIGTERM; the next night goes on"),
        (ZeroDivisionError("of Adams"), 2, "unforeseen ZeroDivisionError; the job's log says more"),
    ],
)
def test_a_night_that_is_ended_tells_by_what(place, monkeypatch, error, code, message):
    def ended(*_, **__):
        raise error

    monkeypatch.setattr(screen, "_run_pipeline", ended)
    with pytest.raises(type(error)):
        place.night()
    told = place.status()
    assert (told["state"], told["exit_code"], told["message"]) == ("failed", code, message)


def test_the_status_names_nobody_where_names_are_hashed(place, hidden, tmp_path):
    listed = pa.concat_tables(list_archive(place.archive.uri).tables).to_pylist()
    listed[0]["source_etag"] = None
    pq.write_table(pa.Table.from_pylist(listed), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"has no e_tag of 'Adams\.png'"):
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
    assert "the run is published; its work could not be removed (_work/" in caplog.text
    assert place.night().runs[0].images == 0


def test_a_night_that_lost_its_lease_leaves_the_status_to_the_other(place, monkeypatch):
    def taken_over(_job, plan, todo, **_) -> set[str]:
        place.write_parts(plan, todo)
        place.store.write("_lock/nightly.json", b'{"token": "of another"}')
        place.store.write("status.json", b'{"state": "of another"}')
        return set()

    monkeypatch.setattr(screen, "_run_pipeline", taken_over)
    with pytest.raises(UserError, match="the lease 'nightly' was lost"):
        place.night()
    assert place.status() == {"state": "of another"}


@pytest.mark.parametrize(
    ("labels", "told", "warning"),
    [
        ("Adams.png,Normal\nBaker.png,Edema\nEvans.png,Normal", (2, 1), ""),
        ("films/Adams.png,Normal", (0, 0),
         "match none of 4 images: they name 'films/Adams.png', the images 'Adams.png'"),
        ("Adams.png,pneumonia", (1, 0), "they say 'pneumonia', the model Normal, Lung_Opacity"),
        ("Adams.png,Normal\nDavis.png,Normal", (2, 2), "was chosen by 1 labelled films"),
    ],
)  # fmt: skip
def test_labels_that_match_nothing_or_measure_nothing_are_told(
    place, tmp_path, caplog, labels, told, warning
):
    (tmp_path / "labels.csv").write_text(f"image,label\n{labels}\n")
    (run,) = place.night(labels=str(tmp_path / "labels.csv")).runs
    assert (run.labelled, run.of_classes) == told
    line = f"labels    match {told[0]} of 4 images, {told[1]} with one of the model's classes"
    known = "Davis" in labels
    line += "; 1 that it learnt from or was chosen by are left out" if known else ""
    assert f"{line}\n" in summary(run)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(warning)
    assert all(warning in line for line in warned)


def test_the_warning_of_labels_names_nobody_where_names_are_hashed(place, hidden, tmp_path, caplog):
    (tmp_path / "labels.csv").write_text("image,label\nDoe_John.png,Normal\n")
    place.night(**hidden, labels=str(tmp_path / "labels.csv"))
    assert "match none of 4 images" in caplog.text
    assert "Doe" not in caplog.text
    assert "Adams" not in caplog.text


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_predictions_that_cannot_be_read_are_named_with_the_mend(place, damage):
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
    assert place.night().runs[0].images == 4
    assert "status.json could not be written: no space" in caplog.text


def test_a_run_that_does_not_say_its_model_is_retried_with_one_that_is_given(place):
    place.failing["Adams.png"] = "timeout"
    (run,) = place.night(max_failed_fraction=1.0).runs
    key = f"runs/{run.run_id}.json"
    record = json.loads(place.store.read(key))
    del record["model"]
    place.store.write(key, json.dumps(record).encode())
    with pytest.raises(UserError, match="does not say where its model lies; give --model URI"):
        lungopacity.retry(place.results, run.run_id)
