"""`fit` on a real Ray. A run takes seconds, so several tests share one."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from lungopacity import observe
from lungopacity.dataset.manifest import SPLITS
from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.errors import UserError
from lungopacity.models import films_known_to, load_model, read_history, read_validation
from lungopacity.models.folder import KnownFilms, training_films_parquet
from lungopacity.models.scorer import Scorer
from lungopacity.storage import join_uri
from lungopacity.training.checkpoint import rows_of_before
from lungopacity.training.fit import (
    HISTORY_SCHEMA,
    TrainingResult,
    _run_name,
    check_validation,
    fit,
    start_of,
)
from lungopacity.training.tracking import run_logs
from tests.models.tiny import write_tiny_model
from tests.parquet_pages import has_page_checksums
from tests.training.blobs import EVERYTHING, SMALL_RUN, blob_films, chosen
from tests.training.full_disk import full_disk_loop
from tests.training.logs_read import mlflow_run, tensorboard_events
from tests.training.resting import resting_loop_in_private_ray

ROOT = Path(__file__).parents[2]
FILMS = blob_films()


@dataclass
class Run:
    output: str
    result: TrainingResult
    seen: list[int]
    """Epochs in the order in which `on_epoch` got them."""


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = str(tmp_path_factory.mktemp("run") / "model")
    seen: list[int] = []
    result = fit(
        FILMS,
        EVERYTHING,
        output,
        label_map={"Healthy": "Normal", "Lung_Opacity": "Lung_Opacity"},
        left_out={"train": {"TB": 3}},
        provenance={"labels": "labels.csv"},
        on_epoch=lambda row: seen.append(row["epoch"]),
    )
    return Run(output, result, seen)


def test_learns_what_tells_the_classes_apart(run: Run) -> None:
    scorer = Scorer(load_model(run.output))
    unseen = FILMS.split_N == "test"
    logits_NK = scorer.logits(FILMS.pixels_NHW[unseen])
    assert (logits_NK.argmax(1) == FILMS.labels_N[unseen]).mean() > 0.9
    assert run.result.model.spec.metrics["accuracy"] > 0.9
    assert run.result.model.spec.metrics["auc"] > 0.95


def test_tells_its_training_films_from_others(run: Run) -> None:
    scorer = Scorer(load_model(run.output))

    def unlike(pixels_NHW: np.ndarray) -> np.ndarray:
        return scorer.out_of_distribution(scorer.scores(pixels_NHW).features_NF) > 1

    # By definition 1 in 100 validation films is, and of unseen films somewhat more.
    assert unlike(FILMS.pixels_NHW[FILMS.split_N == "validation"]).mean() <= 0.05
    assert unlike(FILMS.pixels_NHW[FILMS.split_N == "test"]).mean() <= 0.2
    assert unlike(255 - FILMS.pixels_NHW).mean() > 0.9


def test_keeps_the_weights_of_the_epoch_with_the_lowest_validation_loss(run: Run) -> None:
    losses = [row["validation_loss"] for row in run.result.history]
    assert run.result.best_epoch == 1 + int(np.argmin(losses))
    validation = FILMS.split_N == "validation"
    logits_VK = Scorer(run.result.model).logits(FILMS.pixels_NHW[validation])
    labels_V = FILMS.labels_N[validation]
    shifted_VK = logits_VK - logits_VK.max(1, keepdims=True)
    log_p_VK = shifted_VK - np.log(np.exp(shifted_VK).sum(1, keepdims=True))
    loss = -log_p_VK[np.arange(len(labels_V)), labels_V].mean()
    assert loss == pytest.approx(min(losses), rel=1e-4)


def test_every_epoch_reaches_the_caller_and_the_history(run: Run) -> None:
    assert run.seen == [1, 2, 3, 4, 5, 6]
    data = read_history(run.output)
    assert has_page_checksums(data)
    history = pq.read_table(io.BytesIO(data))
    assert history.schema.equals(HISTORY_SCHEMA)
    assert history["epoch"].to_pylist() == run.seen
    assert history["train_loss"].to_pylist()[-1] < history["train_loss"].to_pylist()[0]


def test_model_folder_records_how_the_model_was_trained(run: Run) -> None:
    spec = load_model(run.output).spec
    assert spec.synthetic
    assert spec.architecture_settings["batch_norm"] is True
    assert spec.training["settings"]["epochs"] == 6
    assert spec.training["data"]["fingerprint"] == FILMS.fingerprint
    assert spec.training["data"]["images"]["train"] == {"Normal": 48, "Lung_Opacity": 48}
    left_out = {"labels": {"train": {"TB": 3}}, "unreadable": {}}
    assert spec.training["data"]["left_out"] == left_out
    assert spec.training["provenance"] == {"labels": "labels.csv"}
    assert spec.training["on_cpus"].startswith("CPUs run the network ")
    assert spec.training["data"]["split_seed"] == spec.split_seed == 0
    assert spec.training["best_epoch"] == run.result.best_epoch
    assert spec.operating_point.images == 41
    assert spec.class_biases is not None  # the classes were balanced
    assert spec.label_map == {"Healthy": "Normal", "Lung_Opacity": "Lung_Opacity"}


def test_model_folder_keeps_the_logits_of_the_validation_films(run: Run) -> None:
    data = read_validation(run.output)
    assert has_page_checksums(data)
    kept = pq.read_table(io.BytesIO(data))
    validation = FILMS.split_N == "validation"
    logits_VK = Scorer(run.result.model).logits(FILMS.pixels_NHW[validation])
    stored_VK = np.stack([kept["logit_Normal"], kept["logit_Lung_Opacity"]], axis=1)
    np.testing.assert_allclose(stored_VK, logits_VK, atol=1e-4)
    images = FILMS.images[validation]
    assert kept["content_sha256"].to_pylist() == images["content_sha256"].to_list()
    assert kept["label"].to_pylist() == images["label"].to_list()
    assert kept["view_position"].to_pylist() == ["PA" if n % 2 else None for n in images.index]


def test_model_folder_lists_the_films_that_no_test_may_use(run: Run) -> None:
    digests = FILMS.images["content_sha256"]
    assert films_known_to(run.output) == set(digests[FILMS.split_N != "test"])
    assert set(digests[FILMS.split_N == "test"])


def test_leaves_nothing_but_the_model(run: Run) -> None:
    names = {path.name for path in Path(run.output).iterdir()}
    # On a busy machine, whether so small a network is faster compiled is a matter of chance.
    assert names - {"compiled.safetensors"} == {
        "model.safetensors",
        "model.json",
        "distribution.safetensors",
        "history.parquet",
        "validation.parquet",
        "training_films.parquet",
        "SHA256SUMS",
    }


def test_refuses_to_overwrite_a_model(run: Run) -> None:
    with pytest.raises(UserError, match="holds a finished model"):
        fit(FILMS, SMALL_RUN, run.output)


def test_a_killed_run_resumes_to_the_same_weights_as_one_never_killed(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ray_cluster: str,
) -> None:
    caplog.set_level(logging.INFO, "lungopacity")
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(
        "lungopacity.training.fit.LEASE_S", 2.0
    )  # so that the killed run's lease ends soon
    monkeypatch.setattr("lungopacity.training.fit.compiled_of", lambda *_: (None, ""))  # costly
    output, places = str(tmp_path / "model"), (str(tmp_path / "tb"), f"file://{tmp_path}/mlruns")
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.training.crashing_run", address, output, *places]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "epoch 2":
                break
        process.kill()
    assert list(Path(output, "_training").glob("*/checkpoint_*"))

    seen: list[int] = []
    names: list[str] = []
    with run_logs(*places) as logs:

        def start(name: str, earlier: list[dict[str, Any]]) -> None:
            names.append(name)
            assert [row["epoch"] for row in earlier] == [1, 2]
            logs.start(name, EVERYTHING, output, earlier)

        def epoch(row: dict[str, Any]) -> None:
            seen.append(row["epoch"])
            logs.epoch(row)

        result = fit(FILMS, EVERYTHING, output, on_start=start, on_epoch=epoch)
        logs.finish(result)
    assert observe._run_id == names[0]
    train, validation = (int((FILMS.split_N == split).sum()) for split in SPLITS[:2])
    count = train + validation + 3 * train  # each training film also in three turns
    assert f"where the training films lie: {count} of {count} images" in caplog.text
    assert "compiling the network for CPUs, and comparing" in caplog.text
    assert seen == [3, 4, 5, 6]
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.model.model_id == run.result.model.model_id
    assert not Path(output, "_training").exists()

    losses = [(row["epoch"], pytest.approx(row["train_loss"])) for row in result.history]
    events = tensorboard_events(join_uri(places[0], names[0]), tmp_path / "copy")
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == losses
    _, histories = mlflow_run(places[1], names[0])
    assert histories["train_loss"] == losses


def test_two_workers_train_one_model_and_survive_the_loss_of_one(
    ray_cluster: None, only_trained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungopacity.training.ray_run.train_loop", resting_loop_in_private_ray)
    # Odd numbers: neither the films nor the batches divide evenly.
    films = blob_films(train=97, validation=43)
    seen: list[int] = []
    killed: list[int] = []
    idle: list[int] = []

    def idle_actors() -> set[int]:
        titles = "ray::DatasetManager", "ray::_AutoscalingCoordinatorActor"
        return {process for title in titles for process in _own_processes(title)}

    before = idle_actors()  # of other tests' jobs in this Ray

    def kill_one_worker(row: dict[str, Any]) -> None:
        seen.append(row["epoch"])
        if row["epoch"] == 2 and not killed:
            killed.append(_own_processes("ray::RayTrainWorker")[0])
            os.kill(killed[0], signal.SIGKILL)
            idle.extend(idle_actors() - before)

    settings = replace(SMALL_RUN, workers=2, epochs=6, class_balance="weights")
    result = fit(films, settings, str(tmp_path / "model"), on_epoch=kill_one_worker)
    assert killed
    assert not idle
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in result.history] == seen
    assert result.model.spec.metrics["accuracy"] > 0.9


def test_a_full_disk_ends_the_training_at_once(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lungopacity.training.ray_run.train_loop", full_disk_loop)
    said = r"^/\S+ on \S+: a checkpoint cannot be written \(No space left on device\); free space"
    # Each worker waits for the report of the other.
    with pytest.raises(UserError, match=said):
        fit(FILMS, replace(SMALL_RUN, workers=2), str(tmp_path / "model"))
    assert (tmp_path / "model.starts").read_text() == "xx"


def test_films_in_another_order_are_another_run() -> None:
    """Checkpoints keep the logits of the validation films in their order."""
    turned = chosen(FILMS, np.arange(len(FILMS.labels_N))[::-1])
    assert turned.fingerprint == FILMS.fingerprint
    assert _run_name(turned, SMALL_RUN, None) != _run_name(FILMS, SMALL_RUN, None)


def test_refuses_more_workers_than_the_cluster_can_ever_run(
    ray_cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="needs 64 CPUs"):
        fit(FILMS, replace(SMALL_RUN, workers=64, batch_size=128), str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda films: films.split_N != "validation", "no film is in the validation split"),
        (
            lambda films: (films.split_N != "train") | (films.labels_N == 0),
            "no film of class 'Lung_Opacity' is in the train split",
        ),
        (
            lambda films: (films.split_N != "validation") | (films.labels_N == 1),
            "no film of class 'Normal' is in the validation split",
        ),
    ],
)
def test_refuses_films_from_which_nothing_can_be_learned(
    spoil: Callable[[LabelledPixels], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(chosen(FILMS, spoil(FILMS)), SMALL_RUN, str(tmp_path))


def test_refuses_first_weights_that_learnt_from_a_validation_film(
    ray_cluster: None, tmp_path: Path
) -> None:
    digests = FILMS.images["content_sha256"]
    learnt, validated = (digests[FILMS.split_N == split].to_list() for split in SPLITS[:2])
    uri, settings = str(tmp_path / "first"), SMALL_RUN
    # Films that the other model was only validated on are allowed: models of one split share them.
    for more, refused in ((validated[:3], True), ([], False)):
        write_tiny_model(
            uri,
            training_films_parquet([*learnt, *more]),
            architecture_settings=SMALL_RUN.model_settings,
        )
        settings = replace(SMALL_RUN, weights=f"{uri}/model.safetensors")
        start = start_of(settings, FILMS.class_names)
        assert start.first is not None
        assert start.first.known.learnt_from == {*learnt, *more}
        if refused:
            with pytest.raises(UserError, match=r"learnt from 3 of 41 films of the validation spl"):
                fit(FILMS, settings, str(tmp_path / "model"), start=start)
        else:
            check_validation(FILMS, start.first)
    chosen_by = KnownFilms(frozenset(learnt), frozenset(validated))
    check_validation(FILMS, replace(start.first, known=chosen_by))


def test_a_training_that_starts_beside_unfinished_ones_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place, history in (
        ("old/checkpoint_1", '[{"epoch": 1}]'),
        ("new/checkpoint_10", '[{"epoch": 1}, {"epoch": 2}]'),
        ("new/checkpoint_11", '[{"epoch": 1}, {"ep'),  # it was killed as it wrote this
        ("new/checkpoint_9", '[{"epoch": 1}]'),
    ):
        folder = tmp_path / "_training" / place
        folder.mkdir(parents=True)
        (folder / "history.json").write_text(history)
    assert rows_of_before(str(tmp_path), "new") == [{"epoch": 1}, {"epoch": 2}]
    assert caplog.text == ""
    assert rows_of_before(str(tmp_path), "third") == []
    assert "holds 2 unfinished trainings with other settings, films, splits" in caplog.text


def test_names_what_a_killed_run_left_half_written(ray_cluster: None, tmp_path: Path) -> None:
    output = str(tmp_path / "model")

    def begin_as_one_that_was_killed(run: str, earlier: list[dict[str, Any]]) -> None:
        folder = Path(output, "_training", run)
        folder.mkdir(parents=True)
        (folder / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.')

    with pytest.raises(UserError, match=r"in .*/_training/\w+ cannot be read .*; remove that"):
        fit(FILMS, SMALL_RUN, output, on_start=begin_as_one_that_was_killed)


def test_refuses_names_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Normal, Lung_Opacity"):
        fit(FILMS, replace(SMALL_RUN, positive_class="Fracture"), str(tmp_path))
    with pytest.raises(UserError, match="classical-cnn"):
        fit(FILMS, replace(SMALL_RUN, model="resnet-1"), str(tmp_path))


def _own_processes(title: str) -> list[int]:
    """Processes with this title that descend from this one, as Ray's workers do."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            if (folder / "cmdline").read_text().startswith(title):
                found.append(int(folder.name))
        except FileNotFoundError:
            continue

    def is_own(process: int) -> bool:
        while process in parents:
            if process == os.getpid():
                return True
            process = parents[process]
        return False

    return [process for process in found if is_own(process)]
