"""Drift: whether tonight's films and scores still resemble those of a baseline run.

Population stability index: PSI = Σ (p - q) ln(p / q) over bins. Without drift, PSI / (1/n + 1/m)
is χ²-distributed with bins - 1 degrees of freedom (Yurdakul and Naranjo, Statistical properties of
the population stability index, Journal of Risk Model Validation 14(3), 2020). This gives the PSI
that a small night may reach by chance alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.metrics import Metric, wilson_interval
from lungopacity.radiograph import OUT_OF_DISTRIBUTION

PSI_LIMIT = 0.2
"""A PSI above this is commonly called a significant shift."""
KS_LIMIT = 0.2
_KS_P_VALUE = 0.001
_CONFIDENCE = 0.95
_SCORE_BINS = 10
_HEADERS = ("view_position", "modality")
_UNLIKE = f"quality_{OUT_OF_DISTRIBUTION}"
MIXES = ("status", *_HEADERS, _UNLIKE)
"""Columns whose distributions of values are compared. In `_HEADERS`, a missing value counts as a
value. `_UNLIKE` is compared because films of another scanner may look unlike the training films
while the scores, as a whole, are distributed as before."""


@dataclass(frozen=True)
class Sample:
    """The data of a run that drift compares."""

    scores_N: npt.NDArray[np.float32]
    """Positive-class probabilities of the scored images."""
    mixes: Mapping[str, Mapping[str | bool | None, int]]
    """For each of `MIXES`, the number of images with each value. `_HEADERS` count only images that
    could be read: of the others, the header is unknown, which is not the same as a missing value.
    `_UNLIKE` counts only images that reached the model; none if an older model flags no film."""

    @staticmethod
    def of(predictions: Any, score_column: str, failed_again: int) -> Sample:
        """predictions: DuckDB relation of `predictions_schema`. failed_again: number of its failed
        images that could not be read in an earlier run either. They say nothing new, and are not
        counted."""

        def counts(name: str, which: str) -> Counter[str | bool | None]:
            sql = f"SELECT {name}, count(*) FROM predictions {which} GROUP BY {name}"
            return Counter(dict(predictions.query("predictions", sql).fetchall()))

        scores = predictions.query(
            "predictions",
            f"SELECT \"{score_column}\" AS score FROM predictions WHERE status = 'ok'",
        ).to_arrow_table()
        return Sample(
            scores_N=scores["score"].to_numpy(),
            mixes={
                "status": counts("status", "") - Counter({"failed": failed_again}),
                **{name: counts(name, "WHERE status <> 'failed'") for name in _HEADERS},
                _UNLIKE: counts(_UNLIKE, f"WHERE {_UNLIKE} IS NOT NULL"),
            },
        )


@dataclass(frozen=True)
class Shift:
    """One comparison with the baseline."""

    name: str
    """`score`, or one of `MIXES`."""
    psi: float
    by_chance: float
    """A PSI that samples of this size exceed 1 time in 20 without any drift."""
    n: int
    ks: float | None = None
    """Kolmogorov-Smirnov distance of the scores."""
    ks_p_value: float | None = None

    @property
    def verdict(self) -> str:
        """`drifted`, `stable`, or `too_few` if chance alone may bring the PSI above its limit."""
        # Its p-value takes account of how few films there are.
        if (
            (self.ks or 0.0) > KS_LIMIT
            and self.ks_p_value is not None
            and self.ks_p_value < _KS_P_VALUE
        ):
            return "drifted"
        if self.by_chance > PSI_LIMIT:
            return "too_few"
        return "drifted" if self.psi > PSI_LIMIT else "stable"


def psi(baseline_B: Sequence[int], current_B: Sequence[int]) -> tuple[float, float]:
    """The PSI of two histograms over the same bins, and the PSI that chance exceeds 1 time in 20.

    Half an image is added to every bin, because an empty bin would make the PSI infinite. If a
    sample is empty: NaN and infinity.
    """
    n, m = sum(baseline_B), sum(current_B)
    bins = len(baseline_B)
    if n == 0 or m == 0:
        return float("nan"), float("inf")
    # Imported here because it takes half a second, which a night without a baseline can save.
    from scipy.stats import chi2

    p_B = (np.asarray(current_B) + 0.5) / (m + 0.5 * bins)
    q_B = (np.asarray(baseline_B) + 0.5) / (n + 0.5 * bins)
    index = float(np.sum((p_B - q_B) * np.log(p_B / q_B)))
    by_chance = float(chi2.ppf(_CONFIDENCE, max(1, bins - 1))) * (1 / n + 1 / m)
    return index, by_chance


def shifts(baseline: Sample, current: Sample) -> list[Shift]:
    """Compare the scores, binned by the baseline's deciles, and each of `MIXES`; not `_UNLIKE` if
    the baseline has it of no film."""
    found = [_score_shift(baseline.scores_N, current.scores_N)]
    for name in MIXES:
        before, now = baseline.mixes[name], current.mixes[name]
        if name == _UNLIKE and not before:
            continue
        values = sorted({*before, *now}, key=str)
        index, by_chance = psi(
            [before.get(value, 0) for value in values], [now.get(value, 0) for value in values]
        )
        found.append(Shift(name, index, by_chance, sum(now.values())))
    return found


def _score_shift(baseline_N: npt.NDArray[np.float32], current_M: npt.NDArray[np.float32]) -> Shift:
    if len(baseline_N) == 0 or len(current_M) == 0:
        return Shift("score", float("nan"), float("inf"), len(current_M))
    deciles = np.quantile(baseline_N, np.linspace(0, 1, _SCORE_BINS + 1)[1:-1])
    edges, times = np.unique(deciles, return_counts=True)
    # A score that is several deciles at once gets a bin of its own, which ends at the next larger
    # float. In a bin shared with higher scores, films that move between the two would be no shift.
    edges = np.union1d(edges, np.nextafter(edges[times > 1], np.inf, dtype=edges.dtype))
    counts = [
        np.bincount(np.searchsorted(edges, scores, side="right"), minlength=len(edges) + 1).tolist()
        for scores in (baseline_N, current_M)
    ]
    index, by_chance = psi(*counts)
    from scipy.stats import ks_2samp

    test = ks_2samp(baseline_N, current_M)
    return Shift(
        "score", index, by_chance, len(current_M), float(test.statistic), float(test.pvalue)
    )


def drift_metrics(found: Sequence[Shift], baseline: Sample, current: Sample) -> list[Metric]:
    """The comparisons as metrics; undefined values are left out."""
    metrics = []
    for shift in found:
        for metric, value in (
            ("drift_psi", shift.psi),
            ("drift_psi_by_chance", shift.by_chance),
            ("drift_ks", shift.ks),
            ("drift_ks_p_value", shift.ks_p_value),
        ):
            if value is not None and np.isfinite(value):
                metrics.append(Metric("all", metric, shift.name, value, None, None, shift.n))
    for name, sample in (("failed_rate", current), ("baseline_failed_rate", baseline)):
        status = sample.mixes["status"]
        n, failed = sum(status.values()), status.get("failed", 0)
        if n:
            low, high = wilson_interval(failed, n)
            metrics.append(Metric("all", name, None, failed / n, low, high, n, "wilson"))
    return metrics
