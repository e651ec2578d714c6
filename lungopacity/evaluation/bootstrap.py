"""Percentile bootstrap over patients: how far a metric would vary with other patients.

Films of one patient resemble each other, so an interval that treats films as independent is too
narrow. Patients are drawn with replacement, each with all of their films (the cluster bootstrap of
Field & Welsh 2007, Journal of the Royal Statistical Society B 69:369), and the interval runs from
the 2.5th to the 97.5th percentile of the metric's replicates (Efron & Tibshirani 1993, An
Introduction to the Bootstrap, ch. 13).

A replicate is a weight for each film: how often its patient was drawn. So no data are copied or
sorted again. Array names carry their shape: N films, P patients, R replicates, S distinct scores in
ascending order, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.metrics import Floats
from lungopacity.progress import Progress

REPLICATES = 1000
"""Enough for 95 % percentile intervals (Efron & Tibshirani 1993, section 14.5)."""

_BLOCK = 2_000_000
"""Number of weights held at a time: 16 MB."""
_LEAST_DEFINED = 0.95
"""Least fraction of the replicates that must define a metric. An interval of fewer would cover only
the favourable draws."""


@dataclass(frozen=True)
class Resampling:
    """Which films belong to which patient, and how patients are drawn."""

    patient_N: npt.NDArray[np.int64]
    """Number of each film's patient, 0 … P-1, numbered by first appearance."""
    replicates: int = REPLICATES
    seed: int = 0
    """The same seed draws the same patients."""

    def __post_init__(self) -> None:
        if self.replicates < 1:
            raise ValueError(f"replicates must be 1 or more, not {self.replicates}")

    @staticmethod
    def of(
        patients: Sequence[str | None], replicates: int = REPLICATES, seed: int = 0
    ) -> Resampling:
        """patients: the patient id of each film; a film without one counts as its own patient."""
        import pandas as pd

        known_N = pd.notna(np.asarray(patients, dtype=object))
        # A tuple equals no id, and each film gets another tuple.
        names = [
            name if known else (row,)
            for row, (name, known) in enumerate(zip(patients, known_N, strict=True))
        ]
        number: dict[object, int] = {}
        patient_N = [number.setdefault(name, len(number)) for name in names]
        return Resampling(np.array(patient_N, dtype=np.int64), replicates, seed)

    def rows(self, rows: npt.NDArray[np.int64]) -> Resampling:
        """The resampling of only these films and their patients."""
        patient_N = np.unique(self.patient_N[rows], return_inverse=True)[1]
        return replace(self, patient_N=patient_N.astype(np.int64))

    @property
    def patients(self) -> int:
        """The number of patients."""
        return int(self.patient_N.max()) + 1 if len(self.patient_N) else 0

    @property
    def clustered(self) -> bool:
        """Whether any patient has more than one film."""
        return self.patients < len(self.patient_N)

    def described(self, *, proportions: bool = False) -> str:
        """One line for a report: how intervals are computed from this resampling. proportions:
        whether some are of proportions (`effective_sample`)."""
        return (
            ("of proportions Wilson's over an effective sample, of others " if proportions else "")
            + f"percentile bootstrap over {self.patients:,} patients of {len(self.patient_N):,} "
            f"films, {self.replicates:,} replicates, seed {self.seed}"
        )

    def weights(self) -> Iterator[npt.NDArray[np.float64]]:
        """How often each film is drawn, whole numbers (R, N), in blocks of replicates."""
        rng = np.random.default_rng(self.seed)
        patients, films = self.patients, len(self.patient_N)
        if films == 0:
            return
        at_once = max(1, _BLOCK // films)
        for start in range(0, self.replicates, at_once):
            rows = min(at_once, self.replicates - start)
            drawn_RP = rng.integers(0, patients, (rows, patients))
            drawn_RP += np.arange(rows)[:, None] * patients
            times = np.bincount(drawn_RP.ravel(), minlength=rows * patients).astype(np.float64)
            yield times.reshape(rows, patients)[:, self.patient_N]


def percentile_interval(values_R: npt.NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The middle 95 % of the replicates of a metric.

    None and None if more than 1 in 20 replicates are undefined (NaN), or if all are equal: a sample
    without a single mistake does not show how many mistakes there may be.
    """
    defined = values_R[np.isfinite(values_R)]
    if len(defined) == 0 or len(defined) < _LEAST_DEFINED * len(values_R):
        return None, None
    if np.ptp(defined) < 1e-12:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def weighted_auc(
    positive_N: npt.NDArray[np.bool_], scores_N: Floats, weights_RN: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """(R,) AUC of scores that are higher for positives, under each row of weights; see `Areas`."""
    return Ranking(positive_N, scores_N).areas(weights_RN).auc_R


@dataclass(frozen=True)
class Areas:
    """The areas under the curves of one class, for each row of weights."""

    auc_R: npt.NDArray[np.float64]
    """The weighted share of pairs in the right order, with equal scores counting half; NaN if only
    positives or only negatives have weight."""
    average_precision_R: npt.NDArray[np.float64]
    """The mean precision over the steps in recall; NaN without positives."""


class Ranking:
    """Films sorted by their scores, once for all replicates.

    Further letters of its array names: P films of the class, M films of the others, each in
    ascending order of score.
    """

    def __init__(self, positive_N: npt.NDArray[np.bool_], scores_N: Floats) -> None:
        self._order_N = np.argsort(scores_N, kind="stable")
        self._positive_N = positive_N[self._order_N]
        sorted_N = scores_N[self._order_N]
        is_new_N = np.append(True, sorted_N[1:] != sorted_N[:-1])[: len(sorted_N)]
        self._starts_S = np.flatnonzero(is_new_N)
        self._rows_P = self._order_N[self._positive_N]
        self._rows_M = self._order_N[~self._positive_N]
        scores_P, scores_M = sorted_N[self._positive_N], sorted_N[~self._positive_N]
        self._lower_P = np.searchsorted(scores_M, scores_P, "left")
        """Number of negatives that score lower than each positive."""
        self._not_higher_P = np.searchsorted(scores_M, scores_P, "right")
        self._first_P = np.searchsorted(scores_P, scores_P, "left")
        """The first of the positives that score the same."""

    def areas(self, weights_RN: npt.NDArray[np.float64]) -> Areas:
        """Under each row of weights. Only a positive's own score is a step of either curve, so what
        lies beyond it is looked up in the running sums."""
        weights_RP = weights_RN[:, self._rows_P]
        # By the number of negatives, from none to all: the weight of so many lowest.
        up_to = np.zeros((len(weights_RN), len(self._rows_M) + 1))
        np.cumsum(weights_RN[:, self._rows_M], axis=1, out=up_to[:, 1:])
        lower_RP = up_to[:, self._lower_P]
        positives_R, negatives_R = weights_RP.sum(axis=1), up_to[:, -1]
        hits_RP = weights_RP[:, ::-1].cumsum(axis=1)[:, ::-1][:, self._first_P]
        called_RP = hits_RP + (negatives_R[:, None] - lower_RP)
        # Where nothing is called positive, recall does not step: the precision there does not
        # matter.
        precision_RP = np.divide(hits_RP, called_RP, out=called_RP, where=called_RP > 0)
        lower_RP += up_to[:, self._not_higher_P]
        right_R = np.einsum("rp,rp->r", weights_RP, lower_RP) / 2
        return Areas(
            ratio(right_R, positives_R * negatives_R),
            ratio(np.einsum("rp,rp->r", weights_RP, precision_RP), positives_R),
        )

    def by_score(
        self, weights_RN: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(R, S) weights of the positives, and of the negatives, at each distinct score."""
        weights_RS = weights_RN[:, self._order_N]
        positives_RS = weights_RS * self._positive_N
        weights_RS -= positives_RS
        if len(self._starts_S) < len(self._order_N):
            positives_RS = np.add.reduceat(positives_RS, self._starts_S, axis=1)
            weights_RS = np.add.reduceat(weights_RS, self._starts_S, axis=1)
        return positives_RS, weights_RS


def ratio(
    part_R: npt.NDArray[np.float64], whole_R: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """part / whole; NaN where the whole is 0."""
    found: npt.NDArray[np.float64] = np.divide(
        part_R, whole_R, out=np.full(part_R.shape, np.nan), where=whole_R > 0
    )
    return found


@dataclass(frozen=True)
class Band:
    """The pointwise 95 % band of a curve."""

    grid_G: npt.NDArray[np.float64]
    low_G: npt.NDArray[np.float64]
    high_G: npt.NDArray[np.float64]


_GRID_G = np.linspace(0, 1, 201)


def drawn_roc(
    positive_N: npt.NDArray[np.bool_], scores_N: Floats, resampling: Resampling
) -> tuple[Band | None, npt.NDArray[np.float64]]:
    """The band of the true positive rate at each false positive rate, over the replicates' curves
    (vertical averaging: Fawcett 2006, Pattern Recognition Letters 27:861, algorithm 3), and the
    replicates' AUC, (R,). No band without positives or without negatives."""

    def rates(
        positives_S: npt.NDArray[np.float64], negatives_S: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64] | None:
        hits_S = np.append(0.0, positives_S[::-1].cumsum())
        false_S = np.append(0.0, negatives_S[::-1].cumsum())
        if not (hits_S[-1] and false_S[-1]):
            return None
        # Of several points at one false positive rate, np.interp takes the last, which is the
        # highest.
        found_G: npt.NDArray[np.float64] = np.interp(
            _GRID_G, false_S / false_S[-1], hits_S / hits_S[-1]
        )
        return found_G

    band, areas = _drawn(positive_N, scores_N, resampling, rates)
    return band, np.concatenate([each.auc_R for each in areas])


def drawn_precision_recall(
    positive_N: npt.NDArray[np.bool_], scores_N: Floats, resampling: Resampling
) -> tuple[Band | None, npt.NDArray[np.float64]]:
    """The band of the precision at each recall, in the steps of average precision, and the
    replicates' average precision, (R,). No band without positives."""

    def precisions(
        positives_S: npt.NDArray[np.float64], negatives_S: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64] | None:
        hits_S = positives_S[::-1].cumsum()
        if not hits_S[-1]:
            return None
        called_S = hits_S + negatives_S[::-1].cumsum()
        # The step of the curve at the first threshold that reaches this recall.
        reached_G = np.searchsorted(hits_S / hits_S[-1], np.maximum(_GRID_G, 1e-9))
        found_G: npt.NDArray[np.float64] = hits_S[reached_G] / called_S[reached_G]
        return found_G

    band, areas = _drawn(positive_N, scores_N, resampling, precisions)
    return band, np.concatenate([each.average_precision_R for each in areas])


def _drawn(
    positive_N: npt.NDArray[np.bool_],
    scores_N: Floats,
    resampling: Resampling,
    curve_of: Callable[
        [npt.NDArray[np.float64], npt.NDArray[np.float64]], npt.NDArray[np.float64] | None
    ],
) -> tuple[Band | None, list[Areas]]:
    """The band of the replicates' curves, and their areas, in one pass over the replicates.

    curve_of: the curve at `_GRID_G`, from a row of each output of `Ranking.by_score`; None if it is
    undefined.
    """
    ranking, curves, areas = Ranking(positive_N, scores_N), [], []
    with Progress("Drawing bands", resampling.replicates, "replicates", quick=True) as progress:
        for weights_RN in resampling.weights():
            areas.append(ranking.areas(weights_RN))
            curves += [
                curve_G
                for rows in zip(*ranking.by_score(weights_RN), strict=True)
                if (curve_G := curve_of(*rows)) is not None
            ]
            progress.advance(len(weights_RN))
    if not curves:
        return None, areas
    low_G, high_G = np.percentile(np.stack(curves), [2.5, 97.5], axis=0)
    return Band(_GRID_G, low_G, high_G), areas
