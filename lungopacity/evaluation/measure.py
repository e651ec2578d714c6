"""Every metric of labelled images, over all and in subgroups, with intervals over patients.
Evaluation and screening with labels both use this module.

The interval of a metric (`ci_method`):

* `wilson_effective`: for a proportion of films, Wilson's interval of an effective sample, which
  allows for how alike the films of a patient are (`effective_sample`).
* `bootstrap`: the percentile bootstrap over patients, for every other metric except counts.
  Subgroups use the same draws, so the number of their patients that are drawn varies, too.
* none: if fewer than 19 of 20 replicates define such a metric, or if all give the same value.

Noise in each bin makes the expected calibration error larger, and resampling adds noise of its own.
So the replicates of that metric are shifted to have the measured value as their mean.

Sources: Brier 1950, Monthly Weather Review 78:1 (probability score); Guo, Pleiss, Sun & Weinberger
2017, ICML, arXiv:1706.04599 (expected calibration error).

Array names carry their shape: N images, K classes, B bins, R replicates, F sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.bootstrap import (
    Ranking,
    Resampling,
    percentile_interval,
    ratio,
)
from lungopacity.evaluation.effective_sample import clustered_interval
from lungopacity.evaluation.metrics import (
    CALIBRATION_BINS,
    Floats,
    Integers,
    Metric,
    binned,
    check_scores,
    confusion_matrix,
    difference_interval,
    group_rows,
)
from lungopacity.evaluation.operating_points import decision_shares
from lungopacity.evaluation.table import Gap, largest_gaps
from lungopacity.evaluation.weighted_sums import Binned, Sums, WeightedSums
from lungopacity.models import OperatingPoint
from lungopacity.progress import Progress

Key = tuple[str, str | None]
"""Name of a metric, and its class or operating point."""
Proportion = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""(N,) the images that count, and (N,) those that they are counted among."""

_CALIBRATION = "expected_calibration_error"
_BEFORE = f"{_CALIBRATION}_before_temperature"
_BY_CHANCE = f"{_CALIBRATION}_by_chance"
_BRIER_BEFORE = "brier_before_temperature"


@dataclass(frozen=True)
class ScoredImages:
    """Labelled images and a model's scores of them; row i of each array is the same image."""

    labels_N: Integers
    """Index into `class_names`."""
    probabilities_NK: Floats
    """The published float32 values as float64; they must pass `metrics.check_scores`. They are not
    normalised again: their sums are off by rounding errors, and dividing by them would rank images
    that have equal published scores."""
    class_names: tuple[str, ...]
    positive: str
    """The class that decisions are about."""
    uncalibrated_NK: Floats | None = None
    """The probabilities before calibration by the temperature."""
    points: Mapping[str, OperatingPoint] = field(default_factory=dict)
    views: Sequence[str | None] | None = None
    """The view of each image by its header, for points that decide by view; None: no view is
    known."""

    def rows(self, rows: npt.NDArray[np.int64]) -> ScoredImages:
        """Only these images."""
        before = self.uncalibrated_NK
        return replace(
            self,
            labels_N=self.labels_N[rows],
            probabilities_NK=self.probabilities_NK[rows],
            uncalibrated_NK=None if before is None else before[rows],
            views=None if self.views is None else [self.views[row] for row in rows],
        )

    @property
    def positive_index(self) -> int:
        """Index of the positive class in `class_names`."""
        return self.class_names.index(self.positive)


def measure(
    scored: ScoredImages,
    groups: Mapping[str, Sequence[str | None]],
    resampling: Resampling,
) -> list[Metric]:
    """Every metric over all images and in each subgroup, with intervals as described above. The
    predicted class is the most probable one; undefined values are NaN.

    * Over all classes: accuracy, balanced_accuracy (mean recall), roc_auc (mean over the classes,
      one against the rest), brier (Brier's own score, the sum of squared differences over the
      classes: 0 … 2), log_loss (nats), expected_calibration_error.
    * Per class: support, precision, recall, f1, specificity, roc_auc, average_precision.
    * Per pair of classes: confusion, named `true=A,predicted=B`.
    * Of the positive class's probability: brier_binary, the mean squared difference, 0 … 1 (with
      two classes, half of brier), and expected_calibration_error.
    * Beside either calibration error, as expected_calibration_error_by_chance: what a perfectly
      calibrated model with these probabilities would measure on average.
    * Of the probabilities before calibration: brier_before_temperature, and
      expected_calibration_error_before_temperature for the predicted and for the positive class.
    * At each operating point, by its name: the metrics of `decision_shares`.

    groups: one value per image for each column name; None becomes `unknown`. In each column, an
    image belongs to the group `column=value`. Raises `ValueError` as `check_scores` does, if a
    column and the labels differ in length, and for an unknown positive class.
    """
    return _measured(scored, groups, resampling)[0]


