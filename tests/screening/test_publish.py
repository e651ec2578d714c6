import hashlib
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.results.folder import commit_run, part_key
from lungopacity.results.query import predictions_of
from lungopacity.results.schema import PLANNED_SCHEMA, part_schema, predictions_schema
from lungopacity.screening.plan import Plan, RunStart
from lungopacity.screening.publish import collect, remove_work
from lungopacity.screening.rules import Rules
from lungopacity.storage import ObjectInfo, open_store
from lungopacity.storage.parquet import parquet_bytes
from tests.results.records import record_of

CLASSES = ("Normal", "Lung_Opacity")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SOURCE = {"source_etag": "e", "source_size_bytes": 1, "source_modified_at": NOW}


def plan_of(folder: Path, loose: list[str], shards: list[str]) -> Plan:
    rows = [
        {"image": name, **SOURCE, "is_shard": name in shards, "repeated": False}
        for name in [*loose, *shards]
    ]
    rules = Rules("Lung_Opacity")
    start = RunStart("run", "model", "O'Brien", NOW.isoformat(), len(rows), ("plan",), rules)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=PLANNED_SCHEMA).sort_by("image"), folder / "plan.parquet"
    )
    return Plan(start, (folder / "plan.parquet",), False)


def missing(store, plan: Plan, folder: Path) -> list[str]:
    """Objects of the plan that have no complete rows in the part files."""
    with collect(store, plan, CLASSES) as collected:
        files = collected.missing(folder, "missing")
        return [name for file in files for name in pq.read_table(file)["image"].to_pylist()]


def final(store, plan: Plan, *, synthetic_model: bool = False) -> pa.Table:
    """The rows that would be published. Raises if they are not those of the plan."""
    with collect(store, plan, CLASSES) as collected:
        collected.finish(synthetic_model=synthetic_model)
        return collected.connection.sql(
            "SELECT * FROM final ORDER BY image, member_index, frame"
        ).to_arrow_table()


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
        write_part(store, plan, table, number)


def write_part(store, plan: Plan, table: pa.Table, attempt: int = 0) -> str:
    data = parquet_bytes(table)
    key = part_key(f"{plan.work}attempt={attempt}/", data)
    store.write(key, data)
    return key


def keys(table: pa.Table) -> list[tuple]:
    return list(zip(table["image"].to_pylist(), table["member_index"].to_pylist(), strict=True))


OBJECTS = (["a", "b", "c"], ["x.tar", "y.tar"])
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
    folder = tmp_path_factory.mktemp("results")
    store, plan = open_store(str(folder / "results")), plan_of(folder / "plan", *OBJECTS)
    order = data.draw(st.permutations(ROWS))
    cut = data.draw(st.integers(0, len(order)))
    again = data.draw(st.lists(st.sampled_from(ROWS), max_size=8))
    write_parts(store, plan, order[:cut], order[cut:], again)
    assert missing(store, plan, folder) == []
    assert keys(final(store, plan)) == KEYS


@pytest.mark.parametrize("lost", range(len(ROWS)))
def test_whatever_row_is_lost_its_object_is_missing(tmp_path, lost):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", *OBJECTS)
    write_parts(store, plan, ROWS[:lost] + ROWS[lost + 1 :])
    assert missing(store, plan, tmp_path) == [ROWS[lost]["image"]]
    with pytest.raises(RuntimeError, match="1 have no row"):
        final(store, plan)


