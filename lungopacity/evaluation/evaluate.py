"""Measure a model on labelled images it has not seen, and write the report."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.dataset.manifest import (
    FACT_COLUMNS,
    assign_splits,
    check_contents,
    check_patients,
    read_labels,
    select_classes,
)
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.errors import NOTICE, UserError
from lungopacity.evaluation import plots
from lungopacity.evaluation.card import model_card
from lungopacity.evaluation.metrics import (
    Metric,
    calibration_bins,
    classification_metrics,
    confusion_matrix,
    subgroup_metrics,
)
from lungopacity.evaluation.operating_points import decision_metrics
from lungopacity.evaluation.paper import format_table1, table1
from lungopacity.evaluation.table import (
    fact_groups,
    largest_gaps,
    metric_value,
    metrics_table,
)
from lungopacity.models import ModelSpec, TrainedModel, load_model, read_history
from lungopacity.results.schema import class_column
from lungopacity.runtime import ray_session, require_resources, resolve_gpu
from lungopacity.storage import Store, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured, and where the report lies."""

    model_id: str
    output: str
    split: str
    images: int
    unreadable: int
    """Labelled images of the split that could not be read: not in the figures."""
    synthetic: bool
    class_names: tuple[str, ...]
    positive_class: str
    metrics: list[Metric]

    @property
    def exit_code(self) -> int:
        """0: every labelled image was read. 1: some could not be."""
        return 1 if self.unreadable else 0

    def value(self, metric: str, class_name: str | None = None) -> float:
        """Over all images. Raises `KeyError` where it was not measured."""
        value = metric_value(self.metrics, metric, class_name)
        if value is None:
            raise KeyError((metric, class_name))
        return value

    def summary(self) -> str:
        """Table 1 of the paper with this model beside it, and where the files are."""
        lines = [
            f"model {self.model_id} on {self.images} images of split '{self.split}'"
            + (f", {self.unreadable} unreadable" if self.unreadable else "")
            + (", synthetic" if self.synthetic else ""),
            format_table1(table1(self.metrics, self.class_names)),
        ]
        told = {
            ("accuracy", None),
            ("brier", None),
            ("expected_calibration_error", None),
            ("expected_calibration_error_before_temperature", None),
            ("roc_auc", self.positive_class),
        }
        for item in self.metrics:
            if item.group == "all" and (item.metric, item.class_name) in told:
                interval = (
                    f" (95 % interval {item.ci_low:.4f} to {item.ci_high:.4f})"
                    if item.ci_low is not None and item.ci_high is not None
                    else ""
                )
                name = f"{item.metric} {item.class_name or ''}".strip()
                name = name.replace("expected_calibration_error", "ECE").replace("_", " ")
                lines.append(f"{name:28}{item.value:.4f}{interval}")
        lines += self._decisions()
        lines += [
            f"{'AUC by ' + gap.worst.group.partition('=')[0]:28}{_with_interval(gap.worst)}, "
            f"{_with_interval(gap.best)}"
            for gap in largest_gaps(self.metrics, self.positive_class)
        ]
        return "\n".join([*lines, f"report in {self.output}", NOTICE])

    def _decisions(self) -> list[str]:
        """A line for each operating point."""
        shares: dict[str, list[str]] = {}
        for item in self.metrics:
            if item.group == "all" and item.metric in (
                "decision_sensitivity",
                "decision_specificity",
            ):
                word = item.metric.removeprefix("decision_")
                shares.setdefault(str(item.class_name), []).append(f"{word} {item.value:.4f}")
        return [f"{'at ' + name:28}{', '.join(words)}" for name, words in shares.items()]

    def to_json(self) -> str:
        """Everything, undefined values as null."""
        rows = [
            {key: _finite(value) for key, value in vars(metric).items()} for metric in self.metrics
        ]
        facts = {key: value for key, value in vars(self).items() if key != "metrics"}
        return json.dumps({"notice": NOTICE, **facts, "metrics": rows}, indent=2)


