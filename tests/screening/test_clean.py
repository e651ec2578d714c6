import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from lungopacity.cli import main
from lungopacity.errors import NOTICE, UserError
from lungopacity.results.folder import commit_run
from lungopacity.screening.clean import clean
from lungopacity.storage import open_store
from lungopacity.storage.lease import Lease
from lungopacity.storage.scratch import scratch
from tests.results.records import record_of

ATTEMPT = "0123456789abcdef" * 2
PICTURE = f"{'0123456789abcdef' * 4}.png"

KEPT = {
    f"explanations/a/{PICTURE}",
    "explanations/b/notes of a user.png",
    "predictions/screened_on=2026-01-01/a-00001234-00000.parquet",
    "metrics/a-00001234.parquet",
    "runs/a.json",
    "status.json",
    "notes of a user.txt",
    "metrics/notes of a user.csv",
    "metrics/a-00005678.parquet.copy",
    "predictions/exported.parquet",
    "_work/a/notes of a user.txt",
    "photos/.tmp-of-another-program",
}
LEFT = {
    "_work/a/run.json": "work of published runs",
    f"_work/a/attempt={ATTEMPT}/p.parquet": "work of published runs",
    "_work/b/run.json": "work of unfinished runs",
    f"_work/b/attempt={ATTEMPT}/p.parquet": "work of unfinished runs",
    "predictions/screened_on=2026-01-01/a-00005678-00000.parquet": "files of runs that were never "
    "published",
    "metrics/b-00000001.parquet": "files of runs that were never published",
    f"explanations/b/{PICTURE.replace('.', '-3.')}": "files of runs that were never published",
    "explanations/b/.tmp-z": "half-written files",
    "_lock/nightly.json": "locks",
    "_lock/run-000007": "files of runs that were never published",
    "runs/.tmp-x": "half-written files",
    "_work/b/.tmp-y": "work of unfinished runs",
}


@pytest.fixture
def results(store_uri):
    store = open_store(store_uri)
    record = record_of(
        "a",
        files=[{"key": "predictions/screened_on=2026-01-01/a-00001234-00000.parquet"}],
        metrics_file={"key": "metrics/a-00001234.parquet"},
    )
    for key in [*(KEPT - {"runs/a.json"}), *LEFT]:
        store.write(key, b"x")
    commit_run(store, "a", record)
    return store


@pytest.fixture
def hours_later(results, monkeypatch):
    now = type(results).now
    monkeypatch.setattr(type(results), "now", lambda store: now(store) + timedelta(hours=2))


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Not the machine's own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def keys(store) -> set[str]:
    return {item.key for item in store.list()}


@pytest.mark.usefixtures("hours_later")
def test_leftovers_are_removed_and_published_files_stay(results):
    assert clean(results.uri, dry_run=True).files == {"work of published runs": 2}
    rehearsed = clean(results.uri, older_than_days=0, dry_run=True)
    assert keys(results) == KEPT | set(LEFT)
    swept = clean(results.uri, older_than_days=0)
    assert keys(results) == KEPT
    assert swept.files == rehearsed.files
    for kind in set(LEFT.values()):
        assert swept.files[kind] == list(LEFT.values()).count(kind)
    assert swept.size_bytes == len(LEFT)
    assert not clean(results.uri, older_than_days=0).files


def test_what_may_still_be_in_use_is_left_alone(results):
    clean(results.uri)
    assert keys(results) == (KEPT | set(LEFT)) - {
        "_work/a/run.json",
        f"_work/a/attempt={ATTEMPT}/p.parquet",
    }


def test_a_run_is_as_old_as_its_youngest_file(tmp_path):
    store = open_store(str(tmp_path))
    store.write("_work/b/run.json", b"x")
    store.write(f"_work/b/attempt={ATTEMPT}/p.parquet", b"x")
    old = time.time() - 30 * 86400
    os.utime(tmp_path / "_work/b/run.json", (old, old))
    assert not clean(str(tmp_path)).files
    os.utime(tmp_path / f"_work/b/attempt={ATTEMPT}/p.parquet", (old, old))
    assert sum(clean(str(tmp_path)).files.values()) == 2


