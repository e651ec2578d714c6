"""What a trained network needs besides its weights; test_fit.py tests it in a model folder."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import ray
import torch

from lungopacity.evaluation import evaluate
from lungopacity.training import finish
from lungopacity.training.finish import compiled_of, distribution_of, warn_of_few_to_compare
from lungopacity.training.fit import films_of
from tests.training.blobs import blob_films


def test_a_crash_while_compiling_does_not_end_the_training(ray_cluster: None) -> None:
    fatal = type("Fatal", (), {"pixels_NHW": property(lambda _: os._exit(1))})
    model: Any = None
    compiled, told = compiled_of(model, ray.put(fatal()))
    assert compiled is None
    assert "compiling it failed (WorkerCrashedError: " in told


def test_too_few_validation_films_for_the_distance_give_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_few_to_compare(100)
    assert not caplog.text
    warn_of_few_to_compare(20)
    assert (
        "about 1 in 20 films like them or more will be flagged out_of_distribution" in caplog.text
    )


def test_films_are_scored_with_the_cpus_that_a_container_may_use(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a training, and to evaluate a model."""

    def network(_: Any) -> None:
        raise ValueError(f"{torch.get_num_threads()} threads")

    for module in (finish, evaluate):
        monkeypatch.setattr(module, "cpus_here", lambda: 7)
    telling = {"compiled": None, "training_distribution": lambda _: None, "network": network}
    model: Any = type("Model", (), telling)()
    films = films_of(blob_films(train=4, validation=4))
    with pytest.raises(ValueError, match="7 threads"):
        distribution_of(model, films, ray.put(films), use_gpu=False)
    with pytest.raises(ValueError, match="7 threads"):
        evaluate._scores(model, np.zeros((1, 32, 32), np.uint8), use_gpu=False)
