"""Fits the temperature, class biases and operating points to validation logits.

Array names carry their shape: V validation films, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.metrics import calibration_bins
from lungopacity.evaluation.operating_points import FEWEST_IMAGES, STANDARD, pick
from lungopacity.models import OperatingPoint
from lungopacity.models.probabilities import calibrated_logits, softmax

log = logging.getLogger(__name__)

_LOG_TEMPERATURE_LIMIT = np.log(20.0)


@dataclass(frozen=True)
class Calibration:
    """What the validation films determine: how logits are calibrated, and where to decide."""

    temperature: float
    class_biases: tuple[float, ...] | None
    operating_point: OperatingPoint
    """The default operating point: Youden's."""
    operating_points: Mapping[str, OperatingPoint]
    """All of `STANDARD`, by rule."""
    metrics: Mapping[str, float]
    """Of calibrated scores, except those named `..._before_temperature`. Sensitivity and
    specificity are at `operating_point`; `loss` is in nats."""


def warn_of_few(labels_V: npt.NDArray[np.int64], positive: int) -> None:
    """Warns where too few validation films are positive, or negative, to pick operating points."""
    positives = int((labels_V == positive).sum())
    counts = (positives, len(labels_V) - positives)
    if min(counts) < FEWEST_IMAGES:
        log.warning(
            "%d validation films are of the positive class and %d are not: with fewer than %d of "
            "either, the operating points and their sensitivity and specificity are mostly chance",
            *counts,
            FEWEST_IMAGES,
        )


def calibrate(
    logits_VK: npt.NDArray[np.floating],
    labels_V: npt.NDArray[np.int64],
    positive: int,
    *,
    shifted: bool = False,
) -> Calibration:
    """Fits everything to the validation films. labels_V: class indices. `positive`: index of the
    class that decisions are about; it and another class must occur. shifted: fit class biases for
    two classes, too; more classes always have them. See `shares_shifted`."""
    from sklearn.metrics import roc_auc_score

    temperature, biases = fit_temperature(logits_VK, labels_V), None
    if shifted or logits_VK.shape[1] > 2:
        temperature, biases = fit_biases(logits_VK, labels_V, temperature)
    calibrated_VK = calibrated_logits(logits_VK, temperature, biases)
    # float32 as in `ModelSpec.probabilities`, so that thresholds apply to the same values.
    probabilities_V = softmax(calibrated_VK).astype(np.float32)[:, positive]
    points = {rule: pick(rule, probabilities_V, labels_V == positive) for rule in STANDARD}
    point = points[STANDARD[0]]
    assert point.sensitivity is not None
    assert point.specificity is not None
    metrics = {
        "loss": negative_log_likelihood(calibrated_VK, labels_V),
        "loss_before_temperature": negative_log_likelihood(logits_VK, labels_V),
        "accuracy": float((calibrated_VK.argmax(axis=1) == labels_V).mean()),
        "auc": float(roc_auc_score(labels_V == positive, probabilities_V)),
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
    }
    is_class_VK = np.eye(logits_VK.shape[1])[labels_V]
    for when, scores_VK in (("", calibrated_VK), ("_before_temperature", logits_VK)):
        shares_VK = softmax(scores_VK)
        bins = calibration_bins(labels_V, shares_VK)
        squares_V = ((shares_VK - is_class_VK) ** 2).sum(axis=1)
        metrics[f"brier{when}"] = float(squares_V.mean())
        metrics[f"expected_calibration_error{when}"] = bins.expected_calibration_error
    return Calibration(temperature, biases, point, points, metrics)


def shares_shifted(
    class_balance: str, train_T: npt.NDArray[np.int64], validation_V: npt.NDArray[np.int64]
) -> bool:
    """Whether training saw the classes in other shares than validation: they were balanced, or the
    odds of a class differ at least twofold. The logits are then off by constants, which a
    temperature cannot correct. With smaller differences, biases gained nothing for two classes
    (docs/models.md).

    class_balance: the setting. train_T, validation_V: class indices; every class must occur.
    """
    shares = [np.bincount(labels) / len(labels) for labels in (train_T, validation_V)]
    ratio_K = np.divide(*(share_K / (1 - share_K) for share_K in shares))
    return class_balance != "none" or bool(np.abs(np.log(ratio_K)).max() >= np.log(2))


def negative_log_likelihood(
    logits_VK: npt.NDArray[np.floating], labels_V: npt.NDArray[np.int64]
) -> float:
    """Mean over the films of -ln p(true class), in nats."""
    true_V = softmax(logits_VK)[np.arange(len(labels_V)), labels_V]
    return float(-np.log(np.maximum(true_V, np.finfo(np.float64).tiny)).mean())


def fit_temperature(logits_VK: npt.NDArray[np.floating], labels_V: npt.NDArray[np.int64]) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017, section 4.2).

    It is convex in 1 / temperature, so golden-section search finds its only minimum, from 1/20 to
    20. Where every film is classified correctly, there is no minimum: the lower the temperature,
    the better. That tells nothing about confidence, so 1 is returned.
    """
    if (logits_VK.argmax(axis=1) == labels_V).all():
        return 1.0
    golden = (np.sqrt(5.0) - 1) / 2
    low, high = -_LOG_TEMPERATURE_LIMIT, _LOG_TEMPERATURE_LIMIT

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits_VK / np.exp(log_temperature), labels_V)

    left, right = high - golden * (high - low), low + golden * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-4:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - golden * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + golden * (high - low)
            loss_right = loss(right)
    return float(np.exp((low + high) / 2))


def fit_biases(
    logits_VK: npt.NDArray[np.floating], labels_V: npt.NDArray[np.int64], temperature: float
) -> tuple[float, tuple[float, ...]]:
    """The temperature, and a bias for each class, that minimise the negative log-likelihood; see
    `calibrated_logits`. `temperature`: where the search starts.

    A standard normal prior on each bias keeps that of a class without validation films finite, and
    makes the biases sum to 0. A thousand films outweigh it.
    """
    from scipy.optimize import minimize

    films, classes = logits_VK.shape
    is_class_VK = np.eye(classes)[labels_V]

    def loss(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        """The loss and its gradient. point: the logarithm of the temperature, then the biases."""
        cold_VK = logits_VK / np.exp(point[0])
        biased_VK = cold_VK + point[1:]
        value = negative_log_likelihood(biased_VK, labels_V) + (point[1:] ** 2).sum() / 2 / films
        error_VK = softmax(biased_VK) - is_class_VK
        by_temperature = -(error_VK * cold_VK).sum() / films
        by_biases_K = error_VK.mean(axis=0) + point[1:] / films
        return float(value), np.concatenate([[by_temperature], by_biases_K])

    if (logits_VK.argmax(axis=1) == labels_V).all():
        return temperature, (0.0,) * classes
    limits = [(-_LOG_TEMPERATURE_LIMIT, _LOG_TEMPERATURE_LIMIT)] + [(None, None)] * classes
    start = np.concatenate([[np.log(temperature)], np.zeros(classes)])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits)
    right_V = (logits_VK / np.exp(found.x[0]) + found.x[1:]).argmax(axis=1) == labels_V
    if right_V.all():
        # As in `fit_temperature`, there is no best temperature; the biases are fitted at 1.
        start, limits[0] = np.zeros(classes + 1), (0.0, 0.0)
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits)
    return float(np.exp(found.x[0])), tuple(map(float, found.x[1:]))
