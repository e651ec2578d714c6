"""The report of an evaluation, as text, tables and figures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.errors import NOTICE, UserError
from lungopacity.evaluation import canvas, curves, plots
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ScoredImages
from lungopacity.evaluation.metrics import Metric, confusion_matrix
from lungopacity.evaluation.paper import format_table1, table1
from lungopacity.evaluation.table import (
    PICKED_GAPS,
    Gap,
    decision_words,
    flatters,
    knows,
    metric_value,
    metrics_table,
    uncompared_figures,
    uncompared_groups,
    with_interval,
)
from lungopacity.models import OperatingPoint
from lungopacity.results.schema import class_column, evaluation_schema
from lungopacity.storage import Store, open_store
from lungopacity.storage.parquet import parquet_bytes
from lungopacity.storage.probe import check_writable
from lungopacity.words import finite, printable

_MOST_LISTED = 10
EVALUATION = "evaluation.json"
EXPLANATION = "explain.json"
"""Files that are written last: if one exists, the report beside it is complete."""


@dataclass(frozen=True)
class ModelScores:
    """A model's output for images; row i of each array is the same image."""

    logits_NK: npt.NDArray[np.float32]
    """Before calibration."""
    probabilities_NK: npt.NDArray[np.float32]
    """Calibrated."""
    disagreement_N: npt.NDArray[np.float32] | None
    """See `Scores`."""
    unlike_N: npt.NDArray[np.float32] | None
    """See `Scorer.out_of_distribution`."""

    def rows(self, rows: npt.NDArray[np.int64]) -> ModelScores:
        """Only these images."""
        return ModelScores(
            self.logits_NK[rows],
            self.probabilities_NK[rows],
            None if self.disagreement_N is None else self.disagreement_N[rows],
            None if self.unlike_N is None else self.unlike_N[rows],
        )

    @classmethod
    def joined(cls, parts: Sequence[ModelScores]) -> ModelScores:
        """The parts, concatenated."""
        columns: dict[str, Any] = {}
        for name in vars(parts[0]):
            column = [getattr(part, name) for part in parts]
            columns[name] = None if column[0] is None else np.concatenate(column)
        return cls(**columns)


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured, and where the report is."""

    model_id: str
    output: str
    split: str
    images: int
    unreadable: int
    """Labelled images of the split that could not be read. No metric counts them."""
    rejected: int
    """Labelled images that were read but left out by a rule. No metric counts them either."""
    patients: int
    """Number of patients; an image without patient_id counts as a patient of its own."""
    unknown_patients: int
    """Images without patient_id."""
    intervals: str
    """How the 95 % intervals were computed."""
    synthetic: bool
    class_names: tuple[str, ...]
    positive_class: str
    operating_point: str | None
    """The name of the operating point that was asked for; None is the model's own choice."""
    decided_at: str
    """The name of the operating point that made the decisions. Subgroups are compared at it."""
    metrics: list[Metric]
    gaps: tuple[Gap, ...] = ()
    """Gaps between subgroups, the largest first."""
    known_to_model: int = 0
    """Images that the model was trained, selected or calibrated on; none in a test split."""
    picked_on: Mapping[str, int] = field(default_factory=dict)
    """For each site's operating point that was picked on some of these films, on how many."""

    @property
    def exit_code(self) -> int:
        """0: every labelled image was read. 1: some could not be."""
        return 1 if self.unreadable else 0

    def value(self, metric: str, class_name: str | None = None) -> float:
        """The value of a metric over all images. Raises `KeyError` if it was not measured."""
        value = metric_value(self.metrics, metric, class_name)
        if value is None:
            raise KeyError((metric, class_name))
        return value

    def summary(self) -> str:
        """Table 1 of the paper next to this model, further metrics, and where the files are."""
        lines = [
            f"model {self.model_id} on {self.images} images of split '{self.split}'"
            + (f", {self.unreadable} unreadable" if self.unreadable else "")
            + (f", {self.rejected} rejected" if self.rejected else "")
            + (", synthetic" if self.synthetic else ""),
            *([knows(self.known_to_model)] if self.known_to_model else []),
            f"95 % intervals: {self.intervals}"
            + (
                f"; {self.unknown_patients} films have no patient_id"
                if self.unknown_patients
                else ""
            ),
            format_table1(table1(self.metrics, self.class_names)),
        ]
        shown = {
            ("accuracy", None): "accuracy",
            ("balanced_accuracy", None): "balanced accuracy",
            ("roc_auc", self.positive_class): f"AUC {self.positive_class}",
            ("average_precision", self.positive_class): f"av. precision {self.positive_class}",
            ("brier_binary", self.positive_class): f"Brier {self.positive_class}, 0 to 1",
            ("brier", None): "Brier of all classes, 0 to 2",
            ("brier_before_temperature", None): "  before temperature",
            ("log_loss", None): "log loss (nats)",
            ("expected_calibration_error", None): "ECE of the predicted class",
            ("expected_calibration_error_before_temperature", None): "  before temperature",
            ("expected_calibration_error", self.positive_class): f"ECE {self.positive_class}",
        }
        overall = {(item.metric, item.class_name): item for item in self.metrics if _whole(item)}
        support = [f"{i.value:.0f} {i.class_name}" for i in self.metrics if _is_support(i)]
        lines += [_row("films", ", ".join(support))] if support else []
        by_chance = {
            item.class_name: f", by chance alone {item.value:.4f}"
            for item in self.metrics
            if _whole(item) and item.metric == "expected_calibration_error_by_chance"
        }
        lines += [
            _row(
                name,
                with_interval(overall[key])
                + (by_chance.get(key[1], "") if key[0] == "expected_calibration_error" else ""),
            )
            for key, name in shown.items()
            if key in overall
        ]
        lines += self._decisions()
        if self.operating_point is not None:
            lines.append(_row("decided at", f"{self.operating_point}, in predictions.parquet"))
        lines += [
            _row(
                f"{gap.figure} by {gap.column}",
                f"{_of_group(gap.worst)}; {_of_group(gap.best)}; difference {gap.size_words}",
            )
            for gap in self.gaps
        ]
        lines += [_row("", PICKED_GAPS)] if self.gaps else []
        uncompared = uncompared_figures(self.metrics, self.gaps)
        lines += [_row("too few patients to compare", "; ".join(uncompared))] if uncompared else []
        few = uncompared_groups(self.metrics, self.positive_class, self.decided_at)
        if few:
            words = [f"{item.group} ({_films(item)})" for item in few[:_MOST_LISTED]]
            words += [f"and {len(few) - _MOST_LISTED} more"] if len(few) > _MOST_LISTED else []
            lines.append(_row("few patients, or of one class", ", ".join(words)))
        return "\n".join([*lines, f"report in {self.output}", NOTICE])

    def _decisions(self) -> list[str]:
        """A line for each operating point, two if it has a band."""
        points = [
            item.class_name
            for item in self.metrics
            if _whole(item) and item.metric == "decision_sensitivity"
        ]
        lines = []
        for name in points:
            of_point = (i for i in self.metrics if _whole(i) and i.class_name == name)
            names = (f"at {name}", "  review counted as found")
            lines += [
                _row(name, words)
                for name, words in zip(names, decision_words(of_point), strict=False)
            ]
            among = self.picked_on.get(str(name))
            lines += [] if among is None else [_row("", flatters(among))]
        return lines

    def to_json(self) -> str:
        """All fields, with undefined values as null."""
        rows = finite([vars(metric) for metric in self.metrics])
        facts = {key: v for key, v in vars(self).items() if key not in ("metrics", "gaps")}
        gaps = [gap.to_dict() for gap in self.gaps]
        return json.dumps({"notice": NOTICE, **facts, "gaps": gaps, "metrics": rows}, indent=2)


