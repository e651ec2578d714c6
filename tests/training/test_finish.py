"""What a trained network needs besides its weights; test_fit.py tests it in a model folder."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from lungopacity.training.finish import compiled_of, warn_of_few_to_compare


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
