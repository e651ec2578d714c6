"""What `train` writes to TensorBoard and MLflow, read back by their own readers."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lungopacity.errors import UserError
from lungopacity.storage import join_uri
from lungopacity.training.fit import TrainingResult
from lungopacity.training.mlflow_log import EXPERIMENT, MlflowLog
from lungopacity.training.run_log import RunLog, as_user_error
from lungopacity.training.tensorboard_log import TensorBoardLog
from lungopacity.training.tracking import RunLogs, flat_settings, run_logs
from tests.models.tiny import tiny_model
from tests.training.blobs import SMALL_RUN
from tests.training.logs_read import mlflow_run, scalars, tensorboard_events

RUN = "0123456789abcdef"
MODEL = "s3://films/models/first"


def row(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 2 / epoch, "workers": 1}


@pytest.fixture(autouse=True)
def _file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow has a folder store only on request; a database would need the full mlflow package.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def result(epochs: int) -> TrainingResult:
    metrics = {"auc": 0.9, "loss": 0.3}
    model = tiny_model(temperature=1.25, synthetic=True, metrics=metrics)
    return TrainingResult(model, [row(epoch) for epoch in range(1, epochs + 1)], best_epoch=2)


def told(tensorboard: str | None, mlflow: str | None, epochs: int, earlier: int = 0) -> None:
    """A whole run, of which `earlier` epochs were trained before a crash."""
    with run_logs(tensorboard, mlflow) as logs:
        logs.start(RUN, SMALL_RUN, MODEL, [row(epoch) for epoch in range(1, earlier + 1)])
        for epoch in range(earlier + 1, epochs + 1):
            logs.epoch(row(epoch))
        logs.finish(result(epochs))


def wait_until(holds: Callable[[], bool]) -> None:
    """Each place has a thread of its own."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def crashed(tensorboard: str | None, mlflow: str | None, epochs: int) -> None:
    """A run that is interrupted, as by Ctrl-C."""

    def run() -> None:
        with run_logs(tensorboard, mlflow) as logs:
            logs.start(RUN, SMALL_RUN, MODEL, [])
            for epoch in range(1, epochs + 1):
                logs.epoch(row(epoch))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_tensorboard_shows_epochs_settings_and_the_model(store_uri: str, tmp_path: Path) -> None:
    told(store_uri, None, epochs=3)
    events = tensorboard_events(join_uri(store_uri, RUN), tmp_path / "copy")
    assert scalars(events, "validation_loss") == {1: 2.0, 2: 1.0, 3: pytest.approx(2 / 3)}
    assert scalars(events, "model/auc") == {2: pytest.approx(0.9)}
    assert scalars(events, "model/temperature") == {2: 1.25}
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[0]
        .tensor_proto.string_val[0]
        .decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }
    assert texts["model_folder"] == MODEL
    assert texts["model_id"] == result(3).model.model_id
    assert texts["synthetic"] == "true"
    assert texts["notice"].startswith("Research use only")


