"""Table 1 of the paper whose classical CNN this project follows, next to measured values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lungopacity.evaluation.metrics import Metric
from lungopacity.words import printable

PAPER_TEST_IMAGES = 2431
PAPER_ACCURACY = 0.9293


@dataclass(frozen=True)
class ClassFigures:
    """Precision, recall and F1 of one class against the rest, each 0 … 1; NaN if undefined."""

    precision: float
    recall: float
    f1: float


PAPER_CLASSES = {
    "normal": ClassFigures(precision=0.92, recall=0.97, f1=0.95),
    "lung opacity": ClassFigures(precision=0.95, recall=0.85, f1=0.90),
}
"""By class name, in lower case and with spaces. The paper rounds to two digits."""

_NAME_WIDTH = 24
_COLUMNS = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Table1Row:
    """One class: the measured values, and those that the paper reports."""

    class_name: str
    measured: ClassFigures
    paper: ClassFigures | None
    """None if the model's classes are not the paper's two."""
    low: ClassFigures
    high: ClassFigures
    """Bounds of the 95 % intervals of the measured values; NaN if there is none."""

    @property
    def difference(self) -> ClassFigures | None:
        """Measured minus paper."""
        if self.paper is None:
            return None
        return ClassFigures(
            precision=self.measured.precision - self.paper.precision,
            recall=self.measured.recall - self.paper.recall,
            f1=self.measured.f1 - self.paper.f1,
        )


def table1(metrics: Sequence[Metric], class_names: Sequence[str]) -> list[Table1Row]:
    """One row per class, in the order of `class_names`, from the metrics over all images.

    `Lung_Opacity` and `lung opacity` are the same class. Raises `ValueError` if precision, recall
    or f1 of a class is not among the metrics.
    """
    found = {
        (metric.class_name, metric.metric): metric for metric in metrics if metric.group == "all"
    }
    spelled = [name.replace("_", " ").lower() for name in class_names]
    comparable = sorted(spelled) == sorted(PAPER_CLASSES)
    rows = []
    for name, plain in zip(class_names, spelled, strict=True):
        missing = [column for column in _COLUMNS if (name, column) not in found]
        if missing:
            raise ValueError(f"no {', '.join(missing)} of class '{name}' among the metrics")
        its = [found[name, column] for column in _COLUMNS]
        rows.append(
            Table1Row(
                class_name=name,
                measured=ClassFigures(*(item.value for item in its)),
                paper=PAPER_CLASSES[plain] if comparable else None,
                low=ClassFigures(*(_bound(item.ci_low) for item in its)),
                high=ClassFigures(*(_bound(item.ci_high) for item in its)),
            )
        )
    return rows


def format_table1(rows: Sequence[Table1Row]) -> str:
    """Plain text with lines of at most 100 columns: for each value the measured one, the paper's
    and their difference (the latter two only if the classes are the paper's), and below it the
    95 % interval of the measured value."""
    comparable = any(row.paper for row in rows)
    heading = " " * _NAME_WIDTH + "".join(f"  {column:^22}" for column in _COLUMNS)
    paper, difference = ("paper", "diff") if comparable else ("", "")
    unit = f"  {'model':>6} {paper:>6} {difference:>8}"
    lines = [heading.rstrip(), (f"{'class':{_NAME_WIDTH}}" + unit * len(_COLUMNS)).rstrip()]
    for row in rows:
        cells = []
        for column in _COLUMNS:
            measured = _number(getattr(row.measured, column), ".4f")
            paper = _number(getattr(row.paper, column, None), ".2f")
            difference = _number(getattr(row.difference, column, None), "+.4f")
            cells.append(f"  {measured:>6} {paper:>6} {difference:>8}")
        lines.append((f"{_fitted(row.class_name):{_NAME_WIDTH}}" + "".join(cells)).rstrip())
        bounds = [(getattr(row.low, column), getattr(row.high, column)) for column in _COLUMNS]
        cells = ["" if math.isnan(low) else f"{low:.4f} to {high:.4f}" for low, high in bounds]
        if any(cells):
            lines.append(
                (
                    f"{'  95 % interval':{_NAME_WIDTH}}" + "".join(f"  {cell:22}" for cell in cells)
                ).rstrip()
            )
    if comparable:
        lines.append(
            f"paper: its classical CNN on its own {PAPER_TEST_IMAGES:,} test images, "
            f"accuracy {PAPER_ACCURACY}"
        )
    return "\n".join(lines)


def _bound(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return ""
    return "n/a" if math.isnan(value) else format(value, spec)


def _fitted(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
