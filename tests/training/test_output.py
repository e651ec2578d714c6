"""Which files `fit` leaves in the output, its own and others', without Ray."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train import Checkpoint
from ray.train.v2.api.exceptions import ControllerError

from lungopacity.errors import UserError
from lungopacity.models import load_model
from lungopacity.storage import open_store
from lungopacity.training import ray_run
from lungopacity.training.checkpoint import (
    lasting_disk_errors,
    rows_of_before,
    uploaded,
)
from lungopacity.training.fit import _run_name, films_of, fit
from lungopacity.training.loop import Films, Worker, learn
from lungopacity.training.settings import TrainingSettings
from tests.fault_proxy import fault_proxy
from tests.training.blobs import SMALL_RUN, blob_films

FEW = blob_films(train=16, validation=8, test=0)
SHORT = replace(SMALL_RUN, epochs=1)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[TrainingSettings], None]]:
    """Lets `fit` train in this process; functions put into the list are called after training."""
    then: list[Callable[[TrainingSettings], None]] = []

    def trained(films: Films, first: None, settings: TrainingSettings, uri: str, run: str, _: Any):
        points: list[tuple[SimpleNamespace, dict[str, Any]]] = []

        def report(row: dict[str, Any], _: Any, save: Callable[[str], None]) -> None:
            folder = Path(uri, run, f"checkpoint_{row['epoch']}")
            folder.mkdir(parents=True)
            save(str(folder))
            points.append((SimpleNamespace(path=str(folder)), row))

        learn(Worker(settings, films, 0, 1, torch.device("cpu")), first, None, report)
        for call in then:
            call(settings)
        return SimpleNamespace(
            return_value={"diverged_in_epoch": None},
            best_checkpoints=points,
            checkpoint=points[-1][0],
        )

    for name, stand_in in (
        ("run_ray_train", trained),
        ("require_resources", lambda *_: None),
        ("distribution_of", lambda *_: None),
        ("compiled_of", lambda *_: (None, "")),
        ("LEASE_S", 1.0),
    ):
        monkeypatch.setattr(f"lungopacity.training.fit.{name}", stand_in)
    monkeypatch.setattr("ray.put", lambda films: films)
    return then


def test_two_trainings_of_one_output_keep_each_others_checkpoints(
    without_ray: list[Callable[[TrainingSettings], None]], tmp_path: Path
) -> None:
    output, other = str(tmp_path / "model"), replace(SHORT, learning_rate=2e-3)
    runs = [_run_name(FEW, settings, None) for settings in (SHORT, other)]

    def the_other_begins_and_ends(settings: TrainingSettings) -> None:
        if settings is SHORT:
            fit(FEW, other, output)
            assert [path.name for path in Path(output, "_training").iterdir()] == [runs[0]]

    without_ray.append(the_other_begins_and_ends)
    with pytest.raises(UserError, match=f"another training finished first.*_training/{runs[0]}: "):
        fit(FEW, SHORT, output)
    assert load_model(output).spec.training["settings"]["learning_rate"] == 2e-3
    assert len(rows_of_before(output, runs[0])) == 1
    assert {path.name for path in Path(output).iterdir()} >= {"SHA256SUMS", "_training"}
    assert not Path(output, "_lock").exists()


def test_the_same_training_does_not_run_twice_at_once(
    without_ray: list[Callable[[TrainingSettings], None]], tmp_path: Path
) -> None:
    output = str(tmp_path / "model")
    said: list[str] = []

    def again(_: TrainingSettings) -> None:
        without_ray.clear()
        with pytest.raises(UserError) as refused:
            fit(FEW, SHORT, output)
        said.append(str(refused.value))

    without_ray.append(again)
    fit(FEW, SHORT, output)
    assert "another job is at work there: training of classical-cnn" in said[0]
    assert {path.name for path in Path(output).iterdir()}.isdisjoint({"_lock", "_training"})


def test_a_model_is_finished_even_if_its_checkpoints_cannot_be_removed(
    without_ray: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("AWS Error SLOW_DOWN during DeleteObjects operation")

    monkeypatch.setattr("lungopacity.training.checkpoint.FileSelector", broken)
    caplog.set_level("INFO", "lungopacity")
    result = fit(FEW, SHORT, str(tmp_path / "model"))
    # What follows the last epoch takes minutes on many films.
    assert "epoch 1 is kept; its network now scores all films once more" in caplog.text
    assert (
        "compiling the network for CPUs, and comparing it with torch on validation films"
        in caplog.text
    )
    assert load_model(str(tmp_path / "model")).model_id == result.model.model_id
    assert "could not be removed (OSError: AWS Error SLOW_DOWN" in caplog.text


def test_lasting_disk_errors_are_user_errors_and_others_are_not() -> None:
    for number, told in (
        (errno.EROFS, "Read-only file system"),
        (errno.EDQUOT, "quota exceeded"),
        (errno.EACCES, "Permission denied"),
        (errno.EPERM, "not permitted"),
    ):
        with (
            pytest.raises(UserError, match=rf"^/out/m: a checkpoint cannot be .*{told}\); free"),
            lasting_disk_errors("/out/m"),
        ):
            raise OSError(number, "Error writing bytes to file. Detail: [errno 30]")
    for error in (OSError(errno.EIO, "Input/output error"), OSError("AWS Error SLOW_DOWN")):
        with pytest.raises(OSError, match=re.escape(str(error))), lasting_disk_errors("/out/m"):
            raise error


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([OSError("AWS Error SLOW_DOWN"), OSError(errno.EIO, "Input/output error")], None),
        ([OSError("AWS Error SLOW_DOWN")] * 9, r"given up: OSError: AWS Error SLOW_DOWN; its fini"),
        (
            [OSError(errno.ENOSPC, "full")],
            r"given up: OSError: \[Errno 28\] full; its finished epo",
        ),
        ([ValueError("ours")], "given up: ValueError: ours; its finished epochs are kept"),
    ],
)
def test_a_record_that_storage_refuses_for_a_moment_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    errors: list[Exception], said: str | None,
) -> None:  # fmt: skip
    """Ray raises as it writes `checkpoint_manager_snapshot.json`."""
    left = list(errors)

    def fit(_: object) -> str:
        if left:
            raise ControllerError(left.pop(0))
        return "trained"

    monkeypatch.setattr("ray.put", lambda films: films)
    monkeypatch.setattr(ray_run, "_PAUSE_S", 0.0)
    monkeypatch.setattr(ray_run.TorchTrainer, "fit", fit)
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        found = ray_run.run_ray_train(films_of(FEW), None, SHORT, str(tmp_path), "run", None)
        assert found == "trained"
    assert len(errors) - len(left) == min(len(errors), 4)
    again = "OSError: AWS Error SLOW_DOWN; training starts again after its last finished epoch"
    assert caplog.messages.count(again) == {2: 1, 9: 3}.get(len(errors), 0)


@pytest.mark.parametrize(
    ("fault", "raised", "told"),
    [
        (
            "403",
            UserError,
            r"access denied \(AccessDenied\).*; fix this, and the same command resumes",
        ),
        # After a restart the server may work again.
        ("503", ConnectionError, "answered SlowDown"),
    ],
)
def test_a_checkpoint_that_s3_refuses_is_an_error(
    s3_server: Any, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: Any, raised: type[Exception], told: str,
) -> None:  # fmt: skip
    """S3 refuses parts of the upload, for which Arrow's own copy raises no error."""
    (tmp_path / "network.safetensors").write_bytes(b"weights")
    place, local = f"{s3_uri}/_training/run", Checkpoint.from_directory(str(tmp_path))
    filesystem, root = open_store(place).arrow_filesystem()
    with fault_proxy(s3_server.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.choose_any = lambda method, *_: fault if method == "PUT" else None
        with pytest.raises(raised, match=rf"cannot be kept: {place}/checkpoint_1 .*{told}"):
            uploaded(place, filesystem, local, "checkpoint_1")
        proxy.choose_any = None
        kept = uploaded(place, filesystem, local, "checkpoint_1")
    assert kept.path == f"{root}/checkpoint_1"
    with kept.as_directory() as folder:
        assert Path(folder, "network.safetensors").read_bytes() == b"weights"
