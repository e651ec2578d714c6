"""Figures of an evaluation and of a training. Each carries the project's notice at its foot.

No pyplot: figures are plain objects, so that nothing is shared between threads or left open.
Arguments `labels` and `probabilities` are as `metrics.check_scores` takes them, which raises
`ValueError`; `title` names the model and the images, and `note` is appended to the notice.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import precision_recall_curve, roc_curve

from lungopacity.errors import NOTICE
from lungopacity.evaluation.bootstrap import (
    Band,
    Resampling,
    percentile_interval,
    precision_recall_band,
    roc_band,
    weighted_auc,
    weighted_average_precision,
)
from lungopacity.evaluation.metrics import (
    CALIBRATION_BINS,
    Floats,
    Integers,
    average_precision,
    calibration_bins,
    check_scores,
    roc_auc,
    wilson_interval,
)
from lungopacity.models import OperatingPoint

_DPI = 100
_WIDTH_INCHES = 8.0

# Of the palette of Okabe & Ito 2008 (Color Universal Design), the colours that stand out on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_GREY = "#595959"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BAND_ALPHA = 0.18
_BAND_TITLE = "Pointwise 95 % band over patients"
_SQUARE_INCHES = 6.9
_MARGIN_INCHES = 1.4
_LEGEND_LINE_INCHES = 0.225

_HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "validation_loss",
    "train_accuracy",
    "validation_accuracy",
)


def confusion_matrix_figure(
    matrix: Integers, class_names: Sequence[str], title: str, note: str = ""
) -> Figure:
    """Counts, and shares of the true class, in a grid of true (rows) by predicted class.

    matrix: counts, int (K, K), as `metrics.confusion_matrix` gives it; else `ValueError`.
    """
    classes = len(class_names)
    if matrix.shape != (classes, classes):
        raise ValueError(f"the matrix has the shape {matrix.shape}, not ({classes}, {classes})")
    figure = _figure(title, note, height_inches=7.0)
    axes = figure.add_subplot()
    _describe(axes, "Images, and share of the true class", "Predicted class", "True class")
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        part = f"{share[row, column]:.1%}" if totals[row, 0] else "no image"
        axes.text(
            column,
            row,
            f"{count:,}\n{part}",
            ha="center",
            va="center",
            fontsize=max(8, 24 - 3 * classes),
            color="white" if share[row, column] > 0.5 else "black",
        )
    names = [_plain(textwrap.fill(name, 18)) for name in class_names]
    axes.set_xticks(range(classes), names, rotation=0 if classes <= 4 else 60)
    axes.set_yticks(range(classes), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def roc_figure(
    labels: Integers,
    probabilities: Floats,
    class_names: Sequence[str],
    title: str,
    note: str = "",
    *,
    resampling: Resampling | None = None,
    points: Mapping[str, Mapping[str, OperatingPoint]] | None = None,
) -> Figure:
    """One curve a class against the rest, with its AUC and 95 % interval.

    resampling: the patients; with them the curves have bands, and intervals are the bootstrap's;
    without, DeLong's. points: of a class, its operating points by name, marked where they lie on
    these images. A class that no image or every image has is named in the legend as undefined,
    without a curve.
    """
    check_scores(labels, probabilities, class_names)
    figure = _figure(title, note)
    axes, below = figure.subplots(2, 1)
    _describe(
        axes,
        "ROC, each class against the rest",
        "False positive rate (1 - specificity)",
        "True positive rate (sensitivity)",
    )
    for index, name in enumerate(class_names):
        positive, scores = labels == index, probabilities[:, index]
        auc = roc_auc(positive, scores)
        if math.isnan(auc.value):
            axes.plot([], [], linestyle="none", label=f"{_short(name)}: AUC undefined")
            continue
        bounds = (auc.ci_low, auc.ci_high)
        if resampling is not None:
            bounds = _bounds(weighted_auc, positive, scores, resampling)
            _draw_band(axes, roc_band(positive, scores, resampling), index)
        label = f"{_counted(name, positive)}: AUC {auc.value:.3f}{_interval(bounds)}"
        false_positives, true_positives, _ = roc_curve(positive, scores)
        axes.plot(false_positives, true_positives, label=label, **_line(index))
    for index, name in enumerate(class_names):
        positive = labels == index
        if positive.any() and not positive.all():
            _mark_points(axes, (points or {}).get(name, {}), positive, probabilities[:, index])
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, label="Chance", zorder=1)
    _square(axes)
    _legend_below(figure, axes, below, banded=resampling is not None)
    return figure


def precision_recall_figure(
    labels: Integers,
    probabilities: Floats,
    class_names: Sequence[str],
    title: str,
    note: str = "",
    *,
    resampling: Resampling | None = None,
) -> Figure:
    """One curve a class against the rest, with its average precision and its share of the images.

    resampling: as for `roc_figure`. A class that no image has is named in the legend as undefined,
    without a curve.
    """
    check_scores(labels, probabilities, class_names)
    figure = _figure(title, note)
    axes, below = figure.subplots(2, 1)
    _describe(
        axes,
        "Precision and recall, each class against the rest",
        "Recall (sensitivity)",
        "Precision (positive predictive value)",
    )
    for index, name in enumerate(class_names):
        positive, scores = labels == index, probabilities[:, index]
        value = average_precision(positive, scores)
        if math.isnan(value):
            label = f"{_short(name)}: average precision undefined"
            axes.plot([], [], linestyle="none", label=label)
            continue
        share = float(positive.mean())
        precision, recall, _ = precision_recall_curve(positive, scores)
        label = f"{_counted(name, positive)}: average precision {value:.3f}"
        if resampling is not None:
            bounds = _bounds(weighted_average_precision, positive, scores, resampling)
            label += _interval(bounds)
            _draw_band(axes, precision_recall_band(positive, scores, resampling), index)
        line = _line(index)
        # scikit-learn gives recall from 1 down. Each precision is held down to the next recall, as
        # in average precision's sum; straight lines promise too much (Davis & Goadrich 2006).
        axes.plot(recall, precision, drawstyle="steps-post", label=label, **line)
        axes.axhline(
            share,
            color=line["color"],
            linestyle=line["linestyle"],
            linewidth=1,
            alpha=0.6,
            label=f"Chance: {share:.3f}",
        )
    _square(axes)
    _legend_below(figure, axes, below, banded=resampling is not None)
    return figure


def reliability_figure(
    labels: Integers,
    probabilities: Floats,
    class_names: Sequence[str],
    title: str,
    note: str = "",
) -> Figure:
    """Accuracy against confidence in the predicted class, above the number of images in each bin.

    The bins and the expected calibration error are those of `metrics.calibration_bins`; bars are
    Wilson's 95 % intervals.
    """
    check_scores(labels, probabilities, class_names)
    bins = calibration_bins(labels, probabilities)
    filled = np.flatnonzero(bins.count_B)
    count, correct = bins.count_B[filled], bins.correct_B[filled]
    accuracy = correct / count
    limits = np.array(
        [wilson_interval(int(hits), int(n)) for hits, n in zip(correct, count, strict=True)]
    ).reshape(-1, 2)
    figure = _figure(title, note)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _describe(above, "Reliability of the predicted class's probability", "", "Accuracy")
    _describe(below, "", "Confidence: probability of the predicted class", "Images")
    error = bins.expected_calibration_error
    above.plot([0, 1], [0, 1], color=_GREY, linewidth=1, label="Perfect calibration")
    above.errorbar(
        bins.confidence_B[filled],
        accuracy,
        # An accuracy of 0 or 1 is its own limit but for rounding, and matplotlib refuses -1e-17.
        yerr=np.abs(limits.T - accuracy),
        marker="o",
        capsize=3,
        label=f"Model (expected calibration error {_number(error)})",
        **_line(0),
    )
    above.set_ylim(-0.02, 1.02)
    above.legend(loc="best", fontsize=10)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    below.bar(edges[:-1], bins.count_B, width=1 / CALIBRATION_BINS, align="edge", color=_COLOURS[0])
    for index, n in zip(filled, count, strict=True):
        centre = (index + 0.5) / CALIBRATION_BINS
        below.text(centre, n, f"{n:,}", ha="center", va="bottom", fontsize=8)
    below.margins(y=0.25)
    below.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    # No predicted class of K is less probable than 1 / K.
    below.set_xlim(math.floor(CALIBRATION_BINS / len(class_names)) / CALIBRATION_BINS - 0.01, 1.01)
    figure.align_ylabels()
    return figure


def history_figure(history: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Loss and accuracy by epoch, training and validation, with the epoch whose weights were kept.

    history: columns epoch, train_loss, validation_loss (nats), train_accuracy, validation_accuracy
    (0 … 1), a row an epoch. Raises `ValueError` where one is missing or there is no row.
    """
    missing = [column for column in _HISTORY_COLUMNS if column not in history.columns]
    if missing or history.empty:
        raise ValueError(f"the history has {len(history)} rows and lacks the columns {missing}")
    figure = _figure(title, note)
    panels = figure.subplots(2, 1, sharex=True)
    best = int(history["validation_loss"].to_numpy().argmin())
    best_epoch = int(history["epoch"].iloc[best])
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for index, part in enumerate(("train", "validation")):
            axes.plot(
                history["epoch"].to_numpy(),
                history[f"{part}_{quantity}"].to_numpy(),
                marker="o",
                markersize=4,
                label="Training" if part == "train" else "Validation",
                **_line(index),
            )
        axes.axvline(best_epoch, color=_GREY, linewidth=1, linestyle=":")
        kept = history[f"validation_{quantity}"].iloc[best]
        shown = f"{kept:.1%}" if quantity == "accuracy" else f"{kept:.4f}"
        axes.plot(
            best_epoch,
            kept,
            marker="*",
            markersize=16,
            color=_COLOURS[1],
            markeredgecolor="black",
            linestyle="none",
            label=f"Best epoch {best_epoch}: {shown}",
            zorder=3,
        )
        axes.legend(loc="best", fontsize=10)
    _describe(panels[0], "Training history; best is the lowest validation loss", "", "Loss (nats)")
    _describe(panels[1], "", "Epoch", "Accuracy")
    panels[1].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG file, 800 pixels wide."""
    sink = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(sink, format="png", dpi=_DPI)
    return sink.getvalue()


def figure_svg(figure: Figure) -> bytes:
    """The figure as an SVG file whose letters stay text. The same figure gives the same bytes."""
    sink = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lungopacity"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def _figure(title: str, note: str, height_inches: float = 7.5) -> Figure:
    """An empty figure with its title and the notice; constrained layout keeps both free."""
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DPI)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    figure.suptitle(_plain(textwrap.fill(title, 70)), fontsize=13, fontweight="bold")
    foot = f"{NOTICE} · {note}" if note else NOTICE
    figure.supxlabel(_plain(textwrap.fill(foot, 110)), x=0.01, ha="left", fontsize=9, color=_GREY)
    return figure


def _describe(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)


def _square(axes: Axes) -> None:
    """The unit square, with a rim so that a curve along its edge is seen whole."""
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_box_aspect(1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes, below: Axes, *, banded: bool) -> None:
    """The legend of `axes`, below them: inside it would hide the curve of a poor model."""
    if banded:
        axes.fill_between([], [], color=_GREY, alpha=_BAND_ALPHA, linewidth=0, label=_BAND_TITLE)
    handles, labels = axes.get_legend_handles_labels()
    below.axis("off")
    below.legend(handles, labels, loc="upper left", fontsize=10, frameon=False, borderaxespad=0)
    height_inches = _LEGEND_LINE_INCHES * len(labels)
    grid = below.get_gridspec()
    if grid is not None:
        grid.set_height_ratios([_SQUARE_INCHES, height_inches])
    figure.set_size_inches(_WIDTH_INCHES, _SQUARE_INCHES + height_inches + _MARGIN_INCHES)


def _draw_band(axes: Axes, band: Band | None, index: int) -> None:
    if band is not None:
        colour = _line(index)["color"]
        axes.fill_between(
            band.grid_G, band.low_G, band.high_G, color=colour, alpha=_BAND_ALPHA, linewidth=0
        )


def _mark_points(
    axes: Axes,
    points: Mapping[str, OperatingPoint],
    positive: npt.NDArray[np.bool_],
    scores: Floats,
) -> None:
    """Each point as a shape of its own, hollow, so that two at one place are both seen."""
    for place, (name, point) in enumerate(points.items()):
        called = scores >= point.threshold
        sensitivity = float(called[positive].mean())
        specificity = float((~called[~positive]).mean())
        axes.plot(
            1 - specificity,
            sensitivity,
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=8 + 2 * (place % 3),
            markerfacecolor="none",
            markeredgecolor="black",
            markeredgewidth=1.4,
            linestyle="none",
            zorder=4,
            label=f"{_short(name)}: sensitivity {sensitivity:.3f}, specificity {specificity:.3f}",
        )


def _bounds(
    figure_of: Callable[..., npt.NDArray[np.float64]],
    positive: npt.NDArray[np.bool_],
    scores: Floats,
    resampling: Resampling,
) -> tuple[float | None, float | None]:
    drawn = [figure_of(positive, scores, weights_RN) for weights_RN in resampling.weights()]
    return percentile_interval(np.concatenate(drawn))


def _interval(bounds: tuple[float | None, float | None]) -> str:
    low, high = bounds
    return "" if low is None or high is None else f" (95 % interval {low:.3f}–{high:.3f})"


def _counted(name: str, positive: npt.NDArray[np.bool_]) -> str:
    return f"{_short(name)} (n = {int(positive.sum()):,})"


def _line(index: int) -> dict[str, Any]:
    """Colour and dash of the curve of class `index`: neither alone has to tell two apart."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 2,
    }


def _short(name: str) -> str:
    return _plain(textwrap.shorten(name, 28, placeholder="…") if " " in name else name[:28])


def _plain(text: str) -> str:
    # matplotlib takes what stands between two dollar signs for mathematics.
    return text.replace("$", r"\$")


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"
