"""Figures of an evaluation and of a training; ROC and precision-recall curves are in `curves`.

Arguments `labels` and `probabilities` must pass `metrics.check_scores`, which raises `ValueError`.
`title` names the model and the images; `note` is appended to the notice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.canvas import (
    COLOURS,
    GREY,
    describe,
    line,
    new_figure,
    short,
    wrapped,
)
from lungopacity.evaluation.measure import ratio_metrics
from lungopacity.evaluation.metrics import (
    CALIBRATION_BINS,
    CalibrationBins,
    Floats,
    Integers,
    Metric,
    binned,
    calibration_bins,
    check_scores,
)

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
    """Counts, and shares of the true class, in a grid of true classes (rows) by predicted classes.

    matrix: int (K, K) counts, as `metrics.confusion_matrix` returns them; raises `ValueError` for
    another shape.
    """
    classes = len(class_names)
    if matrix.shape != (classes, classes):
        raise ValueError(f"the matrix has the shape {matrix.shape}, not ({classes}, {classes})")
    figure = new_figure(title, note, height_inches=7.0)
    axes = figure.add_subplot()
    describe(
        axes,
        "Images, and share of the true class",
        "Predicted class, the most probable",
        "True class",
    )
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
    names = [wrapped(name) for name in class_names]
    axes.set_xticks(range(classes), names, rotation=0 if classes <= 4 else 60)
    axes.set_yticks(range(classes), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def reliability_figure(
    labels: Integers,
    probabilities: Floats,
    class_names: Sequence[str],
    title: str,
    note: str = "",
    *,
    positive: str,
    uncalibrated: Floats | None,
    resampling: Resampling,
) -> Figure:
    """Reliability diagrams: the share of images that are of a class, by its probability, above the
    number of images in each bin. One is for the predicted class, and one for the class `positive`.

    Bins and expected calibration error are those of `metrics.calibration_bins`. Error bars are 95 %
    intervals over the patients of each bin, as `measure` computes them. uncalibrated: the
    probabilities before calibration, if they are known; drawn as a second, lighter line.
    resampling: the patients.
    """
    check_scores(labels, probabilities, class_names)
    figure = new_figure(title, note)
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 1, 0.2))
    # The predicted one of K classes has a probability of at least 1 / K.
    least = math.floor(CALIBRATION_BINS / len(class_names)) / CALIBRATION_BINS
    for column, index in enumerate((None, list(class_names).index(positive))):
        above = figure.add_subplot(grid[0, column])
        below = figure.add_subplot(grid[1, column], sharex=above)
        bins = calibration_bins(labels, probabilities, index)
        before = None if uncalibrated is None else calibration_bins(labels, uncalibrated, index)
        bars = _shares(labels, probabilities, index, resampling)
        _draw_reliability(above, bins, bars, before)
        _draw_counts(below, bins)
        name = "the predicted class" if index is None else short(class_names[index])
        errors = f"Expected calibration error {_number(bins.expected_calibration_error)}"
        if before is not None:
            errors += f", before {_number(before.expected_calibration_error)}"
        describe(above, f"{name[0].upper()}{name[1:]}\n{errors}", "", "")
        above.title.set_fontsize(10)
        above.tick_params(labelbottom=False)
        describe(below, "", f"Probability of {name}", "" if column else "Images")
        below.set_xlim((least if index is None else 0) - 0.01, 1.01)
        if not column:
            above.set_ylabel("Share of images that are of the class", fontsize=11)
            handles, words = above.get_legend_handles_labels()
    # Below the plots: no corner of them is sure to be free.
    legend = figure.add_subplot(grid[2, :])
    legend.axis("off")
    legend.legend(handles, words, loc="center", ncols=3, fontsize=9, frameon=False)
    figure.align_ylabels()
    return figure


def _draw_reliability(
    axes: Axes, bins: CalibrationBins, bars: Sequence[Metric], before: CalibrationBins | None
) -> None:
    """bars: the share and its interval in each bin that has images."""
    filled = np.flatnonzero(bins.count_B)
    share = bins.correct_B[filled] / bins.count_B[filled]
    limits = np.array([[item.ci_low, item.ci_high] for item in bars], float).reshape(-1, 2)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="Perfect calibration")
    axes.errorbar(
        bins.confidence_B[filled],
        share,
        # `abs`, because a bound that equals the share may be off by rounding, and matplotlib
        # refuses -1e-17.
        yerr=np.abs(limits.T - share),
        marker="o",
        capsize=3,
        label="Calibrated, with 95 % intervals over patients",
        zorder=3,
        **line(0),
    )
    if before is not None:
        filled = np.flatnonzero(before.count_B)
        axes.plot(
            before.confidence_B[filled],
            before.correct_B[filled] / before.count_B[filled],
            marker="s",
            markersize=4,
            color=COLOURS[5],
            linestyle="--",
            linewidth=1.2,
            label="Before calibration",
        )
    axes.set_ylim(-0.02, 1.02)


def _draw_counts(axes: Axes, bins: CalibrationBins) -> None:
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    axes.bar(edges[:-1], bins.count_B, width=1 / CALIBRATION_BINS, align="edge", color=COLOURS[0])
    for index in np.flatnonzero(bins.count_B):
        centre, n = (index + 0.5) / CALIBRATION_BINS, bins.count_B[index]
        axes.text(centre, n, f"{n:,}", ha="center", va="bottom", fontsize=7)
    axes.margins(y=0.25)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _shares(
    labels: Integers,
    probabilities: Floats,
    index: int | None,
    resampling: Resampling,
) -> list[Metric]:
    """For each bin that has images, the share that are of the class, with its interval."""
    _, is_true_N, bin_N = binned(labels, probabilities, index)
    bars = []
    for place in np.unique(bin_N):
        rows = np.flatnonzero(bin_N == place)
        hit_N = is_true_N[rows]
        of_patients = resampling.rows(rows)
        bars += ratio_metrics({("share", None): (hit_N, np.ones_like(hit_N))}, of_patients)
    return bars


def history_figure(history: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Training and validation loss and accuracy by epoch; the epoch whose weights were kept is
    marked.

    history: columns epoch, train_loss, validation_loss (nats), train_accuracy, validation_accuracy
    (0 … 1), one row per epoch. Raises `ValueError` if a column is missing or there are no rows.
    """
    missing = [column for column in _HISTORY_COLUMNS if column not in history.columns]
    if missing or history.empty:
        raise ValueError(f"the history has {len(history)} rows and lacks the columns {missing}")
    figure = new_figure(title, note)
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
                **line(index),
            )
        axes.axvline(best_epoch, color=GREY, linewidth=1, linestyle=":")
        kept = history[f"validation_{quantity}"].iloc[best]
        shown = f"{kept:.1%}" if quantity == "accuracy" else f"{kept:.4f}"
        axes.plot(
            best_epoch,
            kept,
            marker="*",
            markersize=16,
            color=COLOURS[1],
            markeredgecolor="black",
            linestyle="none",
            label=f"Best epoch {best_epoch}: {shown}",
            zorder=3,
        )
        axes.legend(loc="best", fontsize=10)
    describe(panels[0], "Training history; best is the lowest validation loss", "", "Loss (nats)")
    describe(panels[1], "", "Epoch", "Accuracy")
    panels[1].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"
