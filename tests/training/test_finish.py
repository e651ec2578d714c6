"""What a trained network is given besides its weights; test_fit.py sees it in a model folder."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from lungopacity.training.finish import compiled_of, warn_of_few_to_compare


def test_what_ends_the_process_that_compiles_does_not_end_the_training(ray_cluster: None) -> None:
    fatal = type("Fatal", (), {"pixels_NHW": property(lambda _: os._exit(1))})
    model: Any = None
    compiled, told = compiled_of(model, ray.put(fatal()))
    assert compiled is None
    assert "compiling it failed (WorkerCrashedError: " in told


def test_few_validation_films_to_tell_unlike_ones_by_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_few_to_compare(100)
    assert not caplog.text
    warn_of_few_to_compare(20)
    assert "1 in 20 films like them, or more, will be flagged out_of_distribution" in caplog.text
