"""Nights over a real archive: what is new, changed or was lost is screened, and nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

import lungopacity
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.screening.job import screening_job
from lungopacity.screening.screen import inventory_at, run_job
from lungopacity.storage import open_store
from lungopacity.storage.lease import Lease
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

on_both = pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def place(request, tmp_path):
    """An archive of six films and a shard, a model, and a place for results; on disk, or on S3
    where a test asks for it."""
    on_s3 = getattr(request, "param", "disk") == "s3"
    store_uri = request.getfixturevalue("s3_uri") if on_s3 else str(tmp_path / "store")
    archive = open_store(f"{store_uri}/archive")
    for number in range(6):
        archive.write(f"{number}.png", encoded(grey_film(number)))
    archive.write("x.tar", tar({f"{n}.png": encoded(grey_film(10 + n)) for n in range(3)}))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    return Place(store_uri, str(tmp_path / "model"))


class Place:
    def __init__(self, uri: str, model: str) -> None:
        self.archive = open_store(f"{uri}/archive")
        self.results = f"{uri}/results"
        self.store = open_store(self.results)
        self.model = model

    def night(self, **options) -> lungopacity.Night:
        return lungopacity.nightly(self.archive.uri, self.model, self.results, **options)

    def asked(self, sql: str) -> list[tuple]:
        rows = lungopacity.query(self.results, sql).to_pylist()
        return [tuple(row.values()) for row in rows]

    def status(self) -> dict:
        return json.loads(self.store.read("status.json"))


@on_both
def test_each_night_screens_what_is_new_or_changed_and_nothing_else(place):
    first = place.night()
    assert [(run.images, run.ok) for run in first.runs] == [(9, 9)]
    assert place.status()["state"] == "finished"
    assert place.status()["images"] == 9
    quiet = place.night()
    assert (quiet.runs[0].images, quiet.exit_code) == (0, 0)
    place.archive.write("new.png", encoded(grey_film(40)))
    place.archive.write("1.png", encoded(grey_film(41)))
    place.archive.write("x.tar", tar({f"{n}.png": encoded(grey_film(50 + n)) for n in range(4)}))
    assert place.night().runs[0].images == 6
    assert place.night().runs[0].images == 0
    # Each object once and as it is now; the runs of no images are runs all the same.
    assert place.asked("SELECT count(*), count(DISTINCT (image, member)) FROM latest") == [(11, 11)]
    assert place.asked("SELECT images FROM runs ORDER BY started_at") == [(9,), (0,), (6,), (0,)]
    assert place.asked("SELECT count(*) FROM metrics WHERE metric = 'images'") == [(4,)]
    assert not list(place.store.list("_work/"))
    assert not list(place.store.list("_lock/"))


def test_what_the_storage_failed_to_give_is_tried_again_every_night_and_the_broken_is_not(place):
    place.archive.write("broken.png", b"\x89PNG\r\n\x1a\n")
    listed = inventory_at(place.archive.uri)
    tables = list(listed.tables)
    place.archive.write("2.png", encoded(grey_film(60)))  # changed since it was listed
    place.archive.delete("3.png")  # missing
    job = screening_job(place.model, place.results, max_failed_fraction=1.0)
    run_job(job, type(listed)(listed.uri, iter(tables)), 0.0)
    assert place.asked("SELECT error_code FROM predictions ORDER BY image") == [
        (None,), (None,), ("changed",), ("missing",), (None,), (None,), ("corrupt_image",),
        (None,), (None,), (None,),
    ]  # fmt: skip
    place.archive.write("3.png", encoded(grey_film(3)))
    night = place.night()
    assert (night.runs[0].images, night.runs[0].ok, night.exit_code) == (2, 2, 0)


def test_films_that_other_rules_rejected_are_screened_again(place):
    place.archive.write("white.png", encoded(grey_film(0) * 0 + 255))
    assert place.night().runs[0].rejected == 1
    assert place.night().runs[0].images == 0
    again = place.night(reject_quality=())
    assert [(run.images, run.ok) for run in again.runs] == [(1, 1)]


def test_a_dry_run_writes_nothing(place, capfd):
    arguments = ["nightly", "--archive", place.archive.uri, "--model", place.model]
    assert main([*arguments, "--results", place.results, "--dry-run"]) == 0
    assert "a night would screen 7 objects; nothing was written" in capfd.readouterr().out
    assert not list(place.store.list())


def test_a_second_night_at_the_same_time_leaves_and_says_why(place, capfd):
    arguments = ["nightly", "--archive", place.archive.uri, "--model", place.model]
    with Lease(place.store, "nightly", "nightly screening of elsewhere"):
        assert main([*arguments, "--results", place.results]) == 2
    error = capfd.readouterr().err
    assert "another job is at work there: nightly screening of elsewhere" in error
    assert place.store.head("status.json") is None  # of the other night, and not touched


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_night_that_lost_its_lease_publishes_nothing_and_the_next_one_goes_on(place):
    stolen = threading.Event()
    write = type(place.store).write

    def steal(store, key, data, **condition):
        if key.startswith("predictions/") and not stolen.is_set():
            stolen.set()
            write(place.store, "_lock/nightly.json", b'{"token": "of another"}')
        write(store, key, data, **condition)

    type(place.store).write = steal
    try:
        with pytest.raises(UserError, match="the lease 'nightly' was lost"):
            place.night()
    finally:
        type(place.store).write = write
    assert not list(place.store.list("runs/"))
    assert place.status()["state"] == "running"  # of whoever holds the lease now
    place.store.delete("_lock/nightly.json")
    finished, own = place.night().runs
    assert (finished.images, own.images) == (9, 0)
    assert place.asked("SELECT count(*) FROM predictions") == [(9,)]


def test_drift_is_told_against_a_frozen_run(place, capfd):
    baseline = place.night().runs[0].run_id
    place.archive.write("new.png", encoded(grey_film(40)))
    arguments = ["nightly", "--archive", place.archive.uri, "--model", place.model]
    assert main([*arguments, "--results", place.results, "--baseline", baseline]) == 0
    assert "drift     score: too few images to say" in capfd.readouterr().out
    (told,) = place.status()["drift"].values()
    assert {item["of"]: item["verdict"] for item in told}["score"] == "too_few"
    assert place.asked(
        "SELECT count(*) FROM metrics WHERE metric = 'drift_psi' AND class = 'status'"
    ) == [(1,)]
    with pytest.raises(UserError, match="has no published run 'never'"):
        place.night(baseline="never")


def test_a_night_that_is_told_to_end_gives_its_lease_back(place):
    write_tiny_model(place.model, is_compiled=True)
    for number in range(300):
        place.archive.write(f"more/{number}.png", encoded(grey_film(number % 9)))
    night = subprocess.Popen(
        [sys.executable, "-m", "lungopacity.cli", "nightly", "--archive", place.archive.uri,
         "--model", place.model, "--results", place.results],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not [item for item in place.store.list("_work/") if "run.json" in item.key]:
        assert night.poll() is None, night.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(place.store.list("_lock/"))
    night.terminate()
    told = night.communicate(timeout=120)[0]
    assert night.returncode != 0, told
    assert not list(place.store.list("_lock/")), told
    assert place.status()["state"] == "failed"
    finished, own = place.night().runs
    assert (finished.images, own.images) == (309, 0)