def evaluate(
    model: str,
    images: Sequence[str],
    labels: str,
    output: str,
    *,
    split: str = "test",
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
    use_gpu: bool | None = None,
) -> EvaluationResult:
    """Score the labelled images of one split and write metrics, scores and figures to `output`.

    Where the labels carry no split, it is the one that training with the model's seed made of them.
    `split`: train, validation, test or all. `accept`, `reject_quality`: as in screening; what is
    rejected is left out. Raises `UserError`.
    """
    accepted, rejecting = rules_from(accept, reject_quality)
    trained = load_model(model)
    spec = trained.spec
    chosen = labels_of_split(labels, spec, split)
    with ray_session():
        rules = ReadSettings(spec.preprocessing, accept=accepted, reject_quality=rejecting)
        data = load_pixels(images, chosen, spec.class_names, rules, labels)
        check_contents(data.images, labels)
        logits_NK, probabilities_NK = _scores(trained, data.pixels_NHW, resolve_gpu(use_gpu))
    # Sums of float32 are off by a rounding, which some metrics warn of.
    exact_NK = probabilities_NK.astype(np.float64)
    exact_NK /= exact_NK.sum(axis=1, keepdims=True)
    metrics = _metrics(data, exact_NK, spec.positive_class)
    metrics.append(_calibration_before(data, logits_NK))
    metrics += decision_metrics(
        exact_NK[:, spec.positive_index],
        data.labels_N == spec.positive_index,
        spec.operating_points or {"default": spec.operating_point},
    )
    synthetic = data.synthetic or spec.synthetic
    result = EvaluationResult(
        model_id=trained.model_id,
        output=output,
        split=split,
        images=len(data.labels_N),
        unreadable=len(data.unreadable),
        synthetic=synthetic,
        class_names=spec.class_names,
        positive_class=spec.positive_class,
        metrics=metrics,
    )
    store = open_store(output)
    _write_tables(store, result, data, logits_NK, probabilities_NK)
    card = model_card(spec, trained.model_id, metrics, split=split, unreadable=result.unreadable)
    store.write("model_card.md", card.encode())
    _write_figures(store, result, data, exact_NK, read_history(model))
    return result


def labels_of_split(labels: str, spec: ModelSpec, split: str) -> pd.DataFrame:
    """The rows of a labels file that are of the model's classes and of one split, or of `all`.

    Raises `UserError` where there is none, or where a patient is in two splits.
    """
    frame = select_classes(read_labels(labels), spec.class_of_label, labels)
    given = frame["split"].notna().all() and split != "validation"
    if split != "all" and not given:
        seed = int(spec.training.get("settings", {}).get("seed", 0))
        frame = assign_splits(frame, labels, seed)
    check_patients(frame, labels)
    chosen = frame if split == "all" else frame[frame["split"] == split].reset_index(drop=True)
    if chosen.empty:
        raise UserError(f"{labels}: no image in split '{split}'; give --split all or another")
    return chosen


