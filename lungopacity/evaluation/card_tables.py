"""The metrics of a model card, as lines of Markdown: over all films, and in subgroups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.operating_points import deciding_point, thresholds
from lungopacity.evaluation.table import (
    FEWEST,
    PICKED_GAPS,
    Gap,
    flatters,
    uncompared_figures,
    with_interval,
)
from lungopacity.models import ModelSpec

_OF_DECISIONS = ("positive_predictive_value", "negative_predictive_value", "review_rate")


def results(
    spec: ModelSpec,
    metrics: Sequence[Metric],
    unreadable: int,
    rejected: Mapping[str, int],
    unknown_patients: int,
    intervals: str,
    picked_on: Mapping[str, int],
) -> Iterator[str]:
    """The lines about all films. The arguments are those of `model_card`."""
    overall = [item for item in metrics if item.group == "all"]
    yield f"{unreadable} labelled films could not be read and are in no metric [13]."
    if rejected:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(rejected.items()))
        yield f"{sum(rejected.values())} were read and rejected, and are in none either: {codes}."
    yield ""
    yield f"95 % intervals [29]: {intervals}." + of_unknown(unknown_patients)
    yield ""
    yield (
        "Accuracy, recall, specificity, precision and f1 are of the most probable class; decisions "
        "at an operating point are in the next table. Over all classes, roc auc is the mean, brier "
        "the sum (0 to 2), and the expected calibration error that of the predicted class; with "
        "few films, this error and its interval are too high. Log loss is in nats."
        + _prevalence(overall, spec.positive_class)
    )
    yield ""
    yield "| metric [28, 36] | of | value | 95 % interval | films |"
    yield "|---|---|---:|---|---:|"
    shown = (
        "accuracy",
        "balanced_accuracy",
        "roc_auc",
        "average_precision",
        "recall",
        "specificity",
        "precision",
        "f1",
        "brier_binary",
        "brier",
        "brier_before_temperature",
        "log_loss",
        "expected_calibration_error",
        "expected_calibration_error_by_chance",
        "expected_calibration_error_before_temperature",
    )
    for name in shown:
        yield from (_row(item) for item in overall if item.metric == name)
    decided = [
        item
        for item in overall
        if item.metric.startswith("decision_") or item.metric in _OF_DECISIONS
    ]
    if decided:
        yield ""
        yield "| operating point | decision | value | 95 % interval | films |"
        yield "|---|---|---:|---|---:|"
        for item in decided:
            what = item.metric.removeprefix("decision_").replace("_", " ")
            yield line(str(item.class_name), what, _value(item), _interval(item), f"{item.n:,}")
        yield ""
        for name, point in spec.operating_points.items():
            among = f"; {flatters(picked_on[name])}" if name in picked_on else ""
            yield f"- {name}: {thresholds(point)}; {point.chosen_by}{among}"
    if spec.metrics:
        listed = ", ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in spec.metrics.items())
        yield ""
        yield f"On the validation split, on which it was selected and calibrated: {listed}."


def subgroups(spec: ModelSpec, metrics: Sequence[Metric], gaps: Sequence[Gap]) -> Iterator[str]:
    """The lines about subgroups."""
    named = {(item.group, item.metric, item.class_name): item for item in metrics}
    found = [
        item
        for (group, metric, class_name), item in named.items()
        if group != "all" and metric == "roc_auc" and class_name == spec.positive_class
    ]
    if not found:
        yield "Labels and headers hold nothing to form subgroups by."
        return
    point = deciding_point(spec.operating_points, spec.operating_point)
    listed: set[str] = set()
    for gap in gaps:
        if gap.figure in listed:
            continue
        listed.add(gap.figure)
        worst, best = (
            f"{item.group.partition('=')[2]} {with_interval(item)}, {item.n:,} films"
            for item in (gap.worst, gap.best)
        )
        yield (
            f"- The largest gap in {gap.figure} is by {gap.column}: {worst}; {best}; difference "
            f"{gap.size_words}."
        )
    if gaps:
        yield f"- {PICKED_GAPS[0].upper()}{PICKED_GAPS[1:]}."
    uncompared = uncompared_figures(metrics, gaps)
    if uncompared:
        yield (
            f"- Not compared, because fewer than two subgroups have {FEWEST} patients that count: "
            f"{'; '.join(uncompared)}."
        )
    yield ""
    yield line(
        "subgroup [30]",
        f"AUC for {spec.positive_class}",
        f"sensitivity at {point}",
        f"specificity at {point}",
        "films",
        "patients",
    )
    yield "|---|---|---|---|---:|---:|"
    for item in found:
        shares = [
            named.get((item.group, f"decision_{share}", point))
            for share in ("sensitivity", "specificity")
        ]
        cells = ["" if one is None else with_interval(one) for one in (item, *shares)]
        patients = "" if item.patients is None else f"{item.patients:,}"
        yield line(item.group, *cells, f"{item.n:,}", patients)


def _prevalence(overall: Sequence[Metric], positive: str) -> str:
    """A sentence about the share of positive films, on which several metrics depend."""
    for item in overall:
        if (item.metric, item.class_name) == ("support", positive):
            return (
                " Accuracy, precision, f1, average precision and predictive values hold for this "
                f"share of {positive}: {item.value:,.0f} of {item.n:,} films."
            )
    return ""


def of_unknown(patients: int) -> str:
    """A sentence about films whose patient is unknown; empty if there are none."""
    return f" {patients:,} films have no patient_id; each counts as a patient." if patients else ""


def _row(item: Metric) -> str:
    name, of = item.metric.replace("_", " "), item.class_name or "all"
    return line(name, of, _value(item), _interval(item), f"{item.n:,}")


def line(*cells: str) -> str:
    """A row of a table."""
    # Labels of public sets, such as `Effusion|Mass`, hold what separates cells.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(item: Metric) -> str:
    return "not defined" if item.value != item.value else f"{item.value:.4f}"


def _interval(item: Metric) -> str:
    if item.ci_low is None or item.ci_high is None:
        return ""
    return f"{item.ci_low:.4f} to {item.ci_high:.4f}"
