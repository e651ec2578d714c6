from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity.archive.inventory import Inventory, list_archive
from lungopacity.errors import UserError
from lungopacity.results.folder import commit_run
from lungopacity.results.schema import PLANNED_SCHEMA
from lungopacity.results.workbench import export, temporary_folder, workbench
from lungopacity.screening.plan import (
    Plan,
    choose,
    make_plan,
    new_run_id,
    unfinished_runs,
    unfinished_table,
)
from lungopacity.screening.rules import Rules
from lungopacity.storage import open_store
from tests.results.records import record_of

RULES = Rules("Lung_Opacity")


@pytest.fixture
def archive(tmp_path) -> str:
    for name in ("b.png", "a.png", "c.tar"):
        open_store(str(tmp_path / "archive")).write(name, b"x")
    return str(tmp_path / "archive")


def planned(results, archive: str, model: str, run_id: str, folder: Path, **options) -> Plan:
    folder.mkdir(exist_ok=True)
    given = {"rules": RULES, **options}
    return make_plan(results, list_archive(archive), model, run_id, folder, **given)


def objects(plan: Plan) -> pa.Table:
    return pa.concat_tables([PLANNED_SCHEMA.empty_table(), *map(pq.read_table, plan.files)])


def test_the_plan_is_the_inventory_in_order_or_its_first_objects(archive, store_uri, tmp_path):
    results = open_store(store_uri)
    whole = objects(planned(results, archive, "model", "one", tmp_path / "1"))
    assert whole["image"].to_pylist() == ["a.png", "b.png", "c.tar"]
    assert whole["is_shard"].to_pylist() == [False, False, True]
    first = planned(results, archive, "model", "two", tmp_path / "2", limit=2)
    assert objects(first)["image"].to_pylist() == ["a.png", "b.png"]
    assert first.start.objects == 2


def test_a_plan_of_more_objects_than_a_file_holds_has_several_files(
    archive, store_uri, tmp_path, monkeypatch
):
    monkeypatch.setattr("lungopacity.results.workbench._ROWS_PER_FILE", 2)
    results = open_store(store_uri)
    for number in (1, 2):  # planned, and loaded from the results
        plan = planned(results, archive, "model", "one", tmp_path / str(number))
        images = [pq.read_table(path)["image"].to_pylist() for path in plan.files]
        assert images == [["a.png", "b.png"], ["c.tar"]]


def test_rows_that_come_in_several_pieces_are_all_counted(monkeypatch):
    monkeypatch.setattr("lungopacity.results.workbench._ROWS_PER_BATCH", 2048)
    schema = pa.schema([("number", pa.int64())])
    with workbench() as (connection, folder):
        numbers = "SELECT range AS number FROM range(5000) ORDER BY number"
        (file,) = export(connection, numbers, schema, folder, "numbers")
        assert file.rows == pq.read_metadata(file.path).num_rows == 5000


def test_a_killed_runs_plan_is_taken_up_even_when_the_archive_grew(archive, store_uri, tmp_path):
    results = open_store(store_uri)
    first = planned(results, archive, "model", "one", tmp_path / "1")
    open_store(archive).write("new.png", b"x")
    again = planned(results, archive, "model", "one", tmp_path / "2")
    assert again.resumed
    assert objects(again).equals(objects(first))
    assert again.start == first.start
    planned(results, archive, "model", "later", tmp_path / "3")
    assert [start.run_id for start in unfinished_runs(results)] == ["one", "later"]
    assert unfinished_table(store_uri)["run_id"].to_pylist() == ["one", "later"]
    results.write("metrics/one.parquet", b"")
    commit_run(results, "one", record_of("one"))  # killed before its work was removed
    assert [start.run_id for start in unfinished_runs(results)] == ["later"]
    with pytest.raises(UserError, match="elsewhere: no results there"):
        unfinished_table(f"{store_uri}/elsewhere")


def test_a_plan_that_is_not_written_whole_is_none(archive, tmp_path):
    results = open_store(str(tmp_path / "results"))
    write = results.write

    def full(key: str, data: bytes, **condition) -> None:
        if "/plan-" in key:
            raise UserError("no space left")
        write(key, data, **condition)

    results.write = full
    with pytest.raises(UserError, match="no space left"):
        planned(results, archive, "model", "one", tmp_path / "1")
    results.write = write
    assert not planned(results, archive, "model", "one", tmp_path / "2").resumed


