"""The result of `explain`, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, fields

import pyarrow as pa

from lungopacity.errors import NOTICE
from lungopacity.evaluation.metrics import Metric
from lungopacity.words import finite


@dataclass(frozen=True)
class ExplanationResult:
    """What was explained, and where the report is."""

    model_id: str
    output: str
    positive_class: str
    explained: int
    rejected: int
    failed: int
    with_boxes: int
    """Explained images that have boxes."""
    unknown_patients: int
    """Images with boxes for which the labels give no patient id; each counts as a patient."""
    intervals: str
    """How the 95 % intervals were computed; empty without boxes."""
    synthetic: bool
    metrics: list[Metric]
    table: pa.Table
    """Of `EXPLANATIONS_SCHEMA`, one row per image."""

    @property
    def exit_code(self) -> int:
        """0: every image was read. 1: some could not be."""
        return 1 if self.failed else 0

    def value(self, metric: str, group: str = "all") -> float:
        """The value of a metric. Raises `KeyError` if it was not measured."""
        for item in self.metrics:
            if (item.metric, item.group) == (metric, group):
                return item.value
        raise KeyError((metric, group))

    def summary(self) -> str:
        """Counts, the pointing game compared with chance, and where the files are."""
        lines = [
            f"model {self.model_id}: {self.explained} images explained, {self.rejected} rejected, "
            f"{self.failed} could not be read" + (", synthetic" if self.synthetic else "")
        ]
        codes = Counter(self.table["error_code"].drop_null().to_pylist())
        lines += [f"  {code}: {count}" for code, count in sorted(codes.items())]
        lines += [
            f"  {_heading(group.group, group.n)}\n{_shares(self, group.group)}"
            for group in self.metrics
            if group.metric == "pointing_game"
        ]
        if self.with_boxes:
            unknown = self.unknown_patients
            lines.append(
                f"  95 % intervals: {self.intervals}"
                + (f"; {unknown} films have no patient_id" if unknown else "")
            )
        return "\n".join([*lines, f"pictures and explain.parquet in {self.output}", NOTICE])

    def to_json(self) -> str:
        """The counts and metrics; the rows are in explain.parquet."""
        facts = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("metrics", "table")
        }
        rows = finite([vars(metric) for metric in self.metrics])
        return json.dumps({"notice": NOTICE, **facts, "metrics": rows}, indent=2)


def _heading(group: str, n: int) -> str:
    films = f"{n} films with boxes" if n != 1 else "1 film with boxes"
    return films if group == "all" else f"{films}, decided positive"


def _shares(result: ExplanationResult, group: str) -> str:
    """The lines of one group of films."""
    of_group = {item.metric: item for item in result.metrics if item.group == group}

    def share(title: str, name: str, chance: str) -> str:
        return f"    {title:34}{_figure(of_group[name])}; chance {of_group[chance].value:.3f}"

    tolerant = "pointing_game_with_tolerance"
    return "\n".join(
        [
            share("highest point in a box", "pointing_game", "pointing_game_chance")
            + f", off black {of_group['pointing_game_chance_not_black'].value:.3f}",
            share("  within 15 pixels of 224", tolerant, f"{tolerant}_chance"),
            share("share of the map in boxes", "energy_in_boxes", "pointing_game_chance"),
        ]
    )


def _figure(item: Metric) -> str:
    if item.ci_low is None or item.ci_high is None:
        return f"{item.value:.3f} (no interval)"
    return f"{item.value:.3f} (95 % interval {item.ci_low:.3f} to {item.ci_high:.3f})"