def measure_with_gaps(
    scored: ScoredImages,
    groups: Mapping[str, Sequence[str | None]],
    resampling: Resampling,
    point: str,
) -> tuple[list[Metric], tuple[Gap, ...]]:
    """`measure`, and the `largest_gaps` between subgroups with intervals over patients: by the
    bootstrap or, if a group's sensitivity or specificity is 0 or 1, which draws do not change,
    Newcombe's from those of the two groups. A gap has no interval if the AUC of a group has none.

    point: the name of the operating point whose decisions are compared.
    """
    metrics, replicates = _measured(scored, groups, resampling)
    gaps = largest_gaps(metrics, scored.positive, point)
    return metrics, tuple(_with_interval_of_gap(gap, replicates) for gap in gaps)


def _measured(
    scored: ScoredImages,
    groups: Mapping[str, Sequence[str | None]],
    resampling: Resampling,
) -> tuple[list[Metric], dict[str, dict[Key, npt.NDArray[np.float64]]]]:
    """The metrics, and for each group the replicates of each metric."""
    check_scores(scored.labels_N, scored.probabilities_NK, scored.class_names)
    if scored.positive not in scored.class_names:
        raise ValueError(f"positive class '{scored.positive}' is not in {scored.class_names}")
    n = len(scored.labels_N)
    # One column at a time, each with the same draws: the groups of one column take 0.6 GB for a
    # million films.
    partitions = [[("all", np.arange(n))]]
    partitions += [list(group_rows({name: values}, n)) for name, values in groups.items()]
    metrics: list[Metric] = []
    replicates: dict[str, dict[Key, npt.NDArray[np.float64]]] = {}
    total = resampling.replicates * len(partitions)
    with Progress("Resampling patients", total, "replicates") as progress:
        for parts in partitions:
            statistics = [Statistics(scored.rows(rows)) for _, rows in parts]
            drawn: list[dict[Key, list[npt.NDArray[np.float64]]]] = [{} for _ in parts]
            for weights_RN in resampling.weights():
                for (_, rows), figures, found in zip(parts, statistics, drawn, strict=True):
                    for key, values_R in figures.under(weights_RN[:, rows]).items():
                        found.setdefault(key, []).append(values_R)
                progress.advance(len(weights_RN))
            for (group, rows), figures, found in zip(parts, statistics, drawn, strict=True):
                replicates[group] = {key: np.concatenate(blocks) for key, blocks in found.items()}
                patient_N = resampling.patient_N[rows]
                metrics += [
                    _with_interval(item, figures.proportions, replicates[group], patient_N)
                    for item in [*figures.values(group), *figures.counts(group)]
                ]
    return metrics, replicates


def _with_interval_of_gap(
    gap: Gap, replicates: Mapping[str, Mapping[Key, npt.NDArray[np.float64]]]
) -> Gap:
    worst, best = gap.worst, gap.best
    if worst.ci_low is None or best.ci_low is None:
        return gap
    if {worst.value, best.value} & {0.0, 1.0}:
        bounds: tuple[float | None, float | None] = difference_interval(best, worst)
    else:
        # The replicates of both groups come from the same draws, so they can be subtracted.
        worst_R, best_R = (
            replicates[item.group][item.metric, item.class_name] for item in (worst, best)
        )
        bounds = percentile_interval(best_R - worst_R)
    return replace(gap, ci_low=bounds[0], ci_high=bounds[1])


def ratio_metrics(
    ratios: Mapping[Key, tuple[Sums, Sums]], resampling: Resampling, group: str = "all"
) -> list[Metric]:
    """Shares and means over at least one image, with intervals as `measure` computes them.

    ratios: for each metric, what each image adds to the numerator and to the denominator; for a
    proportion, both are bool.
    """
    metrics, proportions, replicates = [], _proportions(ratios), {}
    if means := {key: pair for key, pair in ratios.items() if key not in proportions}:
        sums_NF = np.stack(_columns(means), axis=1, dtype=np.float64)
        sums_RF = np.concatenate([weights_RN @ sums_NF for weights_RN in resampling.weights()])
        replicates = _ratios_of_sums(means, sums_RF)
    for (name, of), (part_N, of_N) in ratios.items():
        whole = of_N.sum()
        value = float(part_N.sum() / whole) if whole else math.nan
        item = Metric(group, name, of, value, None, None, int(whole))
        metrics.append(_with_interval(item, proportions, replicates, resampling.patient_N))
    return metrics


