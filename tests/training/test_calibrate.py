from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score, roc_curve

import lungopacity.training.calibrate as calibrating
from lungopacity.models.probabilities import calibrated_logits, softmax
from lungopacity.training.calibrate import (
    calibrate,
    fit_biases,
    fit_temperature,
    negative_log_likelihood,
    shares_shifted,
    warn_of_few,
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


def test_temperature_lowers_the_loss_of_overconfident_logits_and_changes_no_decision() -> None:
    logits_VK, labels_V = calibrated_films(300)
    logits_VK = logits_VK * 5
    temperature = fit_temperature(logits_VK, labels_V)
    before = negative_log_likelihood(logits_VK, labels_V)
    assert negative_log_likelihood(logits_VK / temperature, labels_V) < 0.8 * before
    assert (softmax(logits_VK / temperature).argmax(1) == logits_VK.argmax(1)).all()


def test_films_all_classified_correctly_do_not_lower_the_temperature() -> None:
    logits_VK = np.array([[2.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(logits_VK, np.array([0, 1])) == 1.0


def test_softmax_does_not_overflow_for_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 0.0], [-1e4, -1e4]])), [[1, 0], [0.5, 0.5]])


def shifted_films(count: int = 20_000) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Logits of three classes: twice too large, and too low for the second class."""
    rng = np.random.default_rng(1)
    true_VK = rng.normal(0, 1.5, (count, 3))
    labels_V = (rng.random(count)[:, None] > softmax(true_VK).cumsum(axis=1)).sum(axis=1)
    return 2 * (true_VK - np.array([0.0, 0.9, 0.0])), labels_V.astype(np.int64)


def test_finds_the_class_that_was_rarer_in_training() -> None:
    logits_VK, labels_V = shifted_films()
    temperature, biases = fit_biases(logits_VK, labels_V, fit_temperature(logits_VK, labels_V))
    assert temperature == pytest.approx(2, rel=0.06)
    np.testing.assert_allclose(biases, [-0.3, 0.6, -0.3], atol=0.06)
    calibrated_VK = calibrated_logits(logits_VK, temperature, biases)
    shares = softmax(calibrated_VK).mean(axis=0)
    np.testing.assert_allclose(shares, np.bincount(labels_V) / len(labels_V), atol=1e-3)


def test_temperature_and_biases_are_those_of_a_search_without_gradients() -> None:
    """With few films, so that the prior matters."""
    logits_VK, labels_V = shifted_films(40)

    def loss(point: npt.NDArray[np.float64]) -> float:
        log_p_VK = log_softmax(logits_VK / np.exp(point[0]) + point[1:], axis=1)
        return float(-log_p_VK[np.arange(40), labels_V].mean() + (point[1:] ** 2).sum() / 80)

    found = minimize(loss, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-6})
    temperature, biases = fit_biases(logits_VK, labels_V, 1.0)
    assert temperature == pytest.approx(np.exp(found.x[0]), rel=2e-3)
    np.testing.assert_allclose(biases, found.x[1:], atol=2e-3)


@pytest.mark.parametrize("positive", [0, 1, 2])
def test_decisions_are_about_the_positive_class_in_any_position(positive: int) -> None:
    """The default operating point is Youden's."""
    logits_VK, labels_V = shifted_films(600)
    found = calibrate(logits_VK, labels_V, positive)
    p_V = softmax(calibrated_logits(logits_VK, found.temperature, found.class_biases))[:, positive]
    is_positive_V = labels_V == positive
    assert found.metrics["auc"] == pytest.approx(roc_auc_score(is_positive_V, p_V))
    false_rates, true_rates, _ = roc_curve(is_positive_V, p_V)
    point = found.operating_point
    assert point == found.operating_points["youden"]
    youden = point.sensitivity + point.specificity - 1
    assert youden == pytest.approx((true_rates - false_rates).max())
    called_V = p_V >= point.threshold
    assert called_V[is_positive_V].mean() == pytest.approx(point.sensitivity)