def check_output(output: str, holds_not: str) -> None:
    """Raises `UserError` if `output` cannot be written to, or holds a report of the other kind,
    whose metrics.parquet would be overwritten. holds_not: the last file of the other kind."""
    if open_store(output).head(holds_not) is not None:
        raise UserError(
            f"{output}: holds another kind of report ({holds_not}); choose another --output"
        )
    check_writable(output)


def write_tables(
    store: Store,
    result: EvaluationResult,
    data: LabelledPixels,
    resampling: Resampling,
    scores: ModelScores,
    point: OperatingPoint,
) -> None:
    """Write metrics.parquet, predictions.parquet (one row per image, decided at `point`) and
    table1.txt."""
    run_id = f"evaluation-{result.split}"
    table = metrics_table(result.metrics, run_id, result.model_id, synthetic=result.synthetic)
    frame = data.images.assign(model_id=result.model_id, synthetic=result.synthetic)
    # An age above 89 may identify a person (HIPAA safe harbour), so 90 stands for all of them.
    ages = pd.to_numeric(frame["patient_age_years"], errors="coerce")
    frame["patient_age_years"] = np.floor(ages.clip(upper=90))
    # A report must not name patients, but `compare` needs to know which films share one.
    frame["patient_cluster"] = resampling.patient_N
    frame = frame.drop(columns="patient_id")
    for index, name in enumerate(result.class_names):
        frame[class_column("p", name)] = scores.probabilities_NK[:, index]
        frame[class_column("logit", name)] = scores.logits_NK[:, index]
    predicted = scores.probabilities_NK.argmax(axis=1)
    frame["predicted_label"] = [result.class_names[index] for index in predicted]
    p_N = scores.probabilities_NK[:, result.class_names.index(result.positive_class)]
    frame["decision"] = [
        # As in screening, which knows no labels.
        point.decide(float(p), view)
        for p, view in zip(p_N, data.views("header_view"), strict=True)
    ]
    frame["ensemble_disagreement"] = scores.disagreement_N
    frame["out_of_distribution_score"] = scores.unlike_N
    schema = evaluation_schema(result.class_names)
    predictions = pa.Table.from_pandas(frame, schema, preserve_index=False)
    # Removes the metadata that pandas adds.
    predictions = predictions.replace_schema_metadata(schema.metadata)
    store.write("metrics.parquet", parquet_bytes(table))
    store.write("predictions.parquet", parquet_bytes(predictions))
    store.write("table1.txt", (result.summary() + "\n").encode())


