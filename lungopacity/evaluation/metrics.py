"""Building blocks of metrics: a measured value, calibration bins, confusion, intervals.

`measure` computes all metrics of labelled images from these. No class counts as positive unless the
caller names it. Array names carry their shape: N images, K classes, B bins.

Sources:

* Wilson 1927, Journal of the American Statistical Association 22:209 (interval of a proportion).
* Newcombe 1998, Statistics in Medicine 17:873, method 10 (interval of a difference of proportions).
* Tango 1998, Statistics in Medicine 17:891 (the same for two proportions of the same images).
* Guo, Pleiss, Sun & Weinberger 2017, ICML, arXiv:1706.04599 (expected calibration error).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]

CALIBRATION_BINS = 15
"""Number of bins of equal width, as Guo et al. 2017 report."""

Z_95 = NormalDist().inv_cdf(0.975)
"""A standard normal variable lies within ± this in 95 of 100 cases."""
_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Metric:
    """One measured value, a row of the metrics table."""

    group: str
    """`all`, or a subgroup such as `view_position=PA`."""
    metric: str
    class_name: str | None
    """The class against the rest, or another name that the metric is for: a confusion cell, an
    operating point, an error code, …; None if the metric is over all."""
    value: float
    """NaN if undefined, such as the AUC of a class that no image has."""
    ci_low: float | None
    ci_high: float | None
    """The 95 % interval; None if there is none."""
    n: int
    """Number of images: the denominator of a proportion, else all images of the group."""
    ci_method: str | None = None
    """How the interval was computed: `wilson_effective` of an effective sample, `bootstrap` by
    drawing patients (see `evaluation.measure` of both), and `wilson` as if each image were of
    another patient. None without interval."""
    patients: int | None = None
    """Number of patients of the n images; None if they were not counted."""


@dataclass(frozen=True)
class CalibrationBins:
    """Images binned by a probability, see `binned`; bin b is (b / B, (b + 1) / B]."""

    count_B: npt.NDArray[np.int64]
    correct_B: npt.NDArray[np.int64]
    """Number of images of the bin for which the class is the true one."""
    confidence_B: npt.NDArray[np.float64]
    """Mean probability in the bin; NaN in an empty bin."""

    @property
    def expected_calibration_error(self) -> float:
        """Mean over the images of |share of the class - mean probability| in their bin; NaN without
        images."""
        n = int(self.count_B.sum())
        if n == 0:
            return math.nan
        filled = self.count_B > 0
        gap = self.correct_B[filled] - self.confidence_B[filled] * self.count_B[filled]
        return float(np.abs(gap).sum() / n)


def check_scores(labels_N: Integers, probabilities_NK: Floats, class_names: Sequence[str]) -> None:
    """Raises `ValueError` unless labels and probabilities are valid.

    labels_N: integers 0 … K-1. probabilities_NK: floats 0 … 1 whose rows sum to 1 (within 1e-4,
    more than any rounding to float32). class_names: K different names, K at least 2.
    """
    classes = len(class_names)
    if classes < 2 or len(set(class_names)) < classes:
        raise ValueError(f"two or more different class names are needed, not {list(class_names)}")
    if probabilities_NK.ndim != 2 or probabilities_NK.shape[1] != classes:
        raise ValueError(
            f"probabilities have the shape {probabilities_NK.shape}, not (n, {classes})"
        )
    if labels_N.shape != probabilities_NK.shape[:1]:
        raise ValueError(f"labels have the shape {labels_N.shape}, not ({len(probabilities_NK)},)")
    _check_classes("labels", labels_N, classes)
    if not np.isfinite(probabilities_NK).all():
        raise ValueError("probabilities hold NaN or infinity")
    # A value above 1 fails the check of the sums.
    if (probabilities_NK < 0).any():
        raise ValueError("probabilities lie below 0")
    if (np.abs(probabilities_NK.sum(axis=1, dtype=np.float64) - 1) > _SUM_TOLERANCE).any():
        raise ValueError("probabilities of an image do not sum to 1")


def group_rows(
    groups: Mapping[str, Sequence[str | None]], n: int
) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Each subgroup as `column=value`, with the rows of its images. None becomes `unknown`. Raises
    `ValueError` if a column does not have n values."""
    for column, values in groups.items():
        if len(values) != n:
            raise ValueError(f"column {column} has {len(values)} values, not {n}")
        named_N = np.array(["unknown" if value is None else value for value in values], dtype=str)
        for name in np.unique(named_N):
            yield f"{column}={name}", np.flatnonzero(named_N == name)


def age_band(years: float) -> str:
    """The age group of a patient. Raises `ValueError` for a negative age or NaN."""
    if not years >= 0:
        raise ValueError(f"{years} years is not an age")
    for limit, band in ((18, "under-18"), (40, "18-39"), (65, "40-64"), (90, "65-89")):
        if years < limit:
            return band
    return "90+"