def test_a_class_without_a_film_gets_a_finite_bias() -> None:
    logits_VK, labels_V = shifted_films(300)
    seen = labels_V != 1
    _, biases = fit_biases(logits_VK[seen], labels_V[seen], 1.0)
    assert sum(biases) == pytest.approx(0, abs=1e-3)
    assert -10 < min(biases) == biases[1] < -1


def test_biases_are_for_more_than_two_classes_or_shifted_shares() -> None:
    logits_VK, labels_V = shifted_films(2_000)
    three = calibrate(logits_VK, labels_V, positive=2)
    assert three.class_biases is not None
    right = (logits_VK + 2 * np.array(three.class_biases)).argmax(axis=1) == labels_V
    assert three.metrics["accuracy"] == pytest.approx(right.mean(), abs=0.01)
    assert three.metrics["accuracy"] > (logits_VK.argmax(axis=1) == labels_V).mean() + 0.01
    two = calibrate(*calibrated_films(500), positive=1)
    assert two.class_biases is None


def test_two_classes_that_were_balanced_in_training_get_true_probabilities() -> None:
    logits_VK, labels_V = calibrated_films()
    balanced_VK = logits_VK + np.array([-1.5, 1.5])
    alone, shifted = (calibrate(balanced_VK, labels_V, 1, shifted=told) for told in (False, True))
    assert alone.metrics["loss"] > shifted.metrics["loss"] + 0.1
    p_V = softmax(calibrated_logits(balanced_VK, shifted.temperature, shifted.class_biases))[:, 1]
    assert p_V.mean() == pytest.approx(labels_V.mean(), abs=1e-3)
    rare_V = softmax(logits_VK)[:, 1] < 0.2
    assert p_V[rare_V].mean() == pytest.approx(labels_V[rare_V].mean(), abs=0.02)


def test_films_that_biases_all_correct_do_not_lower_the_temperature() -> None:
    logits_VK = np.array([[0.0, 1.0], [0.0, 1.2], [0.0, 3.0], [0.0, 3.2]])
    temperature, biases = fit_biases(logits_VK, np.array([0, 0, 1, 1]), 20.0)
    assert temperature == 1.0
    assert np.isfinite(biases).all()


def test_two_classes_need_biases_where_they_were_balanced_or_their_odds_differ_twofold() -> None:
    even, fewer, few = (np.arange(1_000) % 1_000 < count for count in (500, 400, 300))
    assert not shares_shifted("none", even.astype(int), fewer.astype(int))
    assert shares_shifted("none", even.astype(int), few.astype(int))
    assert shares_shifted("none", few.astype(int), even.astype(int))
    assert shares_shifted("weights", even.astype(int), even.astype(int))


def test_metrics_compare_before_and_after_calibration() -> None:
    logits_VK, labels_V = calibrated_films(2_000)
    found = calibrate(5 * logits_VK, labels_V, positive=1).metrics
    shares_VK = softmax(5 * logits_VK)
    before = ((shares_VK - np.eye(2)[labels_V]) ** 2).sum(axis=1).mean()
    assert found["brier_before_temperature"] == pytest.approx(before)
    for name in ("loss", "brier", "expected_calibration_error"):
        assert found[name] < 0.9 * found[f"{name}_before_temperature"], name


def test_no_threshold_separates_what_float32_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrating, "fit_temperature", lambda *_: 1.0)
    odds_V, labels_V = np.array([-1.0] * 18 + [25, 28, 26, 30]), np.array([0] * 20 + [1] * 2)
    found = calibrate(np.stack([0 * odds_V, odds_V], axis=1), labels_V, positive=1)
    # As when screening.
    p_V = softmax(np.stack([0 * odds_V, odds_V], axis=1)).astype(np.float32)[:, 1]
    for point in found.operating_points.values():
        decided_V = np.array([point.decide(float(p)) == "positive" for p in p_V])
        assert decided_V[labels_V == 1].mean() == pytest.approx(point.sensitivity)
        assert (~decided_V)[labels_V == 0].mean() == pytest.approx(point.specificity)


def test_operating_points_of_few_films_give_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_few(np.arange(90) % 3, positive=1)
    assert not caplog.text
    warn_of_few(np.arange(89) % 3, positive=2)
    assert "29 validation films are of the positive class and 60 are not" in caplog.text
