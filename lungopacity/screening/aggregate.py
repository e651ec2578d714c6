"""The metrics of a run: what was read, what was found, how fast, and agreement with any labels."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lungopacity.errors import Status
from lungopacity.evaluation.bootstrap import REPLICATES, Resampling
from lungopacity.evaluation.measure import ScoredImages, measure
from lungopacity.evaluation.metrics import Metric, wilson_interval
from lungopacity.evaluation.table import fact_groups
from lungopacity.models import ModelSpec
from lungopacity.radiograph import OUT_OF_DISTRIBUTION, QUALITY_FLAGS
from lungopacity.results.schema import class_column
from lungopacity.results.workbench import quoted

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_HISTOGRAM_BINS = 20
_MOST_DRAWN = 200_000_000
"""Largest product of films and bootstrap replicates. For more films, fewer replicates are drawn, so
that publishing takes minutes however many labels there are."""
_FEWEST_REPLICATES = 200
"""Five of them lie beyond each end of the interval."""
_SCORED = f"WHERE status = {quoted(Status.OK.value)}"


def run_metrics(
    predictions: Any, spec: ModelSpec, seconds: float, *, resumed: bool = False
) -> list[Metric]:
    """Counts, errors by code, quality flags, rate of positives, score histogram, images a second.

    predictions: DuckDB relation of `predictions_schema`, of any size. `seconds`: time of this
    attempt. `resumed`: earlier attempts screened part of the images, so no speed is given.
    """

    def asked(sql: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = predictions.query("predictions", sql).fetchall()
        return rows

    ((images,),) = asked("SELECT count(*) FROM predictions")
    metrics = [_count("images", images, images)]
    statuses = dict(asked("SELECT status, count(*) FROM predictions GROUP BY status"))
    metrics += [
        _count(f"images_{status.value}", statuses.get(status.value, 0), images) for status in Status
    ]
    codes = asked(
        "SELECT error_code, count(*) FROM predictions WHERE error_code IS NOT NULL "
        "GROUP BY error_code ORDER BY error_code"
    )
    metrics += [_count("error_code", count, images, code) for code, count in codes]
    flags = (*QUALITY_FLAGS, OUT_OF_DISTRIBUTION)
    counts = ", ".join(f"count(*) FILTER (quality_{flag})" for flag in flags)
    (flagged,) = asked(f"SELECT {counts} FROM predictions")
    metrics += [
        _count("quality_flag", count, images, flag)
        for flag, count in zip(flags, flagged, strict=True)
    ]
    decisions = dict(asked(f"SELECT decision, count(*) FROM predictions {_SCORED} GROUP BY ALL"))
    metrics += _decision_rates(decisions)
    # The last bin includes 1.0.
    score = class_column("p", spec.positive_class)
    bins = dict(
        asked(
            f"SELECT least(floor({score} * {_HISTOGRAM_BINS}), {_HISTOGRAM_BINS - 1})::INTEGER, "
            f"count(*) FROM predictions {_SCORED} GROUP BY ALL"
        )
    )
    metrics += _histogram(bins)
    metrics.append(_value("seconds", seconds, images))
    if not resumed:
        metrics.append(_value("images_per_s", images / seconds, images))
    return metrics


def label_metrics(
    predictions: Any,
    spec: ModelSpec,
    labels: pd.DataFrame,
    known_films: Collection[str] = (),
    point_films: Collection[str] = (),
) -> list[Metric]:
    """Metrics against the labels, over all and by view position, sex and age, with intervals over
    patients, computed as `evaluate` does.

    They cover the scored images whose label stands for one of the model's classes; empty if there
    are no such labels. Images with such a label that were rejected, or could not be read, are
    counted as `films_without_score`: a model that is spared its difficult films looks too good.
    Images of a file with several are counted as `films_of_several_images` and left out, because the
    label may mean any of them; `evaluate` refuses such files.
    predictions: as for `run_metrics`. labels: as `read_labels` returns them; their view, sex and
    age take precedence over the header's, as in `evaluate`.

    `known_films`: content_sha256 of the films that the model was trained, selected or calibrated
    on. On these the model looks too good, so they are left out and counted as
    `films_known_to_model`. `point_films`: the films that the operating point was picked on. On
    these only the decisions look too good, so they stay and are counted as
    `films_operating_point_picked_on`.
    """
    from lungopacity.dataset.manifest import FACT_COLUMNS, facts_of

    columns = [class_column("p", name) for name in spec.class_names]
    of_classes = f"label IN ({', '.join(quoted(label) for label in spec.class_of_label)})"
    ((labelled,),) = predictions.query(
        "predictions", f"SELECT count(*) FROM predictions WHERE {of_classes}"
    ).fetchall()
    if not labelled:
        return []
    rows = predictions.query(
        "predictions",
        "SELECT coalesce(member, image) AS name, label, content_sha256, patient_hmac, "
        f"{', '.join(columns)}, "
        f"{', '.join(FACT_COLUMNS)} FROM predictions {_SCORED} AND {of_classes}",
    ).to_arrow_table()
    # A label is given only if its name is that of a single file.
    of_several = dict(
        predictions.query(
            "predictions",
            "SELECT coalesce(member, image) AS name, count(*) FROM predictions "
            f"WHERE {of_classes} GROUP BY name HAVING max(frame) > 0",
        ).fetchall()
    )
    is_of_several = pa.compute.is_in(rows["name"], pa.array(of_several, pa.string()))
    rows = rows.filter(pa.compute.invert(is_of_several))
    images_of_several = sum(of_several.values())
    without_score = labelled - images_of_several - rows.num_rows
    left_out = [
        _count("films_of_several_images", images_of_several, labelled),
        _count("films_without_score", without_score, labelled),
    ]
    if rows.num_rows == 0:
        return left_out
    seen = pa.compute.is_in(rows["content_sha256"], pa.array(known_films, pa.string()))
    left_out.append(_count("films_known_to_model", pa.compute.sum(seen).as_py(), rows.num_rows))
    rows = rows.filter(pa.compute.invert(seen))
    if rows.num_rows == 0:
        return left_out
    probabilities_NK = np.stack([rows[name].to_numpy() for name in columns], axis=1)
    index_of = {label: spec.class_names.index(name) for label, name in spec.class_of_label.items()}
    labels_N = np.array([index_of[label] for label in rows["label"].to_pylist()])
    told = labels.set_index("image").loc[rows["name"].to_pylist()]
    facts = facts_of(told, rows.select(list(FACT_COLUMNS)).to_pandas())
    scored = ScoredImages(
        labels_N,
        probabilities_NK.astype(np.float64),
        spec.class_names,
        spec.positive_class,
        points={"chosen": spec.operating_point},
        # Those that the run decided by: the header's, whatever the labels state.
        views=rows["view_position"].to_pylist(),
    )
    replicates = min(REPLICATES, max(_FEWEST_REPLICATES, _MOST_DRAWN // len(labels_N)))
    # As in `threshold`: the labels' own, or else the header's, hashed.
    patients = told["patient_id"].where(
        told["patient_id"].notna(), rows["patient_hmac"].to_pylist()
    )
    resampling = Resampling.of(patients.tolist(), replicates)
    unknown = int(patients.isna().sum())
    log.info(
        "95 %% intervals against the labels: %s%s",
        resampling.described(proportions=True),
        f"; films without a known patient, each counted as one: {unknown}" if unknown else "",
    )
    among = pa.compute.is_in(rows["content_sha256"], pa.array(point_films, pa.string()))
    picked_on = _count(
        "films_operating_point_picked_on", pa.compute.sum(among).as_py(), rows.num_rows
    )
    return [*left_out, picked_on, *measure(scored, fact_groups(facts), resampling)]


def warn_of_useless_labels(
    predictions: Any, spec: ModelSpec, labels: pd.DataFrame, *, may_quote_names: bool
) -> None:
    """Warn if no label can be used, because names or classes are written differently.

    predictions, labels: as for `label_metrics`. `may_quote_names`: whether the warning may quote
    names of images.
    """
    known = ", ".join(quoted(label) for label in spec.class_of_label)
    ((images, labelled, of_classes, image, label),) = predictions.query(
        "predictions",
        f"SELECT count(*), count(label), count(*) FILTER (label IN ({known})), "
        "min(coalesce(member, image)), min(label) FROM predictions",
    ).fetchall()
    if images and not labelled:
        named = labels["image"].min()
        example = f": the labels name {named!r}, an image is {image!r}" if may_quote_names else ""
        log.warning("the labels match none of %d images%s", images, example)
    elif labelled and not of_classes:
        log.warning(
            "none of %d labels is one of the model's classes: one label is %r, the model knows %s",
            labelled,
            label,
            ", ".join(spec.class_of_label),
        )


def _decision_rates(decisions: Mapping[str, int]) -> list[Metric]:
    """The fraction of each decision among all; empty if nothing was decided."""
    n = sum(decisions.values())
    rates = []
    for decision in ("negative", "review", "positive") if n else ():
        count = decisions.get(decision, 0)
        low, high = wilson_interval(count, n)
        rates.append(Metric("all", "decision_rate", decision, count / n, low, high, n, "wilson"))
    return rates


def _histogram(bins: Mapping[int, int]) -> list[Metric]:
    """How many images have a positive-class probability in each of 20 equal bins."""
    n = sum(bins.values())
    edges = np.linspace(0.0, 1.0, _HISTOGRAM_BINS + 1)
    return [
        _count("score_histogram", bins.get(place, 0), n, f"{low:.2f}-{high:.2f}")
        for place, (low, high) in enumerate(pairwise(edges))
    ]


def _count(name: str, count: int, n: int, class_name: str | None = None) -> Metric:
    return Metric("all", name, class_name, float(count), None, None, n)


def _value(name: str, value: float, n: int) -> Metric:
    return Metric("all", name, None, value, None, None, n)