def _scores(
    model: TrainedModel, pixels_NHW: npt.NDArray[np.uint8], use_gpu: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Logits and probabilities, in a Ray task: the driver of a submitted job may have no GPU."""
    import ray

    require_resources(cpus=1, gpus=1 if use_gpu else 0, what="evaluation")

    def run(trained: TrainedModel, pixels: npt.NDArray[np.uint8]) -> Any:
        import os

        from lungopacity.models.scorer import Scorer

        # Ray allows a task one thread; nothing else runs here while it computes.
        scorer = Scorer(trained, use_gpu=use_gpu, threads=len(os.sched_getaffinity(0)))
        logits_NK = scorer.logits(pixels)
        return logits_NK, scorer.probabilities(logits_NK)

    scores: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] = ray.get(
        ray.remote(run)
        .options(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=2)
        .remote(model, pixels_NHW)
    )
    return scores


def _calibration_before(data: LabelledPixels, logits_NK: npt.NDArray[np.float32]) -> Metric:
    """What the calibration error would be without the temperature."""
    raw_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True).astype(np.float64))
    raw_NK /= raw_NK.sum(axis=1, keepdims=True)
    error = calibration_bins(data.labels_N, raw_NK).expected_calibration_error
    name = "expected_calibration_error_before_temperature"
    return Metric("all", name, None, error, None, None, len(data.labels_N))


def _metrics(
    data: LabelledPixels, exact_NK: npt.NDArray[np.float64], positive: str
) -> list[Metric]:
    groups = fact_groups(
        {
            name: [None if pd.isna(value) else value for value in data.images[name]]
            for name in FACT_COLUMNS
        }
    )
    return classification_metrics(
        data.labels_N, exact_NK, data.class_names, positive=positive
    ) + subgroup_metrics(data.labels_N, exact_NK, data.class_names, groups, positive=positive)


def _write_tables(
    store: Store,
    result: EvaluationResult,
    data: LabelledPixels,
    logits_NK: npt.NDArray[np.float32],
    probabilities_NK: npt.NDArray[np.float32],
) -> None:
    run_id = f"evaluation-{result.split}"
    table = metrics_table(result.metrics, run_id, result.model_id, synthetic=result.synthetic)
    frame = data.images.assign(model_id=result.model_id, synthetic=result.synthetic)
    # Above 89 an age identifies (HIPAA safe harbour): 90 stands for all of them.
    ages = pd.to_numeric(frame["patient_age_years"], errors="coerce")
    frame["patient_age_years"] = ages.clip(upper=90)
    # Who the patient is does not belong into a report.
    frame = frame.drop(columns="patient_id")
    for index, name in enumerate(result.class_names):
        frame[class_column("p", name)] = probabilities_NK[:, index]
        frame[class_column("logit", name)] = logits_NK[:, index]
    predicted = probabilities_NK.argmax(axis=1)
    frame["predicted_label"] = [result.class_names[index] for index in predicted]
    scores = pa.Table.from_pandas(frame, preserve_index=False)
    scores = scores.replace_schema_metadata({"notice": NOTICE})
    for name, content in (("metrics.parquet", table), ("predictions.parquet", scores)):
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink, compression="zstd")
        store.write(name, sink.getvalue().to_pybytes())
    store.write("evaluation.json", result.to_json().encode())
    store.write("table1.txt", (result.summary() + "\n").encode())


def _write_figures(
    store: Store,
    result: EvaluationResult,
    data: LabelledPixels,
    exact_NK: npt.NDArray[np.float64],
    history_parquet: bytes | None,
) -> None:
    labels_N, names = data.labels_N, result.class_names
    note = "synthetic" if result.synthetic else ""
    title = f"{result.model_id} · {result.split} · n = {result.images}"
    matrix = confusion_matrix(labels_N, exact_NK.argmax(axis=1), len(names))
    figures = {
        "confusion_matrix": plots.confusion_matrix_figure(matrix, names, title, note=note),
        "roc": plots.roc_figure(labels_N, exact_NK, names, title, note=note),
        "precision_recall": plots.precision_recall_figure(
            labels_N, exact_NK, names, title, note=note
        ),
        "reliability": plots.reliability_figure(labels_N, exact_NK, names, title, note=note),
    }
    if history_parquet is not None:
        history = pd.read_parquet(io.BytesIO(history_parquet))
        figures["history"] = plots.history_figure(
            history, f"{result.model_id} · training", note=note
        )
    for name, figure in figures.items():
        store.write(f"{name}.png", plots.figure_png(figure))
        store.write(f"{name}.svg", plots.figure_svg(figure))


def _with_interval(item: Metric) -> str:
    value = item.group.partition("=")[2]
    return f"{value} {item.value:.4f} ({item.ci_low:.4f} to {item.ci_high:.4f}, n = {item.n})"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