def test_tensorboard_compares_runs_by_their_settings(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    told(str(tmp_path / "tb"), None, epochs=1)
    events = tensorboard_events(str(tmp_path / "tb" / RUN), tmp_path / "copy")
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["learning_rate"].number_value == 4e-3
    assert started.hparams["augmentation.scale"].number_value == 0.12
    assert started.hparams["model_settings.channels"].string_value == "[8, 16, 32]"
    assert events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content


def test_an_epoch_is_readable_as_soon_as_it_is_written(store_uri: str, tmp_path: Path) -> None:
    with run_logs(store_uri, None) as logs:
        logs.start(RUN, SMALL_RUN, MODEL, [])
        logs.epoch(row(1))

        def shown() -> bool:
            events = tensorboard_events(join_uri(store_uri, RUN), tmp_path / uuid.uuid4().hex)
            return "train_loss" in events.Tags()["scalars"]

        wait_until(shown)


def test_errors_of_mlflow_are_cut_to_their_first_sentence() -> None:
    said = r"^--mlflow x: cannot be written to \(No such store\); check the address and "
    with pytest.raises(UserError, match=said), as_user_error("--mlflow x"):
        raise ValueError("No such store. Please migrate. See https://…\nand more")


def test_mlflow_has_epochs_settings_and_the_model(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/mlruns"
    told(None, store, epochs=3)
    run, histories = mlflow_run(store, RUN)
    assert run.info.status == "FINISHED"
    assert histories["validation_loss"] == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert run.data.metrics["model/auc"] == 0.9
    assert run.data.params["learning_rate"] == "0.004"
    assert run.data.params["augmentation.scale"] == "0.12"
    assert run.data.tags["model_id"] == result(3).model.model_id
    assert run.data.tags["model_folder"] == MODEL
    assert run.data.tags["mlflow.note.content"].startswith("Research use only")
    assert not list((tmp_path / "mlruns").rglob("artifacts/*"))


def test_a_resumed_run_repeats_no_epoch_and_loses_none(tmp_path: Path) -> None:
    tensorboard, mlflow = str(tmp_path / "tb"), f"file://{tmp_path}/mlruns"
    crashed(tensorboard, mlflow, epochs=2)
    # The third epoch was trained, but only one of its figures was written.
    MlflowClient(mlflow).log_metric(
        mlflow_run(mlflow, RUN)[0].info.run_id, "train_loss", 1 / 3, step=3
    )
    told(tensorboard, mlflow, epochs=5, earlier=3)
    events = tensorboard_events(str(tmp_path / "tb" / RUN), tmp_path / "copy")
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5]
    run, histories = mlflow_run(mlflow, RUN)
    for name in ("train_loss", "validation_loss"):
        assert [step for step, _ in histories[name]] == [1, 2, 3, 4, 5]
    assert run.info.status == "FINISHED"


def test_a_run_that_ends_without_a_model_is_not_left_running(tmp_path: Path) -> None:
    crashed(None, f"file://{tmp_path}/mlruns", epochs=1)
    run, histories = mlflow_run(f"file://{tmp_path}/mlruns", RUN)
    assert run.info.status == "FAILED"
    assert histories["train_loss"] == [(1, 1.0)]


def test_a_log_that_breaks_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = tmp_path / "mlruns"
    with caplog.at_level(logging.WARNING), run_logs(None, f"file://{mlflow}") as logs:
        logs.start(RUN, SMALL_RUN, MODEL, [])
        logs.epoch(row(1))
        wait_until(lambda: 1 in logs.places[0].written)
        shutil.move(mlflow, tmp_path / "away")
        logs.epoch(row(2))
        wait_until(lambda: "not written" in caplog.text)
        shutil.move(tmp_path / "away", mlflow)
        logs.epoch(row(3))
        logs.finish(result(3))
    _, histories = mlflow_run(f"file://{mlflow}", RUN)
    assert sorted(step for step, _ in histories["train_loss"]) == [1, 2, 3]


class Hanging(RunLog):
    """A server that accepts a request and does not answer."""

    place = "--mlflow http://far"

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def start(self, run: str, settings: object, output: str) -> None: ...

    def write(self, row: Mapping[str, Any]) -> None:
        self.answer.wait(30)

    def finish(self, metrics: object, facts: object, epoch: int) -> None: ...

    def give_up(self) -> None:
        self.answer.wait(30)


def test_a_place_that_hangs_delays_neither_training_nor_other_places(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungopacity.training.tracking._WAIT_S", 2.0)
    hanging = Hanging()
    logs = RunLogs([hanging, TensorBoardLog(str(tmp_path / "tb"))])
    logs.start(RUN, SMALL_RUN, MODEL, [])
    began = time.monotonic()
    for epoch in range(1, 41):
        logs.epoch(row(epoch))
    assert time.monotonic() - began < 20  # an epoch that waits would take 30
    with caplog.at_level(logging.WARNING):
        logs.finish(result(40))
    assert time.monotonic() - began < 25
    assert "--mlflow http://far: does not answer; not everything was written" in caplog.text
    events = tensorboard_events(str(tmp_path / "tb" / RUN), tmp_path / "copy")
    assert len(events.Scalars("train_loss")) == 40
    hanging.answer.set()


def test_a_slow_place_gets_every_epoch_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lungopacity.training.tracking._WAIT_S", 1.0)
    slow = Hanging()
    monkeypatch.setattr(slow, "write", lambda row: time.sleep(0.05))
    logs = RunLogs([slow])
    for epoch in range(1, 41):
        logs.epoch(row(epoch))
    logs.finish(result(40))
    assert slow.written == set(range(1, 41))


def test_a_run_killed_before_its_first_epoch_is_resumed_only_by_the_same_command(
    tmp_path: Path,
) -> None:
    store = f"file://{tmp_path}/mlruns"
    MlflowLog(store).start(RUN, flat_settings(SMALL_RUN), "another/output")
    MlflowLog(store).start(RUN, flat_settings(SMALL_RUN), MODEL)  # and killed
    told(None, store, epochs=1)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["model_folder"]: run.info.status for run in found} == {
        "another/output": "RUNNING",
        MODEL: "FINISHED",
    }
    assert len(found) == 2


@pytest.mark.parametrize(
    ("uri", "mend"),
    [
        ("mlruns", "MLFLOW_ALLOW_FILE_STORE=true is set; set it, or give the http://"),
        ("file:///tmp/mlruns", "MLFLOW_ALLOW_FILE_STORE=true is set; set it, or give the http://"),
        (
            "sqlite:///runs.db",
            "give the http:// address .* or, for a database, pip install mlflow$",
        ),
        (
            "s3://films/runs",
            "cannot keep runs there; give the http:// address of a tracking server",
        ),
    ],
)
def test_where_mlflow_cannot_keep_runs_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, uri: str, mend: str
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    with pytest.raises(UserError, match=f"^--mlflow {uri}: .*{mend}"):
        MlflowLog(uri)


def test_without_mlflow_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with (
        pytest.raises(UserError, match=r"pip install 'lungopacity\[mlflow\]'"),
        run_logs(None, "http://127.0.0.1:1"),
    ):
        raise AssertionError


def test_places_that_cannot_be_written_to_are_refused_before_any_film_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for tensorboard, mlflow, said in (
        (str(tmp_path / "file"), None, "--tensorboard .*file: cannot be written to"),
        ("gs://logs", None, "storage of kind 'gs' is not supported"),
        (None, "http://me:secret@127.0.0.1:1", "--mlflow http://127.0.0.1:1: cannot be written to"),
        (None, "ftp://server", "--mlflow ftp://server: the MLflow client cannot keep runs there"),
    ):
        with pytest.raises(UserError, match=said) as refused, run_logs(tensorboard, mlflow):
            raise AssertionError
        assert "secret" not in str(refused.value)
