"""A search whose trials do not run: they are told of as Tune would."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lungopacity.training.tune as tuning
from lungopacity.training.task import TrainingTask
from lungopacity.training.trials import Trials
from lungopacity.training.tune import TuneResult
from tests.training.blobs import blob_films

SEARCH = {"learning_rate": "log:1e-4:1e-2", "label_smoothing": "uniform:0:0.3"}


def tell(known: Trials, number: int, *losses: float) -> None:
    """That a trial ran to its end, with the validation loss of each epoch."""
    trial = SimpleNamespace(config={"trial": number}, pickled_error_file=None)
    for epoch, loss in enumerate(losses, start=1):
        row = {"epoch": epoch, "validation_loss": loss, "seconds": 1.0}
        known.on_trial_result(0, [], trial, row)
    known.on_trial_complete(0, [], trial)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TuneResult]:
    """`tune` of five trials without Ray; the later a trial, the better."""
    (tmp_path / "labels.csv").write_text(
        "image,label,split\n"
        + "".join(
            f"{split}{label}.png,{label},{split}\n"
            for split in ("train", "validation")
            for label in ("Normal", "Lung_Opacity")
        )
    )

    def run(*given: Any) -> None:
        known, waiting, _ = given[-3:]
        for number in waiting:
            tell(known, number, 1 / (1 + number))

    monkeypatch.setattr(tuning, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(tuning, "resolve_gpu", bool)
    monkeypatch.setattr(tuning, "require_resources", lambda *_: None)
    monkeypatch.setattr(TrainingTask, "load", lambda _: blob_films(8, 6, 0))
    monkeypatch.setattr(tuning, "_run", run)
    common = {"images": ["films"], "labels": str(tmp_path / "labels.csv"), "trials": 5,
              "output": str(tmp_path / "out"), "search": SEARCH}  # fmt: skip
    return lambda **more: tuning.tune(**{**common, **more})


def test_the_best_is_said_with_the_words_that_it_was_trained_with(search, tmp_path) -> None:
    for given in (SEARCH, dict(reversed(SEARCH.items()))):
        best = search(search=given).best
        kept = json.loads((tmp_path / "out" / "trials" / "00004.json").read_text())
        assert best["trial"] == 4
        assert best["settings"] == kept["words"]
        assert all(
            f"--set {name}={word}" in best["command"] for name, word in kept["words"].items()
        )