def confusion_matrix(
    labels_N: Integers, predicted_N: Integers, classes: int
) -> npt.NDArray[np.int64]:
    """Images by true class (rows) and predicted class (columns), int64 (K, K).

    Both arrays hold integers 0 … classes-1, else `ValueError`.
    """
    if labels_N.ndim != 1 or labels_N.shape != predicted_N.shape:
        raise ValueError(f"labels {labels_N.shape} and predictions {predicted_N.shape} differ")
    _check_classes("labels", labels_N, classes)
    _check_classes("predictions", predicted_N, classes)
    cell_N = labels_N.astype(np.int64) * classes + predicted_N.astype(np.int64)
    return np.bincount(cell_N, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927). Numbers need not be whole, for they may be
    those of an effective sample.

    Raises `ValueError` unless 0 <= successes <= n and n > 0.
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    # At 0 and n, a bound is exactly 0 or 1, but rounding can shift it slightly.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def difference_interval(first: Metric, second: Metric) -> tuple[float, float]:
    """The 95 % interval of first - second for proportions of different patients, from the interval
    that each must have (Newcombe 1998)."""
    assert first.ci_low is not None
    assert first.ci_high is not None
    assert second.ci_low is not None
    assert second.ci_high is not None
    difference = first.value - second.value
    return (
        difference - math.hypot(first.value - first.ci_low, second.ci_high - second.value),
        difference + math.hypot(first.ci_high - first.value, second.value - second.ci_low),
    )


def paired_difference_interval(
    only_first: float, only_second: float, n: float
) -> tuple[float, float]:
    """The 95 % interval of second - first for two proportions of the same n images, from the images
    that only one of the two counts: the differences that Tango's score test does not reject (Tango
    1998). Numbers need not be whole, for they may be those of an effective sample.

    Raises `ValueError` for negative numbers, and unless only_first + only_second <= n and n > 0.
    """
    if min(only_first, only_second) < 0 or not n > 0 or only_first + only_second > n * (1 + 1e-9):
        raise ValueError(f"{only_first} and {only_second} of {n} are no paired proportions")
    found = (only_second - only_first) / n

    def is_rejected(difference: float) -> bool:
        # The likeliest share of images that only the first counts, if this is the difference.
        b = (2 * n + only_first - only_second) * difference - only_first - only_second
        c = -only_first * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b**2 - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (n * (found - difference)) ** 2 > Z_95**2 * max(0.0, variance)

    def bound(outer: float) -> float:
        if not is_rejected(outer):
            return outer
        inner = found
        while abs(outer - inner) > 1e-12:
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if is_rejected(middle) else (middle, outer)
        return inner

    return bound(-1.0), bound(1.0)


def calibration_bins(
    labels_N: Integers, probabilities_NK: Floats, index: int | None = None
) -> CalibrationBins:
    """The 15 bins of Guo et al. 2017. Arguments must pass `check_scores`; index: see `binned`."""
    probability_N, is_true_N, bin_N = binned(labels_N, probabilities_NK, index)
    count_B = np.bincount(bin_N, minlength=CALIBRATION_BINS)
    sum_B = np.bincount(bin_N, probability_N, CALIBRATION_BINS)
    mean_B = np.full(CALIBRATION_BINS, np.nan)
    np.divide(sum_B, count_B, out=mean_B, where=count_B > 0)
    return CalibrationBins(
        count_B=count_B.astype(np.int64),
        correct_B=np.bincount(bin_N[is_true_N], minlength=CALIBRATION_BINS).astype(np.int64),
        confidence_B=mean_B,
    )


def binned(
    labels_N: Integers, probabilities_NK: Floats, index: int | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """For each image, a class's probability, whether that class is the true one, and the bin, 0 to
    14.

    index: the class, for example the one that a threshold is set on; None takes each image's
    predicted class, as Guo et al. 2017 do.
    """
    class_N = probabilities_NK.argmax(axis=1) if index is None else np.full(len(labels_N), index)
    probability_N = probabilities_NK[np.arange(len(labels_N)), class_N].astype(np.float64)
    # Rounding errors can leave a probability just above 1: it belongs to the last bin.
    place_N = np.ceil(probability_N * CALIBRATION_BINS).astype(np.int64)
    return probability_N, class_N == labels_N, place_N.clip(1, CALIBRATION_BINS) - 1


def _check_classes(what: str, indices_N: Integers, classes: int) -> None:
    if not np.issubdtype(indices_N.dtype, np.integer):
        raise ValueError(f"{what} are {indices_N.dtype}, not integers")
    if indices_N.size and (indices_N.min() < 0 or indices_N.max() >= classes):
        raise ValueError(f"{what} lie outside 0 … {classes - 1}")