def _with_interval(
    item: Metric,
    proportions: Mapping[Key, Proportion],
    replicates: Mapping[Key, npt.NDArray[np.float64]],
    patient_N: npt.NDArray[np.int64],
) -> Metric:
    key = (item.metric, item.class_name)
    if key in proportions:
        part_N, of_N = proportions[key]
        patient_N = patient_N[of_N]
    # Ten times as fast as `np.unique`.
    patients = int(np.count_nonzero(np.bincount(patient_N)))
    item = replace(item, ci_low=None, ci_high=None, ci_method=None, patients=patients)
    if key in proportions and item.n:
        low, high = clustered_interval(part_N[of_N], patient_N)
        return replace(item, ci_low=low, ci_high=high, ci_method="wilson_effective")
    if key not in replicates:
        return item
    values_R = replicates[key]
    if item.metric in (_CALIBRATION, _BEFORE):
        values_R = np.maximum(values_R - np.nanmean(values_R) + item.value, 0.0)
    bounds = percentile_interval(values_R)
    method = None if bounds[0] is None else "bootstrap"
    return replace(item, ci_low=bounds[0], ci_high=bounds[1], ci_method=method)


class Statistics:
    """The metrics of some images as functions of the images' weights.

    All except AUC and average precision are ratios of weighted sums over the images, or are
    computed from such sums.
    """

    def __init__(self, scored: ScoredImages) -> None:
        self._scored = scored
        self._true_NK = scored.labels_N[:, None] == np.arange(len(scored.class_names))
        self._ratios = self._ratios_of(scored)
        self._gaps = {
            (metric, name): _gaps(scored.labels_N, shares_NK, index)
            for metric, shares_NK in (
                (_CALIBRATION, scored.probabilities_NK),
                (_BEFORE, scored.uncalibrated_NK),
            )
            for name, index in ((None, None), (scored.positive, scored.positive_index))
            if shares_NK is not None
        }
        self.proportions = _proportions(self._ratios)
        """The metrics that are shares of images."""
        self._rankings = [
            Ranking(self._true_NK[:, index], scored.probabilities_NK[:, index])
            for index in range(len(scored.class_names))
        ]
        self._sums = WeightedSums(
            _columns(self._ratios), list(self._gaps.values()), CALIBRATION_BINS
        )

    def under(self, weights_RN: npt.NDArray[np.float64]) -> dict[Key, npt.NDArray[np.float64]]:
        """(R,) values of each metric, one for each row of weights; NaN where undefined."""
        sums_RF, gaps = self._sums.under(weights_RN)
        found = _ratios_of_sums(self._ratios, sums_RF)
        weight_R = weights_RN.sum(axis=1)
        for key, gaps_RB in zip(self._gaps, gaps, strict=True):
            found[key] = ratio(np.abs(gaps_RB).sum(axis=1), weight_R)
        names = self._scored.class_names
        for name, ranking in zip(names, self._rankings, strict=True):
            areas = ranking.areas(weights_RN)
            found["roc_auc", name] = areas.auc_R
            found["average_precision", name] = areas.average_precision_R
        for mean, of in (("balanced_accuracy", "recall"), ("roc_auc", "roc_auc")):
            found[mean, None] = np.mean([found[of, name] for name in names], axis=0)
        return found

    def values(self, group: str) -> Iterator[Metric]:
        """Each metric with every image counted once."""
        films = len(self._true_NK)
        for (name, of), values_R in self.under(np.ones((1, films))).items():
            share = self.proportions.get((name, of))
            n = films if share is None else int(share[1].sum())
            yield Metric(group, name, of, float(values_R[0]), None, None, n)
        for of, index in ((None, None), (self._scored.positive, self._scored.positive_index)):
            error = _error_by_chance(self._scored, index)
            yield Metric(group, _BY_CHANCE, of, error, None, None, films)

    def counts(self, group: str) -> Iterator[Metric]:
        """The metrics support and confusion."""
        names, films = self._scored.class_names, len(self._true_NK)
        predicted_N = self._scored.probabilities_NK.argmax(axis=1)
        matrix_KK = confusion_matrix(self._scored.labels_N, predicted_N, len(names))
        for name, row_K in zip(names, matrix_KK, strict=True):
            yield Metric(group, "support", name, float(row_K.sum()), None, None, films)
        for true, row_K in zip(names, matrix_KK, strict=True):
            for predicted, count in zip(names, row_K, strict=True):
                cell = f"true={true},predicted={predicted}"
                yield Metric(group, "confusion", cell, float(count), None, None, films)

    def _ratios_of(self, scored: ScoredImages) -> dict[Key, tuple[Sums, Sums]]:
        """For each metric, what each image adds to the numerator and to the denominator; for a
        proportion, both are bool."""
        true_NK, exact_NK = self._true_NK, scored.probabilities_NK.astype(np.float64)
        predicted_NK = exact_NK.argmax(axis=1)[:, None] == np.arange(len(scored.class_names))
        all_N = np.ones(len(exact_NK), np.bool_)
        squares_NK = (exact_NK - true_NK) ** 2
        # As in scikit-learn's log_loss, no probability is smaller than the epsilon of float64.
        shares_NK = (exact_NK / exact_NK.sum(axis=1, keepdims=True)).clip(np.finfo(np.float64).eps)
        found: dict[Key, tuple[Sums, Sums]] = {
            ("accuracy", None): ((true_NK & predicted_NK).any(axis=1), all_N),
            ("brier", None): (squares_NK.sum(axis=1), all_N),
            ("log_loss", None): (-(np.log(shares_NK) * true_NK).sum(axis=1), all_N),
            ("brier_binary", scored.positive): (squares_NK[:, scored.positive_index], all_N),
        }
        if scored.uncalibrated_NK is not None:
            before_N = _squares(scored.labels_N, scored.uncalibrated_NK)
            found[_BRIER_BEFORE, None] = before_N, all_N
        for index, name in enumerate(scored.class_names):
            true_N, predicted_N = true_NK[:, index], predicted_NK[:, index]
            hit_N = true_N & predicted_N
            found["precision", name] = hit_N, predicted_N
            found["recall", name] = hit_N, true_N
            found["specificity", name] = ~true_N & ~predicted_N, ~true_N
            found["f1", name] = 2.0 * hit_N, true_N.astype(np.float64) + predicted_N
        of_positive_N = scored.probabilities_NK[:, scored.positive_index]
        for name, point in scored.points.items():
            shares = decision_shares(
                of_positive_N, true_NK[:, scored.positive_index], point, scored.views
            )
            found.update({(what, name): share for what, share in shares.items()})
        return found


