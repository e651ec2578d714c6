"""Figures of an evaluation and of a training, but for its curves (`curves`).

Arguments `labels` and `probabilities` are as `metrics.check_scores` takes them, which raises
`ValueError`; `title` names the model and the images, and `note` is appended to the notice.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.canvas import COLOURS, GREY, describe, line, new_figure, plain
from lungopacity.evaluation.measure import ratio_metrics
from lungopacity.evaluation.metrics import (
    CALIBRATION_BINS,
    Floats,
    Integers,
    Metric,
    calibration_bins,
    check_scores,
    confidences,
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
    """Counts, and shares of the true class, in a grid of true (rows) by predicted class.

    matrix: counts, int (K, K), as `metrics.confusion_matrix` gives it; else `ValueError`.
    """
    classes = len(class_names)
    if matrix.shape != (classes, classes):
        raise ValueError(f"the matrix has the shape {matrix.shape}, not ({classes}, {classes})")
    figure = new_figure(title, note, height_inches=7.0)
    axes = figure.add_subplot()
    describe(axes, "Images, and share of the true class", "Predicted class", "True class")
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
    names = [plain(textwrap.fill(name, 18)) for name in class_names]
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
    uncalibrated: Floats | None = None,
    resampling: Resampling | None = None,
) -> Figure:
    """Accuracy against confidence in the predicted class, above the number of images in each bin.

    The bins and the expected calibration error are those of `metrics.calibration_bins`; bars are
    95 % intervals over the patients of each bin, as `measure` makes them. uncalibrated: the
    probabilities without the temperature, as a second, lighter line. resampling: the patients;
    None: each image is of another.
    """
    check_scores(labels, probabilities, class_names)
    bins = calibration_bins(labels, probabilities)
    filled = np.flatnonzero(bins.count_B)
    count, correct = bins.count_B[filled], bins.correct_B[filled]
    accuracy = correct / count
    bars = _accuracies(labels, probabilities, filled, resampling)
    limits = np.array([[item.ci_low, item.ci_high] for item in bars], float).reshape(-1, 2)
    figure = new_figure(title, note)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    describe(above, "Reliability of the predicted class's probability", "", "Accuracy")
    describe(below, "", "Confidence: probability of the predicted class", "Images")
    error = bins.expected_calibration_error
    above.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="Perfect calibration")
    above.errorbar(
        bins.confidence_B[filled],
        accuracy,
        # An accuracy of 0 or 1 is its own limit but for rounding, and matplotlib refuses -1e-17.
        yerr=np.abs(limits.T - accuracy),
        marker="o",
        capsize=3,
        label=f"Calibrated (expected calibration error {_number(error)}),\n"
        "with 95 % intervals over patients",
        zorder=3,
        **line(0),
    )
    if uncalibrated is not None:
        before = calibration_bins(labels, uncalibrated)
        filled_before = np.flatnonzero(before.count_B)
        error = before.expected_calibration_error
        above.plot(
            before.confidence_B[filled_before],
            before.correct_B[filled_before] / before.count_B[filled_before],
            marker="s",
            markersize=4,
            color=COLOURS[5],
            linestyle="--",
            linewidth=1.2,
            label=f"Before calibration (expected calibration error {_number(error)})",
        )
    above.set_ylim(-0.02, 1.02)
    above.legend(loc="best", fontsize=10)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    below.bar(edges[:-1], bins.count_B, width=1 / CALIBRATION_BINS, align="edge", color=COLOURS[0])
    for index, n in zip(filled, count, strict=True):
        centre = (index + 0.5) / CALIBRATION_BINS
        below.text(centre, n, f"{n:,}", ha="center", va="bottom", fontsize=8)
    below.margins(y=0.25)
    below.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    # No predicted class of K is less probable than 1 / K.
    below.set_xlim(math.floor(CALIBRATION_BINS / len(class_names)) / CALIBRATION_BINS - 0.01, 1.01)
    figure.align_ylabels()
    return figure


def _accuracies(
    labels: Integers,
    probabilities: Floats,
    filled: npt.NDArray[np.int64],
    resampling: Resampling | None,
) -> list[Metric]:
    """Of the images in each of the bins `filled`."""
    patients = Resampling.of([None] * len(labels)) if resampling is None else resampling
    _, correct_N, bin_N = confidences(labels, probabilities)
    bars = []
    for index in filled:
        rows = np.flatnonzero(bin_N == index)
        hit_N = correct_N[rows]
        bars += ratio_metrics(
            {("accuracy", None): (hit_N, np.ones_like(hit_N))}, patients.rows(rows)
        )
    return bars


def history_figure(history: pd.DataFrame, title: str, note: str = "") -> Figure:
    """Loss and accuracy by epoch, training and validation, with the epoch whose weights were kept.

    history: columns epoch, train_loss, validation_loss (nats), train_accuracy, validation_accuracy
    (0 … 1), a row an epoch. Raises `ValueError` where one is missing or there is no row.
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
