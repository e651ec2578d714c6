"""A task that reads, scores and writes: its part files, and what becomes of one that fails."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RaySystemError

import lungopacity
from lungopacity.archive import stream
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.models import load_model
from lungopacity.runtime import grows_to
from lungopacity.screening import pipeline, screen
from lungopacity.screening.resources import ScoringResources
from lungopacity.storage import Store, open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def a_task(tmp_path, monkeypatch):
    """Screens one shard of fifty films, in parts of twenty rows, eight at a time."""
    import ray

    monkeypatch.setattr(pipeline, "ROWS_PER_PART", 20)
    archive, results = (open_store(str(tmp_path / name)) for name in ("archive", "results"))
    archive.write("x.tar", tar({f"{n}.png": encoded(grey_film(n % 7)) for n in range(50)}))
    results.write("_work/run/run.json", b"{}")
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    model = load_model(str(tmp_path / "model"))
    task = pipeline._together(
        archive.uri,
        ReadSettings(model.spec.preprocessing),
        (ray.put(model), ScoringResources(1, 1, 1.0, 0.0, 1, False), False, None, "float32"),
        results,
        "_work/run/attempt=1/",
        8,
    )
    return lambda: task(take_inventory(archive.uri).objects), results


def test_a_part_is_written_whenever_there_are_rows_enough(a_task):
    reports, results = a_task
    assert [report["ok"].to_pylist() for report in reports()] == [[24], [24], [2]]
    parts = [
        pq.read_table(pa.BufferReader(results.read(item.key)))
        for item in results.list("_work/run/attempt")
    ]
    rows = pa.concat_tables(parts)
    assert sorted(rows["member_index"].drop_null().to_pylist()) == list(range(50))
    assert rows["shard_rows"].drop_null().to_pylist() == [50]
    assert len(set(rows["reading"].to_pylist())) == 1


def test_nothing_more_is_read_where_a_part_cannot_be_written(a_task, monkeypatch):
    reports, results = a_task

    def full(key: str, data: bytes) -> None:
        raise UserError("no space")

    monkeypatch.setattr(results, "write", full)
    (report,) = reports()
    assert report["error"].to_pylist() == [f"no space (on {socket.gethostname()})"]


def test_a_node_without_the_runs_folder_keeps_no_parts_that_the_driver_never_sees(a_task):
    reports, results = a_task
    results.delete("_work/run/run.json")
    (report,) = reports()
    assert f"is not on {socket.gethostname()}, where results are" in report["error"][0].as_py()
    assert not list(results.list())


def test_films_of_a_folder_that_a_node_lacks_are_not_missing(tmp_path):
    with pytest.raises(UserError, match=r"archive: is not on \S+, where films are read; give a"):
        next(stream.counted_images(open_store(f"{tmp_path}/archive"), pa.table({}), None))


def test_a_node_of_other_code_is_no_lost_node():
    """Its tasks fail like those of a lost node: after all rounds, sound films would be
    `reader_crash`."""
    for why in (
        "AttributeError: Can't get attribute 'new' on <module 'lungopacity.runtime' from 'x.py'>",
        "ModuleNotFoundError: No module named 'lungopacity'",
    ):
        with (
            pytest.raises(UserError, match=r"Ray node lacks the job's code: .*Error: .*; install"),
            screen._surviving_lost_nodes(),
        ):
            raise RaySystemError(f"System error: {why}\ntraceback: in\n{why}")


def test_the_driver_hears_of_each_part_and_other_datasets_keep_their_blocks(monkeypatch):
    import ray

    before = ray.data.DataContext.get_current().target_max_block_size

    def reports(_: pa.Table) -> Iterator[pa.Table]:
        yield from (pa.table({"part": [number]}) for number in range(3))

    heard = stream.stream([pa.table({"object": [1]})], reports, block_bytes=1)
    assert heard.context.execution_no_progress_timeout_s == 7200
    assert [part["part"].to_pylist() for part in stream.tables_of(heard)] == [[0], [1], [2]]

    def stuck(_: pa.Table) -> Iterator[pa.Table]:
        time.sleep(3)
        yield pa.table({"part": [0]})

    with grows_to({"GPU": 1}):
        assert stream.stream([], stuck).context.execution_no_progress_timeout_s == 12 * 3600
    monkeypatch.setattr(stream, "_NO_PROGRESS_S", 1.8)
    waits = stream.stream([pa.table({"object": [1]})], stuck)
    with pytest.raises(UserError, match=r"0\.0005 hours \(MapBatches\(stuck\): 1 active task"):
        list(stream.tables_of(waits))
    assert ray.data.DataContext.get_current().target_max_block_size == before


def test_only_what_ray_lost_is_lost_where_tasks_may_be(caplog):
    """A node that joins late and cannot do its work would publish sound films as `reader_crash`."""

    def fails(error: Exception, losses: int = 9) -> list[pa.Table]:
        def task(objects: pa.Table) -> Iterator[pa.Table]:
            if objects["object"][0].as_py():
                raise error
            yield objects

        tasks = [pa.table({"object": [number]}) for number in range(2)]
        return list(stream.tables_of(stream.stream(tasks, task, losses=losses)))

    for losses in (0, 9):
        with pytest.raises(UserError, match=r"^w1, where films are read: no AWS credentials$"):
            fails(UserError("w1, where films are read: no AWS credentials"), losses)
    with pytest.raises(UserError, match="lacks the job's code"):
        fails(RaySystemError("System error: No module named 'lungopacity'"))
    (left,) = fails(RaySystemError("the decoder does not start"))
    assert left["object"].to_pylist() == [0]
    assert "Ray lost a task (RaySystemError: System error: the decoder does not" in caplog.text


@pytest.mark.timeout(120)
def test_an_object_that_ends_its_process_costs_its_own_row(tmp_path, monkeypatch, caplog):
    whole = stream.counted_images

    def dies(
        store: Store, objects: pa.Table, settings: ReadSettings, **options: object
    ) -> Iterator[pa.Table]:
        if "bad.tar" in objects["image"].to_pylist():
            os._exit(1)
        yield from whole(store, objects, settings, **options)

    for module in (stream, pipeline):
        monkeypatch.setattr(module, "counted_images", dies)
    monkeypatch.setattr(stream, "RETRIES", 0)
    monkeypatch.setattr(screen, "_ROUNDS", (64, 1))
    store = open_store(str(tmp_path / "archive"))
    for name in ("1.png", "2.png"):
        store.write(name, encoded(grey_film(1)))
    store.write("bad.tar", tar({"3.png": encoded(grey_film(3))}))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    run = lungopacity.screen(store.uri, str(tmp_path / "model"), str(tmp_path / "results"))
    assert (run.ok, run.failed) == (2, 1)
    assert "Ray lost the work in progress (WorkerCrashedError: The worker died" in caplog.text
    rows = lungopacity.query(run.results, "SELECT image FROM predictions WHERE status = 'failed'")
    assert rows["image"].to_pylist() == ["bad.tar"]


@pytest.mark.timeout(120)
def test_what_an_actor_raises_ends_the_run_at_once_with_its_cause(
    tmp_path, monkeypatch, caplog, capfd
):
    class Faulty:
        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, _: pa.Table) -> pa.Table:
            raise UserError("the GPU is full")

    monkeypatch.setattr(pipeline, "ScoreImages", Faulty)
    store = open_store(str(tmp_path / "archive"))
    store.write("1.png", encoded(grey_film(1)))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    command = ["screen", "--archive", store.uri, "--model", str(tmp_path / "model")]
    command += ["--output", str(tmp_path / "results"), "--model-actors", "1"]
    assert main(command) == 2
    assert "Ray lost" not in caplog.text
    _, err = capfd.readouterr()
    assert err.splitlines()[-1] == "error: the GPU is full"
    assert "Exception occurred" not in err  # nor a traceback of Ray Data's
