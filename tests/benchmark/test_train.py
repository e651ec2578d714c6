import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import ray

from lungopacity.benchmark import train
from lungopacity.benchmark.train import _bare, train_speeds
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.training.settings import TrainingSettings
from tests.films import encoded, grey_film
from tests.models.tiny import write_tiny_model


@pytest.mark.usefixtures("ray_cluster", "only_trained")
def test_the_loop_is_timed_without_ray_and_with_workers(tmp_path, capfd):
    rows = []
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(encoded(grey_film(number)))
        label = ("Normal", "Lung_Opacity")[number % 2]
        split = "train" if number < 16 else "validation"
        rows.append((f"{number}.png", label, split, f"patient {number}"))
    labels = pd.DataFrame(rows, columns=["image", "label", "split", "patient_id"])
    labels.to_csv(tmp_path / "labels.csv", index=False)
    command = ["benchmark", "train", "--images", str(tmp_path), "--image-size", "32", "--json"]
    command += ["--labels", str(tmp_path / "labels.csv"), "--epochs", "3", "--repeats", "1"]
    command += ["--workers", "1,3", "--no-gpu", "--precision", "float32"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    *speeds, more = json.loads(out)["figures"]
    assert [speed["way"] for speed in speeds] == ["bare loop", "Ray Train, 1"]
    assert (more["way"], more["note"]) == ("Ray Train, 3", "needs 3 CPUs, there are 2")
    for speed in speeds:
        assert speed["epochs"] == 2
        # An epoch is its steps, validation and checkpoint.
        assert 0 < speed["images_per_s"] < speed["step_images_per_s"]
        # Told as it ended, too.
        assert f" {speed['way']}: {speed['images_per_s']:.1f} images/s\n" in err


@pytest.fixture
def cpus(monkeypatch):
    """A Ray cluster of so many, as far as `_ways` can tell."""

    def of(number, nodes=1):
        monkeypatch.setattr(train, "capacity", lambda: {"CPU": number, "GPU": 0})
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes)

    return of


def test_workers_are_as_many_as_fit(cpus):
    settings = TrainingSettings()
    for number, expected in (
        (1, ["Ray Train, 1"]),
        (8, ["Ray Train, 1", "bare loop, 2", "Ray Train, 2"]),
    ):
        cpus(number)
        _, *ways = train._ways(settings, None, ["auto"], None)
        assert [way.name for way in ways] == expected
        assert [way.settings.workers for way in ways] == [int(name[-1]) for name in expected]
    _, _, *ways = train._ways(settings, [2, 3], ["auto"], None)
    notes = [way.note for way in ways]
    assert notes == ["", "batch_size 32 must be a multiple of workers (3)"]


def test_each_precision_is_a_way_of_its_own(cpus):
    cpus(1)
    ways = train._ways(TrainingSettings(), [1], ["float32", "bfloat16"], None)
    assert [(way.name, way.settings.precision) for way in ways] == [
        ("bare loop, float32", "float32"),
        ("Ray Train, 1, float32", "float32"),
        ("bare loop, bfloat16", "bfloat16"),
        ("Ray Train, 1, bfloat16", "bfloat16"),
    ]


def test_several_nodes_need_a_place_that_all_can_write_to(cpus):
    cpus(8, nodes=2)
    with pytest.raises(UserError, match="has 2 nodes; say with --output URI"):
        train._ways(TrainingSettings(), None, ["auto"], None)
    *_, two = train._ways(TrainingSettings(), None, ["auto"], "s3://scratch")
    assert two.on == "2 CPUs of 2 nodes"


def test_the_network_of_a_model_folder_is_trained_anew(tmp_path):
    write_tiny_model(str(tmp_path / "model"), image_size=64)
    name, words = train._network_of(str(tmp_path / "model"))
    assert (name, words["preprocessing.image_size"]) == ("classical-cnn", "64")
    assert train._network_of("resnet-50") == ("resnet-50", {})
    with pytest.raises(UserError, match="unknown model 'lenet'"):
        train._network_of("lenet")


def test_one_epoch_is_too_few(tmp_path):
    for wrong in ({"epochs": 1}, {"repeats": 0}, {"workers": [0]}):
        with pytest.raises(UserError, match="--epochs must be at least 2, --repeats and --work"):
            train_speeds([str(tmp_path)], "labels.csv", **wrong)


def test_a_loop_that_ends_early_is_told(tmp_path, monkeypatch):
    # The first of two waits for the other.
    waiting = tmp_path / "waiting"
    waiting.write_text('#!/bin/sh\n[ "$4" = 1 ] && exit 3\nexec sleep 60\n')
    waiting.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(waiting))
    films = SimpleNamespace(classes=2)
    with pytest.raises(UserError, match="the loop without Ray ended with exit code 3"):
        _bare(films, replace(TrainingSettings(), workers=2))


def test_a_loop_ends_with_the_benchmark_even_if_that_is_killed(tmp_path):
    started = (
        "from dataclasses import replace\n"
        "from lungopacity.benchmark.train import _bare\n"
        "from lungopacity.training.fit import films_of\n"
        "from tests.training.blobs import SMALL_RUN, blob_films\n"
        "_bare(films_of(blob_films()), replace(SMALL_RUN, workers=2, epochs=10**6))"
    )
    benchmark = psutil.Popen(
        [sys.executable, "-c", started],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "TMPDIR": str(tmp_path)},
    )
    loops: list[psutil.Process] = []
    try:
        while len(loops) < 2 and benchmark.poll() is None:
            time.sleep(0.05)
            loops = benchmark.children()
        benchmark.kill()
        benchmark.wait()
        assert len(loops) == 2
        deadline = time.monotonic() + 120
        while any(map(_runs, loops)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_runs, loops))
    finally:
        for process in (benchmark, *loops):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
