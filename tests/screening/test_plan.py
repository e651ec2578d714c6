import pytest

from lungopacity.archive.inventory import take_inventory
from lungopacity.errors import UserError
from lungopacity.results.folder import commit_run
from lungopacity.screening.plan import make_plan, new_run_id
from lungopacity.storage import open_store


@pytest.fixture
def archive(tmp_path):
    for name in ("b.png", "a.png", "c.tar"):
        open_store(str(tmp_path / "archive")).write(name, b"x")
    return take_inventory(str(tmp_path / "archive"))


def test_the_plan_is_the_inventory_in_order_or_its_first_objects(archive, store_uri):
    results = open_store(store_uri)
    whole = make_plan(results, archive, "model", "one", None)
    assert whole.objects["image"].to_pylist() == ["a.png", "b.png", "c.tar"]
    assert whole.objects["is_shard"].to_pylist() == [False, False, True]
    first = make_plan(results, archive, "model", "two", 2)
    assert first.objects["image"].to_pylist() == ["a.png", "b.png"]


def test_a_killed_runs_plan_is_taken_up_even_when_the_archive_grew(archive, store_uri):
    results = open_store(store_uri)
    planned = make_plan(results, archive, "model", "one", None)
    archive.store.write("new.png", b"x")
    again = make_plan(results, take_inventory(archive.uri), "model", "one", None)
    assert again.resumed
    assert again.objects.equals(planned.objects)
    assert again.start == planned.start


def test_another_model_or_archive_under_the_same_id_is_refused(archive, store_uri, tmp_path):
    results = open_store(store_uri)
    make_plan(results, archive, "model", "one", None)
    with pytest.raises(UserError, match="begun with model model, not other"):
        make_plan(results, archive, "other", "one", None)
    open_store(str(tmp_path / "second")).write("a.png", b"x")
    with pytest.raises(UserError, match="begun with archive"):
        make_plan(results, take_inventory(str(tmp_path / "second")), "model", "one", None)


def test_a_published_run_is_never_planned_again(archive, store_uri):
    results = open_store(store_uri)
    commit_run(results, "one", {"run_id": "one", "started_at": "2026-01-01"})
    with pytest.raises(UserError, match="published already"):
        make_plan(results, archive, "model", "one", None)
    with pytest.raises(UserError, match="published by another job"):
        commit_run(results, "one", {"run_id": "one", "started_at": "2026-01-01"})


@pytest.mark.parametrize("run_id", ["", "a/b", "../x", ".hidden", "x" * 101, "a b"])
def test_a_run_id_that_is_no_file_name_is_refused(archive, tmp_path, run_id):
    with pytest.raises(UserError, match="run id"):
        make_plan(open_store(str(tmp_path / "r")), archive, "model", run_id, None)


def test_new_run_ids_differ_and_sort_by_time():
    ids = [new_run_id("0123456789abcdef") for _ in range(50)]
    assert len(set(ids)) == 50
    assert [name[:16] for name in ids] == sorted(name[:16] for name in ids)
