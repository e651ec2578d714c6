import json
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest

from lungopacity.benchmark.train import _bare, train_speeds
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.models import build_network
from tests.films import encoded, grey_film


@pytest.mark.usefixtures("ray_cluster")
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
    command += ["--workers", "2"]
    assert main(command) == 0
    speeds = json.loads(capfd.readouterr().out)
    assert [speed["way"] for speed in speeds] == ["bare loop", "Ray Train, 2"]
    for speed in speeds:
        assert speed["epochs"] == 2
        # An epoch is its steps, validation and checkpoint.
        assert 0 < speed["images_per_s"] < speed["step_images_per_s"]


def test_one_epoch_is_too_few(tmp_path):
    for wrong in ({"epochs": 1}, {"repeats": 0}, {"workers": [0]}):
        with pytest.raises(UserError, match="--epochs must be at least 2, --repeats and --work"):
            train_speeds([str(tmp_path)], "labels.csv", **wrong)


def test_a_loop_that_ends_early_is_told(monkeypatch):
    ended = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr("lungopacity.benchmark.train.subprocess.run", lambda *_, **__: ended)
    network = build_network("classical-cnn", 2, {})
    monkeypatch.setattr("lungopacity.benchmark.train.first_tensors", lambda *_: ({}, None))
    monkeypatch.setattr("lungopacity.benchmark.train.build_network", lambda *_: network)
    films = SimpleNamespace(classes=2)
    settings = SimpleNamespace(model="", model_settings={}, use_gpu=False)
    with pytest.raises(UserError, match="the loop without Ray ended with 3"):
        _bare(films, settings)