def test_of_two_that_plan_one_run_the_first_ones_plan_counts(archive, store_uri, tmp_path):
    results = open_store(store_uri)
    real_head, asked = results.head, []

    def head(key: str):
        # The other job's plan lands after this one has looked for it.
        found = real_head(key)
        if key.endswith("run.json") and not asked:
            asked.append(key)
            planned(open_store(store_uri), archive, "model", "one", tmp_path / "other", limit=1)
        return found

    results.head = head
    second = planned(results, archive, "model", "one", tmp_path / "mine")
    assert second.resumed
    assert objects(second)["image"].to_pylist() == ["a.png"]


def test_another_model_or_archive_under_the_same_id_is_refused(archive, store_uri, tmp_path):
    results = open_store(store_uri)
    planned(results, archive, "model", "one", tmp_path / "1")
    with pytest.raises(UserError, match="started with model model, not with model other"):
        planned(results, archive, "other", "one", tmp_path / "1")
    for changes, said in (
        ({"accept": ("x", "y")}, "with --accept none, not with --accept x,y"),
        ({"operating_point": "a"}, "without --operating-point, not with --operating-point a"),
        ({"hash_keys": True}, "without --hash-keys, not with --hash-keys"),
        ({"threshold": 0.25}, r"with threshold 0\.5, not with threshold 0\.25"),
    ):
        rules = replace(RULES, **changes)
        with pytest.raises(UserError, match=f"'one' was started {said}; use the same, or choose"):
            planned(results, archive, "model", "one", tmp_path / "1", rules=rules)
    open_store(str(tmp_path / "second")).write("a.png", b"x")
    with pytest.raises(UserError, match="started with archive"):
        planned(results, str(tmp_path / "second"), "model", "one", tmp_path / "1")


@pytest.mark.parametrize("damage", ["run.json", "plan"])
def test_a_plan_that_is_damaged_or_gone_is_named(archive, store_uri, tmp_path, damage):
    results = open_store(store_uri)
    planned(results, archive, "model", "one", tmp_path / "1")
    (key,) = [item.key for item in results.list("_work/one/") if damage in item.key]
    if damage == "plan":
        results.delete(key)
    else:
        results.write(key, b"{}")
    with pytest.raises(UserError, match="run 'one' cannot be resumed"):
        planned(results, archive, "model", "one", tmp_path / "2")


def test_a_published_run_is_never_planned_again(archive, store_uri, tmp_path):
    results = open_store(store_uri)
    results.write("metrics/one.parquet", b"")
    commit_run(results, "one", record_of("one"))
    with pytest.raises(UserError, match="already published"):
        planned(results, archive, "model", "one", tmp_path / "1")
    with pytest.raises(UserError, match="published by another job"):
        commit_run(results, "one", record_of("one"))


def test_an_inventory_that_names_an_object_twice_is_refused(archive, tmp_path):
    listed = list_archive(archive)
    (table,) = listed.tables
    twice = Inventory(listed.uri, iter([table, table.slice(0, 1)]))
    with pytest.raises(UserError, match="names 1 object more than once"):
        make_plan(open_store(str(tmp_path / "r")), twice, "model", "one", tmp_path, rules=RULES)


def test_a_full_disk_is_reported_with_what_to_do(archive):
    mend = pytest.raises(UserError, match=r"no space left in .*; free some, or set TMPDIR to")
    with mend, temporary_folder() as folder:
        (folder / "inventory.parquet").symlink_to("/dev/full")
        choose(list_archive(archive), folder, None, None)
    with mend, workbench() as (connection, _):
        connection.execute("SET memory_limit = '8MB'; SET max_temp_directory_size = '1MB'")
        connection.execute("CREATE TABLE t AS SELECT md5(i::VARCHAR) a FROM range(1000000) r(i)")
        connection.execute("CREATE TABLE s AS SELECT * FROM t ORDER BY a")
    with pytest.raises(PermissionError), temporary_folder():
        raise PermissionError


@pytest.mark.parametrize("run_id", ["", "a/b", "../x", ".hidden", "x" * 101, "a b"])
def test_a_run_id_that_is_not_a_file_name_is_refused(archive, tmp_path, run_id):
    with pytest.raises(UserError, match="run id"):
        planned(open_store(str(tmp_path / "r")), archive, "model", run_id, tmp_path / "1")


def test_new_run_ids_differ_and_sort_by_time():
    ids = [new_run_id("0123456789abcdef") for _ in range(50)]
    assert len(set(ids)) == 50
    assert [name[:16] for name in ids] == sorted(name[:16] for name in ids)
