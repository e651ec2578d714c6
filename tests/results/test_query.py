import json
import tempfile
from datetime import UTC, date, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.results.folder import commit_run, run_key
from lungopacity.results.query import files_of_runs, query, runs
from lungopacity.results.schema import METRICS_SCHEMA, class_column, predictions_schema
from lungopacity.results.workbench import workbench
from lungopacity.screening.clean import clean
from lungopacity.screening.history import History
from lungopacity.screening.retry import retry
from lungopacity.screening.rules import Rules
from lungopacity.storage import LocalStore, open_store
from lungopacity.storage.parquet import parquet_bytes
from tests.results.records import record_of

NOW = datetime(2026, 3, 4, 23, 59, tzinfo=UTC)


def write_run(
    uri: str, run_id: str, classes: tuple[str, ...], images: int, commit: bool = True, **told: str
):
    """told: of the rows and of the record, in place of what they say by default."""
    store = open_store(uri)
    rows = [
        {
            "run_id": run_id, "model_id": "m", "screened_at": NOW, "archive": "a",
            "image": f"{number}.png", "source_etag": "e", "source_size_bytes": 1,
            "source_modified_at": NOW, "status": "ok", class_column("p", classes[-1]): 0.5,
            **told,
        }
        for number in range(images)
    ]  # fmt: skip
    key = f"predictions/screened_on=2026-03-04/{run_id}-00000.parquet"
    table = pa.Table.from_pylist(rows, schema=predictions_schema(classes))
    store.write(key, parquet_bytes(table))
    metric = {"run_id": run_id, "model_id": "m", "synthetic": False, "group": "all",
              "metric": "images", "value": float(images)}  # fmt: skip
    metrics = pa.Table.from_pylist([metric], schema=METRICS_SCHEMA)
    store.write(f"metrics/{run_id}.parquet", parquet_bytes(metrics))
    if commit:
        record = {
            "run_id": run_id, "model_id": "m", "synthetic": False, "archive": "a",
            "class_names": list(classes), "positive_class": classes[-1],
            "started_at": NOW.isoformat(), "finished_at": NOW.isoformat(),
            "images": images, "counts": {"ok": images}, "positive": 0, "images_per_s": 1.0,
            "files": [{"key": key, "rows": images}],
            "metrics_file": {"key": f"metrics/{run_id}.parquet", "rows": 1},
            **told,
        }  # fmt: skip
        commit_run(store, run_id, record)


def test_committed_runs_alone_are_seen(store_uri):
    write_run(store_uri, "done", ("Normal", "Lung_Opacity"), 3)
    write_run(store_uri, "killed", ("Normal", "Lung_Opacity"), 5, commit=False)
    answer = query(store_uri, "SELECT run_id, count(*) AS n FROM predictions GROUP BY run_id")
    assert answer.to_pylist() == [{"run_id": "done", "n": 3}]
    assert query(store_uri, "SELECT sum(value) AS v FROM metrics").to_pylist() == [{"v": 3.0}]
    assert runs(store_uri)["run_id"].to_pylist() == ["done"]


@pytest.mark.parametrize("other", [{"archive": "b"}, {"model_id": "n"}, {"positive_class": "x"}])
def test_a_newer_run_hides_no_row_of_another_archive_model_or_class(tmp_path, other):
    classes = ("x", "Lung_Opacity")
    write_run(str(tmp_path), "one", classes, 2)
    write_run(str(tmp_path), "two", classes, 2, **other)
    newest = query(str(tmp_path), "SELECT run_id, image FROM latest ORDER BY ALL").to_pylist()
    assert [row["run_id"] for row in newest] == ["one", "one", "two", "two"]


