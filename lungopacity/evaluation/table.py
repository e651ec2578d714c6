"""Metrics as the table that evaluation and screening both write, and gaps between subgroups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lungopacity.evaluation.metrics import Metric, age_band
from lungopacity.results.schema import METRICS_SCHEMA

if TYPE_CHECKING:
    import pandas as pd


def metrics_table(
    metrics: Iterable[Metric], run_id: str, model_id: str, *, synthetic: bool
) -> pa.Table:
    """Metrics as rows of `METRICS_SCHEMA`."""
    rows = [
        {
            "run_id": run_id,
            "model_id": model_id,
            "synthetic": synthetic,
            "group": metric.group,
            "metric": metric.metric,
            "class": metric.class_name,
            "value": metric.value,
            "ci_low": metric.ci_low,
            "ci_high": metric.ci_high,
            "n": metric.n,
            "ci_method": metric.ci_method,
            "patients": metric.patients,
        }
        for metric in metrics
    ]
    return pa.Table.from_pylist(rows, schema=METRICS_SCHEMA)


def metric_value(
    metrics: Sequence[Metric], name: str, class_name: str | None = None
) -> float | None:
    """The value of one metric over all images, or None if it was not measured."""
    for metric in metrics:
        if (metric.group, metric.metric, metric.class_name) == ("all", name, class_name):
            return metric.value
    return None


def with_interval(item: Metric) -> str:
    """`0.9123 (0.9001 to 0.9245)`."""
    return _figure(item.value, item.ci_low, item.ci_high)


def _figure(value: float, low: float | None, high: float | None) -> str:
    if value != value:
        return "not defined"
    if low is None or high is None:
        return f"{value:.4f}"
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


def decision_words(metrics: Iterable[Metric]) -> list[str]:
    """`sensitivity 0.9123 (…), specificity …` from the metrics of one operating point; if it has a
    band, a second text with review counted as found."""
    found = {item.metric: with_interval(item) for item in metrics}
    words = [
        f"sensitivity {found['decision_sensitivity']}, specificity {found['decision_specificity']}"
    ]
    if "review_rate" in found:
        words.append(
            f"sensitivity {found['decision_sensitivity_with_review']}, negative predictive value "
            f"{found['negative_predictive_value']}, under review {found['review_rate']}"
        )
    return words


def flatters(films: int) -> str:
    """A remark on an operating point that was picked on so many of the evaluated films."""
    return f"picked on {films} of these films: its metrics look too good"


def knows(films: int) -> str:
    """A remark on a model that knows so many of the evaluated films."""
    return (
        f"the model was trained, selected or calibrated on {films} of these films: its metrics "
        "look too good"
    )


FEWEST = 30
"""Fewest patients of a subgroup that is compared with others: with a few, any gap is chance."""

PICKED_GAPS = (
    "differences are between the two subgroups that differ most, which their intervals do not "
    "account for"
)
"""A remark on gaps."""

_COMPARED = {
    "roc_auc": "AUC",
    "decision_sensitivity": "sensitivity",
    "decision_specificity": "specificity",
}
"""Sensitivity and specificity are compared, too, because scores that are shifted in one group, as
by another scanner, keep their AUC."""


@dataclass(frozen=True)
class Gap:
    """The two subgroups of one column between which a model differs most in one metric."""

    worst: Metric
    best: Metric
    ci_low: float | None = None
    ci_high: float | None = None
    """The 95 % interval of `size` between these two. It does not account for having picked the two
    that differ most."""

    @property
    def column(self) -> str:
        """The column that forms the subgroups."""
        return self.best.group.partition("=")[0]

    @property
    def figure(self) -> str:
        """AUC, sensitivity or specificity."""
        return _COMPARED[self.best.metric]

    @property
    def size(self) -> float:
        """The difference of the metric, best minus worst."""
        return self.best.value - self.worst.value

    @property
    def size_words(self) -> str:
        """`0.0400 (0.0100 to 0.0700)`."""
        return _figure(self.size, self.ci_low, self.ci_high)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "figure": self.figure,
            "column": self.column,
            "worst": self.worst.group.partition("=")[2],
            "best": self.best.group.partition("=")[2],
            "size": self.size,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
        }


def largest_gaps(metrics: Sequence[Metric], positive: str, point: str) -> list[Gap]:
    """The gap of each column of subgroups in AUC, sensitivity and specificity, the largest first.

    positive: the class that decisions are about. point: the name of the operating point for the
    decisions. Metrics of fewer than `FEWEST` patients (images, if patients were not counted) are
    left out; an AUC needs as many of either kind: that of a group with one opacity is chance,
    however narrow its interval.
    """
    gaps = [
        # If all are equal, the first and the last: two groups, not the same one twice.
        Gap(min(items, key=lambda item: item.value), max(items[::-1], key=lambda item: item.value))
        for items in _comparable(metrics, positive, point)
        if len(items) > 1
    ]
    return sorted(gaps, key=lambda gap: -gap.size)


def uncompared_figures(metrics: Sequence[Metric], gaps: Sequence[Gap]) -> list[str]:
    """The columns with several subgroups but no gap in a metric, because fewer than two subgroups
    have `FEWEST` patients that count: `sensitivity by view_position, age`."""
    groups = dict.fromkeys(item.group for item in metrics if item.group != "all")
    columns = Counter(group.partition("=")[0] for group in groups)
    compared = {(gap.figure, gap.column) for gap in gaps}
    left = {
        figure: [name for name in columns if columns[name] > 1 and (figure, name) not in compared]
        for figure in _COMPARED.values()
    }
    return [f"{figure} by {', '.join(names)}" for figure, names in left.items() if names]


def uncompared_groups(metrics: Sequence[Metric], positive: str, point: str) -> list[Metric]:
    """The accuracy of each subgroup that could not be compared, because it has few patients, or
    only films with or only films without the positive class."""
    compared = {
        item.group
        for items in _comparable(metrics, positive, point)
        for item in items
        # A group with an AUC had enough patients; it only lacks another group.
        if len(items) > 1 or item.metric == "roc_auc"
    }
    return [
        item
        for item in metrics
        if item.group not in ("all", *compared) and item.metric == "accuracy"
    ]


def _comparable(metrics: Sequence[Metric], positive: str, point: str) -> Iterable[list[Metric]]:
    """The metrics that can be compared, one list for each column of subgroups and metric."""
    enough = [
        item
        for item in metrics
        if item.group != "all"
        and item.class_name == (positive if item.metric == "roc_auc" else point)
        and item.metric in _COMPARED
        and (item.n if item.patients is None else item.patients) >= FEWEST
    ]
    kinds = [item.group for item in enough if item.metric != "roc_auc"]
    found: dict[tuple[str, str], list[Metric]] = {}
    for item in enough:
        # Both sensitivity and specificity have enough patients: there are enough of either kind.
        if item.metric != "roc_auc" or kinds.count(item.group) == 2:
            found.setdefault((item.group.partition("=")[0], item.metric), []).append(item)
    return found.values()


def fact_groups(facts: pd.DataFrame) -> dict[str, list[str | None]]:
    """The subgroups that every evaluation reports. facts: `FACT_COLUMNS`, a row per image."""
    import pandas as pd

    ages = facts["patient_age_years"]
    return {
        **{
            name: [None if pd.isna(word) else str(word) for word in facts[name]]
            for name in ("view_position", "patient_sex")
        },
        "age": [None if pd.isna(age) else age_band(float(age)) for age in ages],
    }