def write_figures(
    store: Store,
    result: EvaluationResult,
    scored: ScoredImages,
    resampling: Resampling,
    history_parquet: bytes | None,
) -> None:
    """Write each figure as PNG and SVG, replacing those of an older report. history_parquet: the
    training history, if the model folder has it."""
    labels_N, exact_NK, names = scored.labels_N, scored.probabilities_NK, result.class_names
    note = "synthetic" if result.synthetic else ""
    title = f"{result.model_id} · {result.split} · n = {result.images}"
    matrix = confusion_matrix(labels_N, exact_NK.argmax(axis=1), len(names))
    points = {result.positive_class: scored.points}
    figures = {
        "confusion_matrix": plots.confusion_matrix_figure(matrix, names, title, note=note),
        "roc": curves.roc_figure(
            labels_N,
            exact_NK,
            names,
            title,
            note,
            resampling=resampling,
            points=points,
            views=scored.views,
        ),
        "precision_recall": curves.precision_recall_figure(
            labels_N, exact_NK, names, title, note, resampling=resampling
        ),
        "reliability": plots.reliability_figure(
            labels_N,
            exact_NK,
            names,
            title,
            note,
            positive=result.positive_class,
            uncalibrated=scored.uncalibrated_NK,
            resampling=resampling,
        ),
    }
    if history_parquet is not None:
        history = pd.read_parquet(io.BytesIO(history_parquet))
        figures["history"] = plots.history_figure(
            history, f"{result.model_id} · training", note=note
        )
    else:
        for name in ("history.png", "history.svg"):
            store.delete(name)
    for name, figure in figures.items():
        store.write(f"{name}.png", canvas.figure_png(figure))
        store.write(f"{name}.svg", canvas.figure_svg(figure))


def _whole(item: Metric) -> bool:
    return item.group == "all"


def _is_support(item: Metric) -> bool:
    return _whole(item) and item.metric == "support"


def _row(name: str, words: str) -> str:
    """A line of the summary; a longer name shifts the words to the right."""
    return printable(f"{name:31} {words}")


def _of_group(item: Metric) -> str:
    """`PA 0.9412 (0.9200 to 0.9600), n = 440`."""
    return f"{item.group.partition('=')[2]} {with_interval(item)}, n = {item.n}"


def _films(item: Metric) -> str:
    """`n = 40 of 2 patients`."""
    return f"n = {item.n}" + ("" if item.patients is None else f" of {item.patients} patients")