def test_the_row_of_a_shard_that_could_not_be_opened_gives_way_to_those_of_its_members(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    write_run(str(tmp_path), "two", ("Normal", "Lung_Opacity"), 1, member="a.png")
    newest = query(str(tmp_path), "SELECT run_id, member FROM latest").to_pylist()
    assert newest == [{"run_id": "two", "member": "a.png"}]


def test_runs_of_models_with_other_classes_stand_in_one_table(tmp_path):
    write_run(str(tmp_path), "two", ("Normal", "Lung_Opacity"), 2)
    write_run(str(tmp_path), "three", ("Normal", "Viral Pneumonia", "COVID-19"), 1)
    answer = query(
        str(tmp_path),
        "SELECT run_id, count(p_Lung_Opacity) AS a, count(p_COVID_19) AS b, "
        "max(screened_on) AS day FROM predictions GROUP BY run_id ORDER BY run_id",
    ).to_pylist()
    assert [(row["run_id"], row["a"], row["b"]) for row in answer] == [
        ("three", 0, 1),
        ("two", 2, 0),
    ]
    assert str(answer[0]["day"]) == "2026-03-04"


def test_columns_of_models_that_write_their_classes_in_another_case_are_one(tmp_path):
    """SQL ignores case: two columns would hide the scores of one of the models."""
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 2)
    write_run(str(tmp_path), "two", ("normal", "lung_opacity"), 1, model_id="n")
    answer = query(
        str(tmp_path),
        "SELECT run_id, count(p_lung_opacity) AS n FROM latest GROUP BY ALL ORDER BY 1",
    )
    assert answer.to_pylist() == [{"run_id": "one", "n": 2}, {"run_id": "two", "n": 1}]
    columns = query(str(tmp_path), "SELECT * FROM predictions").column_names
    assert [name for name in columns if name.lower().startswith("p_")] == [
        "p_Normal", "p_Lung_Opacity",
    ]  # fmt: skip


