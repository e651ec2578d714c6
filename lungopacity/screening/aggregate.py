"""A run's own metrics: what was read, found, and how fast; against labels where there are any."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lungopacity.dataset.manifest import FACT_COLUMNS
from lungopacity.errors import Status
from lungopacity.evaluation.metrics import (
    Metric,
    classification_metrics,
    subgroup_metrics,
    wilson_interval,
)
from lungopacity.evaluation.table import fact_groups
from lungopacity.models import ModelSpec
from lungopacity.radiograph import OUT_OF_DISTRIBUTION, QUALITY_FLAGS
from lungopacity.results.schema import class_column

_HISTOGRAM_BINS = 20


def run_metrics(predictions: pa.Table, spec: ModelSpec, seconds: float) -> list[Metric]:
    """Counts, errors by code, quality flags, rate of positives, score histogram, images a second.

    predictions: the published table.
    """
    images = predictions.num_rows
    metrics = [_count("images", images, images)]
    for status in Status:
        count = pc.sum(pc.equal(predictions["status"], status.value)).as_py() or 0
        metrics.append(_count(f"images_{status.value}", count, images))
    codes = predictions["error_code"].drop_null().value_counts().to_pylist()
    metrics += [
        _count("error_code", code["counts"], images, code["values"])
        for code in sorted(codes, key=lambda item: str(item["values"]))
    ]
    metrics += [
        _count("quality_flag", pc.sum(predictions[column]).as_py() or 0, images, flag)
        for flag in (*QUALITY_FLAGS, OUT_OF_DISTRIBUTION)
        for column in [f"quality_{flag}"]
    ]
    scored = predictions.filter(pc.equal(predictions["status"], Status.OK.value))
    metrics += _decision_rates(scored) + _histogram(scored, spec)
    metrics.append(_value("seconds", seconds, images))
    metrics.append(_value("images_per_s", images / seconds if seconds > 0 else 0.0, images))
    return metrics


def label_metrics(predictions: pa.Table, spec: ModelSpec, labels: pd.DataFrame) -> list[Metric]:
    """Metrics against the labels, over all and by view position, sex and age.

    Of the readable images whose label is one of the model's classes; empty where there is none.
    labels: as `read_labels` gives them; they fill in view, sex and age where the header is silent.
    """
    known = pc.and_(
        pc.equal(predictions["status"], Status.OK.value),
        pc.is_in(predictions["label"], value_set=pa.array(list(spec.class_names))),
    )
    rows = predictions.filter(known)
    if rows.num_rows == 0:
        return []
    probabilities_NK = np.stack(
        [rows[class_column("p", name)].to_numpy() for name in spec.class_names], axis=1
    ).astype(np.float64)
    index_of = {name: index for index, name in enumerate(spec.class_names)}
    labels_N = np.array([index_of[name] for name in rows["label"].to_pylist()])
    facts = labels.set_index("image").loc[pc.coalesce(rows["member"], rows["image"]).to_pylist()]
    columns = {
        name: [
            (None if pd.isna(told) else told) if read is None else read
            for read, told in zip(rows[name].to_pylist(), facts[name], strict=True)
        ]
        for name in FACT_COLUMNS
    }
    groups = fact_groups(columns)
    return classification_metrics(
        labels_N, probabilities_NK, spec.class_names, positive=spec.positive_class
    ) + subgroup_metrics(
        labels_N, probabilities_NK, spec.class_names, groups, positive=spec.positive_class
    )


def _decision_rates(scored: pa.Table) -> list[Metric]:
    n = scored.num_rows
    rates = []
    for decision in ("negative", "review", "positive"):
        count = pc.sum(pc.equal(scored["decision"], decision)).as_py() or 0
        low, high = wilson_interval(count, n) if n else (None, None)
        rate = count / n if n else float("nan")
        rates.append(Metric("all", "decision_rate", decision, rate, low, high, n))
    return rates


def _histogram(scored: pa.Table, spec: ModelSpec) -> list[Metric]:
    """How many images have a positive-class probability in each of 20 equal bins."""
    scores = scored[class_column("p", spec.positive_class)].to_numpy()
    counts, edges = np.histogram(scores, bins=_HISTOGRAM_BINS, range=(0.0, 1.0))
    return [
        _count("score_histogram", int(count), len(scores), f"{low:.2f}-{high:.2f}")
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _count(name: str, count: int, n: int, class_name: str | None = None) -> Metric:
    return Metric("all", name, class_name, float(count), None, None, n)


def _value(name: str, value: float, n: int) -> Metric:
    return Metric("all", name, None, value, None, None, n)
