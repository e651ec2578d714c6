"""From validation logits: the temperature, and the operating points.

Array names carry their shape: V validation films, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.operating_points import STANDARD, pick
from lungopacity.models import OperatingPoint

_LOG_TEMPERATURE_LIMIT = np.log(20.0)


@dataclass(frozen=True)
class Calibration:
    """What validation says of a model: how far to trust its logits, and where to decide."""

    temperature: float
    operating_point: OperatingPoint
    """That decides unless another is asked for: Youden's."""
    operating_points: Mapping[str, OperatingPoint]
    """All of `STANDARD`, by their rules."""
    metrics: Mapping[str, float]
    """At this temperature and point; `loss` in nats."""


def calibrate(
    logits_VK: npt.NDArray[np.floating], labels_V: npt.NDArray[np.int64], positive: int
) -> Calibration:
    """Fit to validation alone. labels_V: index of the class. `positive`: index of the class that
    decisions are about; it and another must occur."""
    from sklearn.metrics import roc_auc_score

    temperature = fit_temperature(logits_VK, labels_V)
    probabilities_V = softmax(logits_VK, temperature)[:, positive]
    points = {rule: pick(rule, probabilities_V, labels_V == positive) for rule in STANDARD}
    point = points[STANDARD[0]]
    assert point.sensitivity is not None
    assert point.specificity is not None
    metrics = {
        "loss": negative_log_likelihood(logits_VK, labels_V, temperature),
        "loss_before_temperature": negative_log_likelihood(logits_VK, labels_V),
        "accuracy": float((logits_VK.argmax(axis=1) == labels_V).mean()),
        "auc": float(roc_auc_score(labels_V == positive, probabilities_V)),
        "sensitivity": point.sensitivity,
        "specificity": point.specificity,
    }
    return Calibration(temperature, point, points, metrics)


def softmax(
    logits_VK: npt.NDArray[np.floating], temperature: float = 1.0
) -> npt.NDArray[np.float64]:
    """Class probabilities, float64 in the shape of the logits; rows sum to 1."""
    scaled = logits_VK.astype(np.float64) / temperature
    exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = exponent / exponent.sum(axis=1, keepdims=True)
    return probabilities


def negative_log_likelihood(
    logits_VK: npt.NDArray[np.floating], labels_V: npt.NDArray[np.int64], temperature: float = 1.0
) -> float:
    """Mean over the films of -ln p(true class), in nats."""
    true_V = softmax(logits_VK, temperature)[np.arange(len(labels_V)), labels_V]
    return float(-np.log(np.maximum(true_V, np.finfo(np.float64).tiny)).mean())


def fit_temperature(logits_VK: npt.NDArray[np.floating], labels_V: npt.NDArray[np.int64]) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017, section 4.2).

    It is convex in 1 / temperature, so golden-section search finds the one minimum, from 1/20 to
    20. Where every film is classified rightly there is none (the smaller the better), which says
    nothing of confidence: 1 is returned.
    """
    if (logits_VK.argmax(axis=1) == labels_V).all():
        return 1.0
    golden = (np.sqrt(5.0) - 1) / 2
    low, high = -_LOG_TEMPERATURE_LIMIT, _LOG_TEMPERATURE_LIMIT

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits_VK, labels_V, float(np.exp(log_temperature)))

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
