"""What `train` tells TensorBoard and MLflow, read back by their own readers."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lungopacity.errors import UserError
from lungopacity.storage import join_uri
from lungopacity.training.fit import TrainingResult
from lungopacity.training.tracking import _as_user_error, run_logs
from tests.models.tiny import tiny_model
from tests.training.blobs import SMALL_RUN
from tests.training.logs_read import mlflow_run, scalars, tensorboard_events

RUN = "0123456789abcdef"
MODEL = "s3://films/models/first"


def row(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 2 / epoch, "workers": 1}


@pytest.fixture(autouse=True)
def _file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow keeps its folder store for those that ask for it; a database wants all of mlflow.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def result(epochs: int) -> TrainingResult:
    metrics = {"auc": 0.9, "loss": 0.3}
    model = tiny_model(temperature=1.25, synthetic=True, metrics=metrics)
    return TrainingResult(model, [row(epoch) for epoch in range(1, epochs + 1)], best_epoch=2)


def told(tensorboard: str | None, mlflow: str | None, epochs: int, earlier: int = 0) -> None:
    """A whole run of which `earlier` epochs were trained before a crash."""
    with run_logs(tensorboard, mlflow) as logs:
        logs.start(RUN, SMALL_RUN, MODEL, [row(epoch) for epoch in range(1, earlier + 1)])
        for epoch in range(earlier + 1, epochs + 1):
            logs.epoch(row(epoch))
        logs.finish(result(epochs))


def crashed(tensorboard: str | None, mlflow: str | None, epochs: int) -> None:
    """A run that ends in its middle, as by Ctrl-C."""

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


def test_an_epoch_is_readable_as_soon_as_it_is_told(store_uri: str, tmp_path: Path) -> None:
    with run_logs(store_uri, None) as logs:
        logs.start(RUN, SMALL_RUN, MODEL, [])
        logs.epoch(row(1))
        events = tensorboard_events(join_uri(store_uri, RUN), tmp_path / "copy")
        assert scalars(events, "train_loss") == {1: 1.0}


def test_of_what_mlflow_says_the_first_sentence_is_told() -> None:
    said = r"^--mlflow x: cannot be written to \(No such store\)$"
    with pytest.raises(UserError, match=said), _as_user_error("--mlflow x"):
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


def test_a_resumed_run_tells_no_epoch_twice_and_loses_none(tmp_path: Path) -> None:
    tensorboard, mlflow = str(tmp_path / "tb"), f"file://{tmp_path}/mlruns"
    crashed(tensorboard, mlflow, epochs=2)
    # The third epoch was trained and not told.
    told(tensorboard, mlflow, epochs=5, earlier=3)
    events = tensorboard_events(str(tmp_path / "tb" / RUN), tmp_path / "copy")
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5]
    run, histories = mlflow_run(mlflow, RUN)
    assert [step for step, _ in histories["train_loss"]] == [1, 2, 3, 4, 5]
    assert run.info.status == "FINISHED"


def test_a_run_that_ends_without_a_model_is_not_left_running(tmp_path: Path) -> None:
    crashed(None, f"file://{tmp_path}/mlruns", epochs=1)
    assert mlflow_run(f"file://{tmp_path}/mlruns", RUN)[0].info.status == "FAILED"


def test_a_log_that_breaks_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = tmp_path / "mlruns"
    with caplog.at_level(logging.WARNING), run_logs(None, f"file://{mlflow}") as logs:
        logs.start(RUN, SMALL_RUN, MODEL, [])
        logs.epoch(row(1))
        shutil.move(mlflow, tmp_path / "away")
        logs.epoch(row(2))
        assert "not written" in caplog.text
        shutil.move(tmp_path / "away", mlflow)
        logs.epoch(row(3))
        logs.finish(result(3))
    _, histories = mlflow_run(f"file://{mlflow}", RUN)
    assert sorted(step for step, _ in histories["train_loss"]) == [1, 2, 3]


def test_without_mlflow_the_mend_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
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
        (None, "ftp://server", "--mlflow ftp://server: cannot be written to"),
    ):
        with pytest.raises(UserError, match=said) as refused, run_logs(tensorboard, mlflow):
            raise AssertionError
        assert "secret" not in str(refused.value)