def test_times_are_utc_and_columns_are_typed(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    answer = query(
        str(tmp_path),
        "SELECT hour(screened_at) AS h, error_code, current_setting('TimeZone') AS zone "
        "FROM predictions",
    )
    # By the zone's name, for where tests run the hours may be those of UTC anyway.
    assert answer.to_pylist() == [{"h": 23, "error_code": None, "zone": "UTC"}]
    assert answer.schema.field("error_code").type == pa.string()


def test_no_file_outside_the_results_can_be_read(tmp_path):
    write_run(str(tmp_path / "r"), "one", ("Normal", "Lung_Opacity"), 1)
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (
        f"SELECT * FROM '{tmp_path}/secret.csv'",
        f"SELECT * FROM read_csv('{tmp_path}/secret.csv')",
        "SELECT 1; SELECT 2",
        f"COPY (SELECT 1) TO '{tmp_path}/out.csv'",
    ):
        with pytest.raises(UserError, match=r"^SQL: "):
            query(str(tmp_path / "r"), sql)
    assert not (tmp_path / "out.csv").exists()


def test_what_does_not_fit_into_memory_goes_to_the_temporary_folder(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    (spill,) = query(str(tmp_path), "SELECT current_setting('temp_directory') s").to_pylist()
    assert spill["s"].startswith(f"{tempfile.gettempdir()}/lungopacity-")


def test_folders_above_the_results_give_no_column_its_value(tmp_path):
    results = tmp_path / "screened_on=1999-01-01" / "run_id=x"
    write_run(str(results), "one", ("Normal", "Lung_Opacity"), 1)
    (row,) = query(str(results), "SELECT run_id, screened_on FROM predictions").to_pylist()
    assert row == {"run_id": "one", "screened_on": date(2026, 3, 4)}


def test_a_newer_schema_is_refused_with_the_reason(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    store = open_store(str(tmp_path))
    record = json.loads(store.read(run_key("one"))) | {"schema_version": 99}
    store.write(run_key("one"), json.dumps(record).encode())
    with pytest.raises(UserError, match="schema 99 is newer than this lungopacity can read"):
        query(str(tmp_path), "SELECT 1")


def test_a_damaged_commit_record_is_named(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    open_store(str(tmp_path)).write(run_key("one"), b"{")
    with pytest.raises(UserError, match=r"runs/one\.json: the commit record cannot be read"):
        runs(str(tmp_path))


RECORDS = {
    "a list": lambda record: [],
    "a text": lambda record: "x",
    "null": lambda record: None,
    "no version": lambda record: {**record, "schema_version": None},
    "version as text": lambda record: {**record, "schema_version": "2"},
    "no date": lambda record: {**record, "started_at": "soon"},
    "sequence as text": lambda record: {**record, "sequence": "1"},
    "settings of null": lambda record: {**record, "settings": None},
    "a list of settings": lambda record: {**record, "settings": []},
    "files without keys": lambda record: {**record, "files": [{}]},
    "files that are none": lambda record: {**record, "files": ["x"]},
    **{
        f"without {name}": lambda record, name=name: {
            key: value for key, value in record.items() if key != name
        }
        for name in ("started_at", "files", "class_names", "counts", "metrics_file")
    },
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_record_that_is_json_and_no_record_is_named(tmp_path, damage):
    store = open_store(str(tmp_path))
    record = {"schema_version": 2, **record_of("one")}
    store.write(run_key("one"), json.dumps(RECORDS[damage](record)).encode())
    for read in (runs, clean, lambda uri: query(uri, "SELECT 1"), lambda uri: retry(uri, "one")):
        with pytest.raises(UserError, match=r"one\.json: the commit record cannot be read \("):
            read(str(tmp_path))


def test_class_names_become_columns_that_need_no_quotes():
    names = predictions_schema(["Normal", "COVID-19"]).names
    assert {"p_COVID_19", "logit_COVID_19"} <= set(names)
    with pytest.raises(
        UserError, match="'COVID-19' and 'COVID 19' would share the column p_COVID_19"
    ):
        predictions_schema(["COVID-19", "COVID 19"])


def test_a_missing_predictions_file_is_reported(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    open_store(str(tmp_path)).delete("predictions/screened_on=2026-03-04/one-00000.parquet")
    with pytest.raises(UserError, match="one-00000"):
        query(str(tmp_path), "SELECT count(*) FROM predictions WHERE p_Normal > 0")


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (OSError("When reading 'x': AWS Error NETWORK_CONNECTION during HeadObject"), "try again"),
        (PermissionError(13, "Permission denied"), "check the credentials and permissions$"),
        (OSError("When reading 'x': AWS Error ACCESS_DENIED during HeadObject operation"),
         "check the credentials and permissions$"),
        (duckdb.InvalidInputException("reading the stream registered as 'p' failed: IOError: AWS "
                                      "Error SLOW_DOWN during GetObject"), "try again"),
        (duckdb.OutOfMemoryException("failed to allocate"), "or set TMPDIR"),
        (duckdb.IOException("Could not write file: No space left on device"), "or set TMPDIR"),
        (FileNotFoundError("x.parquet"), "restore it"),
        (FileNotFoundError(2, "No such file"), "restore it"),
        (OSError("could not verify page integrity"), "restore it"),
        (pa.ArrowInvalid("magic bytes not found"), "restore it"),
    ],
)  # fmt: skip
def test_no_advice_on_an_unreadable_file_is_to_remove_it(tmp_path, error, mend):
    store = open_store(str(tmp_path))
    with pytest.raises(UserError, match=mend) as told, files_of_runs(store):
        raise error
    assert "remove" not in str(told.value)


@pytest.mark.parametrize(
    ("code", "mend"),
    [(ErrorCode.TIMEOUT, "try again; "), (ErrorCode.FORBIDDEN, "check the credentials")],
)
def test_a_record_that_the_storage_does_not_give_is_not_to_be_restored(
    code, mend, tmp_path, monkeypatch
):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)

    def not_given(*_, **__):
        raise ImageError(code, Stage.FETCH, "no answer")

    monkeypatch.setattr(LocalStore, "read", not_given)
    with pytest.raises(UserError, match=rf"cannot be read \(no answer\); {mend}"):
        runs(str(tmp_path))


V1_COLUMNS = [
    "run_id", "model_id", "screened_at", "archive", "image", "member", "member_index",
    "source_etag", "source_size_bytes", "source_modified_at", "content_sha256", "format", "rows",
    "columns", "photometric_interpretation", "view_position", "patient_sex", "patient_age_years",
    "synthetic", "status", "error_code", "error_stage", "error_message", "p_Normal",
    "p_Lung_Opacity", "logit_Normal", "logit_Lung_Opacity", "predicted_label", "decision", "label",
]  # fmt: skip
"""Of the first schema, before frames, quality flags and pseudonyms."""


def test_results_of_the_first_schema_are_read_beside_those_of_today(tmp_path):
    store = open_store(str(tmp_path))
    write_run(str(tmp_path), "old", ("Normal", "Lung_Opacity"), 3)
    (item,) = store.list("predictions/")
    table = pq.read_table(pa.BufferReader(store.read(item.key))).select(V1_COLUMNS)
    store.write(item.key, parquet_bytes(table.replace_schema_metadata({"schema_version": "1"})))
    record = json.loads(store.read(run_key("old"))) | {"schema_version": 1}
    for name in ("sequence", "attempt", "positive_class"):
        del record[name]
    store.write(run_key("old"), json.dumps(record).encode())
    write_run(str(tmp_path), "new", ("Normal", "Lung_Opacity"), 2)
    answer = query(
        str(tmp_path),
        "SELECT run_id, count(*) AS n, count(quality_blank) AS q, count(explanation) AS e "
        "FROM predictions GROUP BY ALL ORDER BY run_id",
    ).to_pylist()
    assert answer == [
        {"run_id": "new", "n": 2, "q": 0, "e": 0},
        {"run_id": "old", "n": 3, "q": 0, "e": 0},
    ]
    # Of an object that both have, the newer run's row counts, though their clocks agree.
    newest = query(str(tmp_path), "SELECT image, run_id FROM latest ORDER BY image").to_pylist()
    assert [row["run_id"] for row in newest] == ["new", "new", "old"]
    # And a night does not screen again what the old run has screened.
    history = History.read(store, "a", "m", Rules("Lung_Opacity"), None)
    with workbench() as (connection, _):
        history.load(connection)
        assert connection.sql("SELECT count(*) FROM screened").fetchall() == [(3,)]


@pytest.mark.parametrize(
    ("classes", "positive"),
    [(["Lung_Opacity", "Normal"], "Lung_Opacity"), (["Normal", "COVID"], "COVID")],
)
def test_a_record_of_the_first_schema_is_of_the_default_positive_class(tmp_path, classes, positive):
    record = {"schema_version": 1, **record_of("one", class_names=classes)}
    open_store(str(tmp_path)).write(run_key("one"), json.dumps(record).encode())
    assert runs(str(tmp_path))["positive_class"].to_pylist() == [positive]


def test_other_readers_find_the_columns_of_all_models(tmp_path, monkeypatch):
    """As docs/results.md tells them to."""
    write_run(str(tmp_path / "results"), "one", ("Normal", "Lung_Opacity"), 1)
    write_run(str(tmp_path / "results"), "two", ("Normal", "Lung_Opacity", "COVID"), 1)
    text = (Path(__file__).parents[2] / "docs/results.md").read_text()
    (code,) = [part for part in text.split("```python\n")[1:] if "union_by_name" in part]
    read = {}
    monkeypatch.chdir(tmp_path)
    exec(code.split("```")[0].replace("duckdb.sql", "duck = duckdb.sql"), read)
    duck, pandas_table = read["duck"].to_arrow_table().to_pandas(), read["pandas_table"]
    for table in (duck, pandas_table):
        assert sorted(table["p_COVID"].dropna()) == [0.5]
        assert sorted(table["run_id"]) == ["one", "two"]
    assert set(pandas_table["screened_on"]) == {date(2026, 3, 4)}


def test_a_flipped_byte_in_a_published_file_is_an_error(store_uri):
    write_run(store_uri, "one", ("Normal", "Lung_Opacity"), 500)
    store = open_store(store_uri)
    (item,) = store.list("predictions/")
    data = bytearray(store.read(item.key))
    place = pq.read_metadata(pa.BufferReader(bytes(data))).row_group(0).column(4)
    assert place.path_in_schema == "image"
    data[place.data_page_offset + place.total_compressed_size // 2] ^= 1
    store.write(item.key, bytes(data))
    with pytest.raises(UserError, match="cannot be read"):
        query(store_uri, "SELECT image FROM predictions")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("", "0 statements; give a single one"),
        ("SELECT 1; SELECT 2", "2 statements; give a single one"),
        ("EXPLAIN SELECT 1", "EXPLAIN is not allowed; begin with SELECT"),
        ("PIVOT runs ON model_id USING sum(ok)", r"PIVOT must list the values: .* IN \("),
    ],
)
def test_refused_sql_is_explained(tmp_path, sql, message):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    with pytest.raises(UserError, match=message):
        query(str(tmp_path), sql)


def test_the_tables_are_those_that_are_told(tmp_path):
    write_run(str(tmp_path), "one", ("Normal", "Lung_Opacity"), 1)
    tables = query(str(tmp_path), "SHOW TABLES")["name"].to_pylist()
    assert tables == ["latest", "metrics", "predictions", "runs"]
    pivoted = query(str(tmp_path), "PIVOT runs ON model_id IN ('m') USING sum(ok) GROUP BY archive")
    assert pivoted.to_pylist() == [{"archive": "a", "m": 1}]
