from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lungopacity.training.calibrate import (
    fit_temperature,
    negative_log_likelihood,
    softmax,
)


def calibrated_films(count: int = 20_000) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Logits, and labels drawn from their softmax: their true temperature is 1."""
    rng = np.random.default_rng(0)
    logits_VK = rng.normal(0, 1.5, (count, 2))
    return logits_VK, (rng.random(count) < softmax(logits_VK)[:, 1]).astype(np.int64)


@pytest.mark.parametrize("confidence", [0.5, 1.0, 4.0])
def test_finds_the_factor_by_which_logits_were_inflated(confidence: float) -> None:
    logits_VK, labels_V = calibrated_films()
    assert fit_temperature(logits_VK * confidence, labels_V) == pytest.approx(confidence, rel=0.06)


def test_temperature_lowers_the_loss_of_overconfident_logits_and_no_decision() -> None:
    logits_VK, labels_V = calibrated_films(300)
    logits_VK = logits_VK * 5
    temperature = fit_temperature(logits_VK, labels_V)
    before = negative_log_likelihood(logits_VK, labels_V)
    assert negative_log_likelihood(logits_VK, labels_V, temperature) < 0.8 * before
    assert (softmax(logits_VK, temperature).argmax(1) == logits_VK.argmax(1)).all()


def test_films_all_classified_rightly_do_not_sharpen_the_model_without_end() -> None:
    logits_VK = np.array([[2.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(logits_VK, np.array([0, 1])) == 1.0


def test_softmax_bears_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 0.0], [-1e4, -1e4]])), [[1, 0], [0.5, 0.5]])
