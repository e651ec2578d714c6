from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_curve

from lungopacity.training.calibrate import (
    fit_temperature,
    negative_log_likelihood,
    softmax,
    youden_point,
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


def test_operating_point_reaches_the_best_sum_of_sensitivity_and_specificity() -> None:
    logits_VK, labels_V = calibrated_films(500)
    scores_V, positive_V = softmax(logits_VK)[:, 1], labels_V == 1
    point = youden_point(scores_V, positive_V)
    decided_V = scores_V >= point.threshold
    assert point.sensitivity == pytest.approx(decided_V[positive_V].mean())
    assert point.specificity == pytest.approx(1 - decided_V[~positive_V].mean())
    false_positive_rate, true_positive_rate, _ = roc_curve(positive_V, scores_V)
    best = (true_positive_rate - false_positive_rate).max()
    assert point.sensitivity + point.specificity - 1 == pytest.approx(best)
    assert point.images == 500


def test_operating_point_lies_between_scores() -> None:
    scores_V = np.array([0.1, 0.2, 0.7, 0.9], np.float32)
    point = youden_point(scores_V, np.array([False, False, True, True]))
    assert point.threshold == pytest.approx(0.45)
    assert (point.sensitivity, point.specificity) == (1.0, 1.0)


def test_of_equally_good_thresholds_the_more_sensitive_is_chosen() -> None:
    point = youden_point(np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, True, False, True]))
    assert (point.sensitivity, point.specificity) == (1.0, 0.5)


def test_operating_point_of_constant_scores_calls_all_positive() -> None:
    point = youden_point(np.full(4, 0.5), np.array([False, True, False, True]))
    assert point.threshold == 0.25