@pytest.mark.parametrize("store_uri", ["disk"], indirect=True)
def test_a_run_that_writes_pictures_is_at_work(results):
    """Its part files are old: it has met nothing but positive films for a while."""
    root, old = Path(results.uri), time.time() - 30 * 86400
    for path in root.glob("_work/b/**/*"):
        os.utime(path, (old, old))
    assert "work of unfinished runs" not in clean(results.uri, dry_run=True).files
    for path in (*root.glob("explanations/b/*"), root / "metrics/b-00000001.parquet"):
        os.utime(path, (old, old))
    assert clean(results.uri, dry_run=True).files["files of runs that were never published"] == 2


@pytest.mark.usefixtures("hours_later")
def test_the_command_says_what_it_did(results, capfd):
    assert main(["clean", "--results", results.uri, "--older-than", "0", "--dry-run"]) == 0
    assert "12 files, 0.0 MB, would be removed (--dry-run)" in capfd.readouterr().out
    assert main(["clean", "--results", results.uri, "--older-than", "0"]) == 0
    assert "work of unfinished runs: 3" in capfd.readouterr().out
    assert main(["clean", "--results", results.uri]) == 0
    assert "nothing to remove" in capfd.readouterr().out


@pytest.mark.parametrize("days", [-1, float("nan"), float("inf"), 1e9, 1e300])
def test_an_invalid_age_is_refused(tmp_path, days):
    with pytest.raises(UserError, match="--older-than must be from 0 to 36500 days, not"):
        clean(str(tmp_path), older_than_days=days)


@pytest.mark.usefixtures("hours_later")
def test_a_file_that_cannot_be_removed_does_not_keep_the_others(results, monkeypatch):
    delete = type(results).delete

    def refusing(store, key):
        if key.startswith("_work/b/"):
            raise UserError(f"{key}: cannot be deleted: access denied")
        delete(store, key)

    monkeypatch.setattr(type(results), "delete", refusing)
    with pytest.raises(UserError, match=r"3 files could not be removed, .*denied\); 9 others"):
        clean(results.uri, older_than_days=0)
    assert keys(results) == KEPT | {key for key in LEFT if key.startswith("_work/b/")}


def test_without_published_runs_only_work_files_are_removed(store_uri, monkeypatch):
    """A slip in --results: a bucket of somebody else's, with a folder that is named alike."""
    store = open_store(store_uri)
    theirs = {"predictions/screened_on=2026-01-01/x-00000.parquet", "metrics/x.parquet", "a.dcm"}
    for key in [*theirs, "_work/b/run.json"]:
        store.write(key, b"x")
    monkeypatch.setattr("lungopacity.screening.clean._AT_WORK", timedelta(0))
    clean(store.uri, older_than_days=0)
    assert keys(store) == theirs


def test_what_may_be_at_work_is_left_alone_whatever_the_age(results):
    """A run that is being published has written its predictions, and no record names them yet."""
    clean(results.uri, older_than_days=0)
    assert keys(results) == (KEPT | set(LEFT)) - {
        "_work/a/run.json",
        f"_work/a/attempt={ATTEMPT}/p.parquet",
    }


@pytest.mark.parametrize("store_uri", ["disk"], indirect=True)
def test_files_of_a_run_are_left_alone_while_any_of_them_is_young(results):
    root, old = Path(results.uri), time.time() - 2 * 3600
    for key in LEFT:
        os.utime(root / key, (old, old))
    results.write("metrics/b-00000001.parquet", b"just written")
    clean(results.uri, older_than_days=0)
    assert {key for key in keys(results) if key.startswith(("_work/b", "metrics/b"))} == {
        key for key in LEFT if key.startswith(("_work/b", "metrics/b"))
    }


