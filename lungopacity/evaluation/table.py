"""Metrics as the tidy table that evaluation and screening both write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lungopacity.evaluation.metrics import Metric, age_band
from lungopacity.results.schema import METRICS_SCHEMA


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
    """The value over all images of one metric, or None where it was not measured."""
    for metric in metrics:
        if (metric.group, metric.metric, metric.class_name) == ("all", name, class_name):
            return metric.value
    return None


def with_interval(item: Metric) -> str:
    """`0.9123 (0.9001 to 0.9245)`."""
    if item.value != item.value:
        return "not defined"
    if item.ci_low is None or item.ci_high is None:
        return f"{item.value:.4f}"
    return f"{item.value:.4f} ({item.ci_low:.4f} to {item.ci_high:.4f})"


def decision_words(metrics: Iterable[Metric]) -> list[str]:
    """`sensitivity 0.9123 (…), specificity …` of the figures of one operating point; if it has a
    band, then the same of what review adds."""
    found = {item.metric: with_interval(item) for item in metrics}
    told = [
        f"sensitivity {found['decision_sensitivity']}, specificity {found['decision_specificity']}"
    ]
    if "review_rate" in found:
        told.append(
            f"sensitivity {found['decision_sensitivity_with_review']}, negative predictive value "
            f"{found['negative_predictive_value']}, under review {found['review_rate']}"
        )
    return told


FEWEST_FILMS = 30
"""Of a subgroup that is compared with others: between a handful of films any gap is chance."""


@dataclass(frozen=True)
class Gap:
    """The two subgroups of one column between which a model differs most."""

    worst: Metric
    best: Metric

    @property
    def column(self) -> str:
        """What the subgroups are of."""
        return self.best.group.partition("=")[0]

    @property
    def size(self) -> float:
        """Of the AUC."""
        return self.best.value - self.worst.value


def largest_gaps(metrics: Sequence[Metric], positive: str, fewest: int = FEWEST_FILMS) -> list[Gap]:
    """The gap in AUC of each column of subgroups, the largest first.

    `fewest`: subgroups of fewer images are left out, and those whose AUC has no interval.
    """
    columns: dict[str, list[Metric]] = {}
    for item in metrics:
        column, sign, _ = item.group.partition("=")
        told = item.metric == "roc_auc" and item.class_name == positive and item.n >= fewest
        if sign and told and item.ci_low is not None:
            columns.setdefault(column, []).append(item)
    gaps = [
        Gap(min(items, key=lambda item: item.value), max(items, key=lambda item: item.value))
        for items in columns.values()
        if len(items) > 1
    ]
    return sorted(gaps, key=lambda gap: -gap.size)


def small_groups(metrics: Sequence[Metric], fewest: int = FEWEST_FILMS) -> list[Metric]:
    """The accuracy of each subgroup that `largest_gaps` leaves out for its few films."""
    return [
        item
        for item in metrics
        if item.group != "all" and item.metric == "accuracy" and item.n < fewest
    ]


def fact_groups(facts: Mapping[str, Sequence[Any]]) -> dict[str, list[str | None]]:
    """The subgroups that every evaluation reports.

    facts: `view_position`, `patient_sex` and `patient_age_years`, one value or None an image.
    """
    ages = facts["patient_age_years"]
    return {
        "view_position": [None if view is None else str(view) for view in facts["view_position"]],
        "patient_sex": [None if sex is None else str(sex) for sex in facts["patient_sex"]],
        "age": [None if age is None else age_band(float(age)) for age in ages],
    }
