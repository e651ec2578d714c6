from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungopacity.results.schema import PLAN_SCHEMA, part_schema, predictions_schema
from lungopacity.screening.plan import Plan, RunStart, parquet_bytes
from lungopacity.screening.publish import collect, missing_objects, remove_work, write_predictions
from lungopacity.storage import open_store

CLASSES = ("Normal", "Lung_Opacity")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SOURCE = {"source_etag": "e", "source_size_bytes": 1, "source_modified_at": NOW}


def plan_of(loose: list[str], shards: list[str]) -> Plan:
    rows = [{"image": name, **SOURCE, "is_shard": name in shards} for name in [*loose, *shards]]
    start = RunStart("run", "model", "archive", NOW.isoformat())
    return Plan(start, pa.Table.from_pylist(rows, schema=PLAN_SCHEMA).sort_by("image"), False)


def row(image: str, index: int | None = None, status: str = "ok", **more) -> dict:
    member = None if index is None else f"{index}.png"
    scores = {"p_Normal": 0.25, "p_Lung_Opacity": 0.75, "decision": "positive"}
    return {
        "screened_at": NOW,
        "image": image,
        "member": member,
        "member_index": index,
        "reading": f"first pass over {image}" if image.endswith(".tar") else None,
        **SOURCE,
        "status": status,
        **(scores if status == "ok" else {"error_code": "timeout"}),
        **more,
    }


def marker(image: str, rows: int) -> dict:
    return {**row(image), "shard_rows": rows, "p_Normal": None, "p_Lung_Opacity": None}


def write_parts(store, plan: Plan, *parts: list[dict]) -> None:
    for number, rows in enumerate(parts):
        table = pa.Table.from_pylist(rows, schema=part_schema(CLASSES))
        store.write(f"{plan.work}attempt={number}/part.parquet", parquet_bytes(table))


def keys(table: pa.Table) -> list[tuple]:
    return list(zip(table["image"].to_pylist(), table["member_index"].to_pylist(), strict=True))


PLAN = plan_of(["a", "b", "c"], ["x.tar", "y.tar"])
ROWS = [
    *(row(name) for name in "abc"),
    *(row("x.tar", index) for index in range(4)),
    marker("x.tar", 4),
    row("y.tar", 0),
    row("y.tar", status="failed", error_code="corrupt_archive"),
    marker("y.tar", 2),
]
KEYS = [
    ("a", None),
    ("b", None),
    ("c", None),
    *(("x.tar", index) for index in range(4)),
    ("y.tar", 0),
    ("y.tar", None),
]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_however_attempts_overlap_each_image_is_published_once(tmp_path_factory, data):
    """Rows in any order, spread over attempts, any of them written again by another."""
    store = open_store(str(tmp_path_factory.mktemp("results")))
    order = data.draw(st.permutations(ROWS))
    cut = data.draw(st.integers(0, len(order)))
    again = data.draw(st.lists(st.sampled_from(ROWS), max_size=8))
    write_parts(store, PLAN, order[:cut], order[cut:], again)
    finished = collect(store, PLAN, CLASSES)
    assert missing_objects(PLAN, finished).num_rows == 0
    assert sorted(keys(finished.rows), key=str) == sorted(KEYS, key=str)


@pytest.mark.parametrize("lost", range(len(ROWS)))
def test_whatever_row_is_lost_its_object_is_missing(tmp_path, lost):
    store = open_store(str(tmp_path))
    write_parts(store, PLAN, ROWS[:lost] + ROWS[lost + 1 :])
    finished = collect(store, PLAN, CLASSES)
    missing = missing_objects(PLAN, finished)["image"].to_pylist()
    assert missing == [ROWS[lost]["image"]]
    assert ROWS[lost]["image"] not in finished.rows["image"].to_pylist()


def test_of_repeats_the_readable_one_counts_then_the_first(tmp_path):
    store = open_store(str(tmp_path))
    plan = plan_of(["a"], [])
    later = {"screened_at": NOW + timedelta(hours=1)}
    write_parts(
        store,
        plan,
        [row("a", status="failed")],
        [row("a", **later, p_Normal=0.5)],
        [row("a", **later | {"screened_at": NOW + timedelta(hours=2)})],
    )
    (found,) = collect(store, plan, CLASSES).rows.to_pylist()
    assert (found["status"], found["p_Normal"]) == ("ok", 0.5)


def test_passes_over_a_shard_that_met_different_content_are_not_mixed(tmp_path):
    """Killed in the middle of a shard, which is gone when the run goes on."""
    store = open_store(str(tmp_path))
    plan = plan_of([], ["x.tar"])
    second = {"reading": "second pass"}
    gone = [row("x.tar", status="failed", **second), {**marker("x.tar", 1), **second}]
    write_parts(store, plan, [row("x.tar", 0), row("x.tar", 1)], gone)
    finished = collect(store, plan, CLASSES)
    assert missing_objects(plan, finished).num_rows == 0
    assert keys(finished.rows) == [("x.tar", None)]


def test_a_shard_without_members_is_done(tmp_path):
    store = open_store(str(tmp_path))
    plan = plan_of([], ["x.tar"])
    write_parts(store, plan, [marker("x.tar", 0)])
    assert missing_objects(plan, collect(store, plan, CLASSES)).num_rows == 0


def test_nothing_written_means_everything_is_missing(tmp_path):
    finished = collect(open_store(str(tmp_path)), PLAN, CLASSES)
    assert finished.rows.num_rows == 0
    assert missing_objects(PLAN, finished).num_rows == 5


def test_published_files_hold_the_schema_the_run_and_the_labels(store_uri):
    store = open_store(store_uri)
    write_parts(store, PLAN, ROWS)
    rows = collect(store, PLAN, CLASSES).rows
    table, files = write_predictions(
        store,
        PLAN,
        rows,
        CLASSES,
        synthetic_model=False,
        label_of={"a": "Normal", "3.png": "Lung_Opacity"},
    )
    assert table.schema == predictions_schema(CLASSES)
    assert keys(table) == KEYS
    assert set(table["run_id"].to_pylist()) == {"run"}
    labels = dict(zip(keys(table), table["label"].to_pylist(), strict=True))
    assert (labels["a", None], labels["x.tar", 3], labels["b", None]) == (
        "Normal",
        "Lung_Opacity",
        None,
    )
    (file,) = files
    assert file["key"] == "predictions/screened_on=2026-01-02/run-00000.parquet"
    assert file["rows"] == len(KEYS)
    assert store.head(file["key"]) is not None
    remove_work(store, PLAN)
    assert [item.key for item in store.list()] == [file["key"]]


def test_no_column_is_ever_of_type_null(tmp_path):
    plan = plan_of(["a"], [])
    store = open_store(str(tmp_path))
    write_parts(store, plan, [row("a")])
    table, _ = write_predictions(
        store,
        plan,
        collect(store, plan, CLASSES).rows,
        CLASSES,
        synthetic_model=False,
        label_of={},
    )
    assert not any(pa.types.is_null(field.type) for field in table.schema)
    assert table["error_code"].null_count == 1