def _columns(ratios: Mapping[Key, tuple[Sums, Sums]]) -> list[Sums]:
    """(N,) the numerator and the denominator of each metric."""
    return [sums_N for pair in ratios.values() for sums_N in pair]


def _ratios_of_sums(
    keys: Iterable[Key], sums_RF: npt.NDArray[np.float64]
) -> dict[Key, npt.NDArray[np.float64]]:
    """(R,) ratio of each key. sums_RF: weighted sums of `_columns`."""
    return {
        key: ratio(sums_RF[:, 2 * place], sums_RF[:, 2 * place + 1])
        for place, key in enumerate(keys)
    }


def _proportions(ratios: Mapping[Key, tuple[Sums, Sums]]) -> dict[Key, Proportion]:
    """The metrics that are shares of images."""
    return {
        key: (part_N.astype(np.bool_), of_N.astype(np.bool_))
        for key, (part_N, of_N) in ratios.items()
        if part_N.dtype == np.bool_
    }


def _squares(labels_N: Integers, probabilities_NK: Floats) -> npt.NDArray[np.float64]:
    """(N,) Brier's own score of each image, the sum over the classes."""
    true_NK = labels_N[:, None] == np.arange(probabilities_NK.shape[1])
    squares_N: npt.NDArray[np.float64] = ((probabilities_NK - true_NK) ** 2).sum(axis=1)
    return squares_N


def _error_by_chance(scored: ScoredImages, index: int | None) -> float:
    """The expected calibration error that these images would measure on average if their
    probabilities were perfectly calibrated. index: as for `binned`.

    In each bin, the sum of label minus probability has mean 0 and variance s = sum p (1 - p). Its
    mean size is sqrt(2 s / pi) where it is nearly normal, and never above 2 s.
    """
    probability_N, _, bin_N = binned(scored.labels_N, scored.probabilities_NK, index)
    spread_B = np.bincount(bin_N, probability_N * (1 - probability_N), CALIBRATION_BINS)
    sizes_B = np.minimum(np.sqrt(spread_B * 2 / math.pi), 2 * spread_B)
    return float(sizes_B.sum() / len(probability_N)) if len(probability_N) else math.nan


def _gaps(labels_N: Integers, probabilities_NK: Floats, index: int | None) -> Binned:
    """What each image adds to the gap between the share of the class and the mean probability of
    its bin. index: as for `binned`."""
    probability_N, is_true_N, bin_N = binned(labels_N, probabilities_NK, index)
    return bin_N, is_true_N - probability_N