def test_a_run_whose_files_were_swept_is_not_published(tmp_path):
    store = open_store(str(tmp_path))
    record = {"files": [{"key": "predictions/a"}], "metrics_file": {"key": "metrics/a"}}
    for gone, there in (("metrics/a", "predictions/a"), ("predictions/a", "metrics/a")):
        store.write(there, b"x")
        with pytest.raises(UserError, match=f"{gone}: is gone"):
            commit_run(store, "a", record)
        assert keys(store) == {there}
        store.delete(there)


def test_what_a_killed_job_left_on_this_machine_goes_and_nothing_else_there(tmp_path, temporary):
    open_store(str(tmp_path / "results")).write("status.json", b"x")
    old = time.time() - 2 * 86400
    for name in ("lungopacity-killed", "lungopacity-just-killed", "lungopacity-results", "other"):
        (temporary / name).mkdir()
        (temporary / name / "plan.parquet").write_bytes(b"Doe_John.png")
    for name in ("lungopacity-killed", "lungopacity-just-killed", "other"):
        (temporary / name / ".at-work").touch()
    with scratch() as at_work:
        for mark in temporary.glob("*/.at-work"):
            if mark.parent.name != "lungopacity-just-killed":
                os.utime(mark, (old, old))
        assert clean(str(tmp_path / "results"), dry_run=True).size_bytes == len("Doe_John.png")
        swept = clean(str(tmp_path / "results")).files
        assert swept == {"temporary folders of killed jobs": 1}
        assert {path.name for path in temporary.iterdir()} == {
            "lungopacity-just-killed", "lungopacity-results", "other", at_work.name,
        }  # fmt: skip
    assert not at_work.exists()


@pytest.mark.usefixtures("hours_later")
def test_a_lease_that_a_night_takes_over_meanwhile_stays(results, monkeypatch):
    """A large folder is listed for minutes."""
    listed, lease = type(results).list, Lease(results, "nightly", "a night")
    with ExitStack() as night:

        def slowly(store, prefix=""):
            found = list(listed(store, prefix))
            if not prefix:
                night.enter_context(lease)
            return iter(found)

        monkeypatch.setattr(type(results), "list", slowly)
        assert "locks" not in clean(results.uri, older_than_days=0).files
        assert lease.held()


def test_the_claim_of_a_number_outlives_a_slow_check_before_the_run_is_published(
    results, monkeypatch
):
    now = type(results).now
    monkeypatch.setattr(type(results), "now", lambda store: now(store) + timedelta(minutes=10))
    clean(results.uri, older_than_days=0)
    assert {key for key in keys(results) if key.startswith("_lock/")} == {"_lock/run-000007"}


def test_two_may_clean_one_temporary_folder(tmp_path, temporary):
    open_store(str(tmp_path / "results")).write("status.json", b"x")
    for number in range(200):
        left = temporary / f"lungopacity-{number}"
        (left / "spill").mkdir(parents=True)
        for part in range(20):
            (left / f"spill/{part}").touch()
        (left / ".at-work").touch()
        os.utime(left / ".at-work", (0, 0))
    with ThreadPoolExecutor() as threads:
        list(threads.map(clean, [str(tmp_path / "results")] * 4))
    assert not list(temporary.iterdir())


def test_a_mistyped_results_uri_is_reported_and_creates_no_folder(tmp_path):
    with pytest.raises(UserError, match="typo: no results there; give the --output"):
        clean(str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_a_folder_without_results_is_refused_rather_than_called_clean(store_uri, capfd):
    store = open_store(store_uri)
    store.write("film.png", b"x")
    store.write("runs.csv", b"x")
    with pytest.raises(UserError, match="no results there; give the --output"):
        clean(store_uri)
    assert main(["runs", "--results", store_uri, "--unfinished"]) == 2
    store.write("status.json", b"{}")
    assert not clean(store_uri).files
    assert main(["runs", "--results", store_uri, "--unfinished"]) == 0
    assert capfd.readouterr().out == f"no run is unfinished\n{NOTICE}\n"
