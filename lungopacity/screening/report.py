"""Summaries of runs, nights and clean-ups for the terminal."""

from __future__ import annotations

from lungopacity.errors import NOTICE
from lungopacity.evaluation.table import metric_value
from lungopacity.screening.clean import Swept
from lungopacity.screening.finish import ScreeningResult
from lungopacity.screening.nightly import Night
from lungopacity.words import counted

_DRIFT = {
    "stable": "as in the baseline",
    "drifted": "DRIFTED from the baseline",
    "too_few": "too few images to say",
}


def night_summary(night: Night) -> str:
    """What a night did, or with `--dry-run` would do."""
    if night.planned is None:
        return "\n".join(summary(run) for run in night.runs)
    lines = [f"a night would first finish the earlier run {name}" for name in night.unfinished]
    # "At most", because what those runs publish would not be screened again.
    most = "then screen at most" if night.unfinished else "a night would screen"
    planned = counted(night.planned, "object")
    lines.append(f"{most} {planned}; nothing was written (--dry-run)")
    return "\n".join([*lines, NOTICE])


def clean_summary(swept: Swept) -> str:
    """What was removed, by kind."""
    done = "would be removed (--dry-run)" if swept.dry_run else "removed"
    if not swept.files:
        return f"nothing to remove in {swept.results}"
    lines = [f"{sum(swept.files.values())} files, {swept.size_bytes / 1e6:.1f} MB, {done}"]
    return "\n".join([*lines, *(f"  {kind}: {count}" for kind, count in swept.files.items())])


def _point(result: ScreeningResult) -> str:
    name = result.operating_point
    return "the model's operating point" if name is None else f"operating point {name}"


def summary(result: ScreeningResult) -> str:
    """A few lines: where the results are, what was read, what was found, how fast."""
    lines = [
        f"run {result.run_id} published in {result.results}"
        + (" (synthetic)" if result.synthetic else ""),
        f"  images    {result.images}: {result.ok} scored, {result.rejected} rejected, "
        f"{result.failed} could not be read",
        f"  positive  {result.positive} at {_point(result)}"
        + (f", {result.explained} with a picture" if result.explained else ""),
        *([f"  review    {result.review}, between its two thresholds"] if result.review else []),
        f"  time      {result.seconds:.1f} s"
        + ("" if result.images_per_s is None else f", {result.images_per_s:.1f} images/s"),
    ]
    if result.failed_again:
        lines.insert(
            2, f"  again     {result.failed_again} of these could not be read before, either"
        )
    lines += [
        f"  {metric.class_name}: {metric.value:.0f}"
        for metric in result.metrics
        if metric.metric == "error_code"
    ]
    flagged = [
        f"{metric.value:.0f} {metric.class_name}"
        for metric in result.metrics
        if metric.metric == "quality_flag" and metric.value
    ]
    if flagged:
        lines.append(f"  flagged   {', '.join(flagged)}")
    if result.nothing_scored:
        lines.append("  NOTHING   was scored: every image was rejected, or could not be read")
    if result.broken:
        lines.append(
            f"  BROKEN    more than {result.max_failed_fraction:.1%} of the images could not be "
            "read (--max-failed-fraction)"
        )
    lines += [
        f"  drift     {shift.name}: {_DRIFT[shift.verdict]} ("
        # As in status.json: for too few images the PSI is chance, or cannot be computed.
        + ("" if shift.verdict == "too_few" else f"PSI {shift.psi:.3f}, ")
        + f"{shift.n} images)"
        for shift in result.drift
    ]
    if result.labelled is not None:
        without_score = metric_value(result.metrics, "films_without_score")
        of_several = metric_value(result.metrics, "films_of_several_images")
        lines.append(
            f"  labels    match {result.labelled} of {result.images} images, "
            f"{result.of_classes} with one of the model's classes"
            + (f"; {without_score:.0f} of these have no score" if without_score else "")
            + (
                f"; {of_several:.0f} in files of several images, any of which the label may mean, "
                "are left out"
                if of_several
                else ""
            )
            + (
                f"; {result.known_to_model} that it was trained or selected on are left out"
                if result.known_to_model
                else ""
            )
            + (
                f"; labels that match none: {result.unmatched_labels}"
                if result.unmatched_labels
                else ""
            )
        )
    if result.picked_on:
        lines.append(
            f"  FLATTERED {_point(result)} was picked on {result.picked_on} of these films: judge "
            "its decisions on other films"
        )
    lines += [
        f"  accuracy  {metric.value:.4f} against the labels of {counted(metric.n, 'film')}"
        for metric in result.metrics
        if (metric.group, metric.metric) == ("all", "accuracy")
    ]
    return "\n".join([*lines, NOTICE])
