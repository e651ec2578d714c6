"""ROC and precision-recall curves, with bands over patients and the model's operating points.

Arguments `labels` and `probabilities` must pass `metrics.check_scores`, which raises `ValueError`.
`title` names the model and the images; `note` is appended to the notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from lungopacity.evaluation.bootstrap import (
    Band,
    Resampling,
    drawn_precision_recall,
    drawn_roc,
    percentile_interval,
)
from lungopacity.evaluation.canvas import (
    COLOURS,
    GREY,
    WIDTH_INCHES,
    describe,
    line,
    new_figure,
    short,
)
from lungopacity.evaluation.metrics import Floats, Integers, check_scores
from lungopacity.evaluation.operating_points import decision_shares
from lungopacity.models import OperatingPoint

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_EDGES = ("black", *COLOURS)
"""Edge colours of markers; after every eight points, the shapes repeat in the next colour."""
_BAND_ALPHA = 0.18
_BAND_TITLE = "Pointwise 95 % band over patients"
_SQUARE_INCHES = 6.9
_MARGIN_INCHES = 1.4
_LEGEND_LINE_INCHES = 0.225


def roc_figure(
    labels: Integers,
    probabilities: Floats,
    class_names: Sequence[str],
    title: str,
    note: str = "",
    *,
    resampling: Resampling,
    points: Mapping[str, Mapping[str, OperatingPoint]],
    views: Sequence[str | None] | None = None,
) -> Figure:
    """One curve per class against the rest, with its band, its AUC and the 95 % interval.

    resampling: the patients. points: for each class, its operating points by name; each is marked
    at its sensitivity and specificity on these images; one that decides by `views`, those of
    `decision_shares`, may lie beside the curve. A class of no image, or of every image, has
    no curve: the legend says that its AUC is undefined.
    """
    check_scores(labels, probabilities, class_names)
    figure = new_figure(title, note)
    axes, below = figure.subplots(2, 1)
    describe(
        axes,
        "ROC, each class against the rest",
        "False positive rate (1 - specificity)",
        "True positive rate (sensitivity)",
    )
    for index, name in enumerate(class_names):
        positive, scores = labels == index, probabilities[:, index]
        if not positive.any() or positive.all():
            axes.plot([], [], linestyle="none", label=f"{short(name)}: AUC undefined")
            continue
        band, aucs_R = drawn_roc(positive, scores, resampling)
        _draw_band(axes, band, index)
        auc = _with_interval(roc_auc_score(positive, scores), aucs_R)
        label = f"{_counted(name, positive)}: AUC {auc}"
        false_positives, true_positives, _ = roc_curve(positive, scores)
        axes.plot(false_positives, true_positives, label=label, **line(index))
    for index, name in enumerate(class_names):
        positive = labels == index
        if positive.any() and not positive.all():
            its_points = points.get(name, {})
            _mark_points(axes, name, its_points, positive, probabilities[:, index], views)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="Chance", zorder=1)
    _square(axes)
    _legend_below(figure, axes, below)
    return figure


def precision_recall_figure(
    labels: Integers,
    probabilities: Floats,
    class_names: Sequence[str],
    title: str,
    note: str = "",
    *,
    resampling: Resampling,
) -> Figure:
    """One curve per class against the rest, with its average precision and its share of the images.

    resampling: as for `roc_figure`. A class of no image has no curve: the legend says that its
    average precision is undefined.
    """
    check_scores(labels, probabilities, class_names)
    figure = new_figure(title, note)
    axes, below = figure.subplots(2, 1)
    describe(
        axes,
        "Precision and recall, each class against the rest",
        "Recall (sensitivity)",
        "Precision (positive predictive value)",
    )
    for index, name in enumerate(class_names):
        positive, scores = labels == index, probabilities[:, index]
        if not positive.any():
            label = f"{short(name)}: average precision undefined"
            axes.plot([], [], linestyle="none", label=label)
            continue
        share = float(positive.mean())
        precision, recall, _ = precision_recall_curve(positive, scores)
        band, averages_R = drawn_precision_recall(positive, scores, resampling)
        _draw_band(axes, band, index)
        average = _with_interval(average_precision_score(positive, scores), averages_R)
        label = f"{_counted(name, positive)}: average precision {average}"
        style = line(index)
        # scikit-learn returns recall in descending order. Each precision is held until the next
        # recall, as in the sum of average precision; straight lines are too optimistic (Davis &
        # Goadrich 2006).
        axes.plot(recall, precision, drawstyle="steps-post", label=label, **style)
        axes.axhline(
            share,
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=1,
            alpha=0.6,
            label=f"Chance: {share:.3f}",
        )
    _square(axes)
    _legend_below(figure, axes, below)
    return figure


def _square(axes: Axes) -> None:
    """Show the unit square, with a margin so that a curve along its edge is fully visible."""
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_box_aspect(1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes, below: Axes) -> None:
    """Draw the legend of `axes` below them: inside, it would hide the curve of a poor model."""
    axes.fill_between([], [], color=GREY, alpha=_BAND_ALPHA, linewidth=0, label=_BAND_TITLE)
    handles, labels = axes.get_legend_handles_labels()
    below.axis("off")
    below.legend(handles, labels, loc="upper left", fontsize=10, frameon=False, borderaxespad=0)
    height_inches = _LEGEND_LINE_INCHES * len(labels)
    grid = below.get_gridspec()
    if grid is not None:
        grid.set_height_ratios([_SQUARE_INCHES, height_inches])
    figure.set_size_inches(WIDTH_INCHES, _SQUARE_INCHES + height_inches + _MARGIN_INCHES)


def _draw_band(axes: Axes, band: Band | None, index: int) -> None:
    if band is not None:
        colour = line(index)["color"]
        axes.fill_between(
            band.grid_G, band.low_G, band.high_G, color=colour, alpha=_BAND_ALPHA, linewidth=0
        )


def _mark_points(
    axes: Axes,
    class_name: str,
    points: Mapping[str, OperatingPoint],
    positive: npt.NDArray[np.bool_],
    scores: Floats,
    views: Sequence[str | None] | None,
) -> None:
    """Mark each point with its own shape and colour. Markers are hollow, so that two at the same
    place are both visible."""
    of = short(class_name)
    for place, (name, point) in enumerate(points.items()):
        shares = decision_shares(scores, positive, point, views)
        sensitivity, specificity = (
            float(part_N.sum() / of_N.sum())
            for part_N, of_N in (shares["decision_sensitivity"], shares["decision_specificity"])
        )
        turn, shape = divmod(place, len(_MARKERS))
        axes.plot(
            1 - specificity,
            sensitivity,
            marker=_MARKERS[shape],
            markersize=8 + 2 * (place % 3),
            markerfacecolor="none",
            markeredgecolor=_EDGES[turn % len(_EDGES)],
            markeredgewidth=1.4,
            linestyle="none",
            zorder=4,
            label=f"{short(name)}: sensitivity {sensitivity:.3f} for {of}, "
            f"specificity {specificity:.3f}",
        )


def _with_interval(value: float, values_R: npt.NDArray[np.float64]) -> str:
    """The figure and the interval of its replicates, in words."""
    low, high = percentile_interval(values_R)
    interval = "" if low is None else f" (95 % interval {low:.3f}–{high:.3f})"
    return f"{value:.3f}{interval}"


def _counted(name: str, positive: npt.NDArray[np.bool_]) -> str:
    return f"{short(name)} (n = {int(positive.sum()):,})"