def test_a_row_that_is_not_of_the_plan_is_never_published(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    write_parts(store, plan, [row("a"), row("z")])
    with pytest.raises(RuntimeError, match="1 objects are not in the plan"):
        final(store, plan)


def test_of_repeats_the_readable_one_counts_then_the_first(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    later = {"screened_at": NOW + timedelta(hours=1)}
    write_parts(
        store,
        plan,
        [row("a", status="failed")],
        [row("a", status="rejected")],
        [row("a", **later, p_Normal=0.5)],
        [row("a", **later | {"screened_at": NOW + timedelta(hours=2)})],
    )
    (found,) = final(store, plan).to_pylist()
    assert (found["status"], found["p_Normal"]) == ("ok", 0.5)


def test_passes_over_a_shard_that_met_different_content_are_not_mixed(tmp_path):
    """Killed in the middle of a shard, which is gone when the run goes on."""
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", [], ["x.tar"])
    second = {"reading": "second pass"}
    gone = [row("x.tar", status="failed", **second), {**marker("x.tar", 1), **second}]
    write_parts(store, plan, [row("x.tar", 0), row("x.tar", 1)], gone)
    assert missing(store, plan, tmp_path) == []
    assert keys(final(store, plan)) == [("x.tar", None)]


def test_of_two_whole_passes_over_a_shard_the_first_one_counts(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", [], ["x.tar"])
    second = {"reading": "second pass", "screened_at": NOW + timedelta(hours=1)}
    later = [row("x.tar", index, **second, p_Normal=0.5) for index in range(2)]
    write_parts(
        store,
        plan,
        [*later, {**marker("x.tar", 2), **second}],
        [row("x.tar", 0), row("x.tar", 1), marker("x.tar", 2)],
    )
    assert final(store, plan)["p_Normal"].to_pylist() == [0.25, 0.25]


def test_a_pass_with_more_rows_than_it_counts_is_not_whole(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", [], ["x.tar"])
    write_parts(store, plan, [row("x.tar", 0), row("x.tar", 1), marker("x.tar", 1)])
    assert missing(store, plan, tmp_path) == ["x.tar"]


def test_an_object_that_one_attempt_could_not_read_and_another_did_is_the_images_of_it(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", [], ["x.tar"])
    write_parts(
        store,
        plan,
        [row("x.tar", status="failed", reading=None)],
        [row("x.tar", 0), marker("x.tar", 1)],
    )
    assert keys(final(store, plan)) == [("x.tar", 0)]


def test_nothing_written_means_everything_is_missing(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", *OBJECTS)
    assert missing(store, plan, tmp_path) == ["a", "b", "c", "x.tar", "y.tar"]


def test_published_files_hold_the_schema_the_run_and_the_labels(store_uri, tmp_path):
    store, plan = open_store(store_uri), plan_of(tmp_path / "plan", *OBJECTS)
    write_parts(store, plan, ROWS)
    labels = pd.DataFrame({"image": ["a", "3.png"], "label": ["Normal", "Lung_Opacity"]})
    with collect(store, plan, CLASSES) as collected:
        collected.finish(synthetic_model=False)
        assert collected.label(labels)[1] == []
        (file,) = collected.write(store, None)
    table = pq.read_table(pa.BufferReader(store.read(file["key"])))
    assert table.schema.equals(predictions_schema(CLASSES), check_metadata=True)
    assert keys(table) == KEYS
    assert (table["run_id"][0].as_py(), table["archive"][0].as_py()) == ("run", "O'Brien")
    found = dict(zip(keys(table), table["label"].to_pylist(), strict=True))
    assert (found["a", None], found["x.tar", 3], found["b", None]) == (
        "Normal",
        "Lung_Opacity",
        None,
    )
    assert re.fullmatch(
        r"predictions/screened_on=2026-01-02/run-[0-9a-f]{8}-00000\.parquet", file["key"]
    )
    assert file["sha256"] == hashlib.sha256(store.read(file["key"])).hexdigest()
    remove_work(store, plan)
    assert [item.key for item in store.list()] == [file["key"]]


def test_a_folder_above_the_results_gives_no_column_its_value(tmp_path):
    store = open_store(str(tmp_path / "modality=CR" / "results"))
    plan = plan_of(tmp_path / "plan", ["a"], [])
    write_parts(store, plan, [row("a") | {"modality": "DX"}])
    assert final(store, plan)["modality"].to_pylist() == ["DX"]


def test_labels_find_an_image_by_its_ending_and_none_that_could_be_another(tmp_path):
    names = ["1.png", "x/1.png", "x/2.png", "x/3.png", "y/3.png", "y/7.png", "x/8.png", "y/8.png"]
    store = open_store(str(tmp_path / "results"))
    plan = plan_of(tmp_path / "plan", names, ["a.tar", "b.tar"])
    shards = [
        [
            *(row(shard, index, frame=frame) for index, frame in places),
            *(row(shard, index, member=f"x/{index}.png") for index in (6, 7)),
            marker(shard, len(places) + 2),
        ]
        for shard, places in (("a.tar", [(4, 0), (4, 1), (5, None)]), ("b.tar", [(5, None)]))
    ]
    write_parts(store, plan, [*(row(name) for name in names), *shards[0], *shards[1]])
    labels = pd.DataFrame(
        {
            "image": [*(f"{number}.png" for number in range(1, 9)), "x/8.png", "gone"],
            "label": list("abcdefghij"),
        }
    )
    with collect(store, plan, CLASSES) as collected:
        collected.finish(synthetic_model=False)
        found, doubts = collected.label(labels)
        labelled = collected.connection.sql(
            "SELECT image, member_index, frame, label FROM final "
            "WHERE label IS NOT NULL ORDER BY ALL"
        ).fetchall()
    assert labelled == [
        ("1.png", None, None, "a"),
        ("a.tar", 4, 0, "d"),
        ("a.tar", 4, 1, "d"),
        ("x/2.png", None, None, "b"),
        ("x/8.png", None, None, "i"),
        ("y/8.png", None, None, "h"),
    ]
    assert sorted(found["image"]) == ["1.png", "4.png", "x/2.png", "x/8.png", "y/8.png"]
    assert sorted(doubts) == [
        "3.png may be x/3.png or y/3.png",
        "5.png is in a.tar and in another object",
        "7.png may be x/7.png or y/7.png",
        "x/6.png is in a.tar and in another object",
    ]


def test_two_that_publish_one_run_do_not_touch_each_others_files(tmp_path, monkeypatch):
    monkeypatch.setattr("lungopacity.results.workbench._ROWS_PER_FILE", 4)
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", *OBJECTS)
    write_parts(store, plan, ROWS)
    written = []
    for _ in range(2):
        with collect(store, plan, CLASSES) as collected:
            collected.finish(synthetic_model=False)
            files = collected.write(store, None)
        assert [file["rows"] for file in files] == [4, 4, 1]
        rows = predictions_of(store, [{"class_names": CLASSES, "files": files}]).to_table()
        assert keys(rows) == KEYS
        written += [file["key"] for file in files]
    assert len(set(written)) == 6


def test_missing_part_files_of_a_published_run_are_reported_as_such(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    write_parts(store, plan, [row("a")])
    store.write("metrics/run.parquet", b"")
    commit_run(store, "run", record_of("run"))
    real_list = store.list
    store.list = lambda prefix="": [*real_list(prefix), ObjectInfo.gone(f"{prefix}x/p.parquet")]
    with (
        pytest.raises(UserError, match="published by another job meanwhile"),
        collect(store, plan, CLASSES),
    ):
        pass


def test_part_files_that_vanish_while_read_are_reported_as_such(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    write_parts(store, plan, [row("a")])
    store.write("metrics/run.parquet", b"")

    def lose() -> None:
        with collect(store, plan, CLASSES) as collected:
            commit_run(store, "run", record_of("run"))
            remove_work(store, plan)
            collected.finish(synthetic_model=False)

    with pytest.raises(UserError, match="published by another job meanwhile"):
        lose()


def _with_another_score(data: bytes) -> bytes:
    """The damaged file is still valid Parquet, which DuckDB would read silently."""
    other = data.replace(np.float32(0.75).tobytes(), np.float32(0.25).tobytes())
    assert pq.read_table(pa.BufferReader(other))["p_Lung_Opacity"][0].as_py() == 0.25
    return other


@pytest.mark.parametrize(
    "damaged",
    [lambda data: b"", lambda data: data[:3], lambda data: data[:-1], _with_another_score],
    ids=["empty", "its beginning", "without its end", "another score"],
)
def test_a_part_file_that_is_damaged_counts_as_never_written(store_uri, tmp_path, caplog, damaged):
    store = open_store(store_uri)
    plan = plan_of(tmp_path / "plan", ["a", "b"], ["x.tar"])
    passed = [row("x.tar", 0), row("x.tar", 1), marker("x.tar", 2)]
    write_parts(store, plan, [row("a"), passed[0]], [row("b"), *passed[1:]])
    (bad,) = [item.key for item in store.list(f"{plan.work}attempt=0/")]
    store.write(bad, damaged(store.read(bad)))
    assert missing(store, plan, tmp_path) == ["a", "x.tar"]
    assert f"{store.uri}/{bad} is damaged and is ignored" in caplog.text


@pytest.mark.parametrize("damaged", ["part", "plan"])
def test_an_unreadable_work_file_is_named_with_what_to_do(tmp_path, damaged):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    if damaged == "part":
        write_part(store, plan, pa.table({"image": ["of another version"]}))
    else:
        plan.files[0].write_bytes(b"PAR1 no more")
    said = r"run 'run' cannot continue: its plan, or a part file in _work/run/, cannot be read \("
    with pytest.raises(UserError, match=said), collect(store, plan, CLASSES):
        pass


def test_a_full_disk_costs_no_run(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise duckdb.OutOfMemoryException("failed to offload data block")

    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    monkeypatch.setattr("lungopacity.screening.publish.view_of_files", full)
    with pytest.raises(UserError, match="free some, or set TMPDIR"), collect(store, plan, CLASSES):
        pass


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (ErrorCode.TIMEOUT, "resume the run to try again"),
        (ErrorCode.FORBIDDEN, "move it away and resume the run to screen its objects again"),
    ],
)
def test_a_part_file_that_the_storage_does_not_return_is_kept_and_named(tmp_path, code, fix):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a"], [])
    write_parts(store, plan, [row("a")])

    def late(*_):
        raise ImageError(code, Stage.FETCH, "no answer in time")

    store.local_file = late
    said = (
        r"/attempt=0/[0-9a-f]{64}\.parquet: this part file of run 'run' cannot be read "
        rf"\(no answer in time\); {fix}"
    )
    with pytest.raises(UserError, match=said), collect(store, plan, CLASSES):
        pass


def test_every_row_of_a_synthetic_model_is_marked(tmp_path):
    store, plan = open_store(str(tmp_path / "results")), plan_of(tmp_path / "plan", ["a", "b"], [])
    write_parts(store, plan, [row("a", synthetic=False), row("b", status="failed")])
    assert final(store, plan)["synthetic"].to_pylist() == [False, None]
    assert final(store, plan, synthetic_model=True)["synthetic"].to_pylist() == [True, True]
