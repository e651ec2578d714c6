"""What the curves themselves show; `test_paper_and_plots` has what every figure carries."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import average_precision_score

from lungopacity.evaluation import plots

NAMES = ("Normal", "Lung_Opacity")
LABELS = np.array([1, 0, 1, 0, 0, 1, 0, 1])
POSITIVE = np.array([0.9, 0.8, 0.7, 0.6, 0.55, 0.4, 0.3, 0.2])
SCORES = np.stack([1 - POSITIVE, POSITIVE], axis=1)
CURVES = (plots.roc_figure, plots.precision_recall_figure, plots.reliability_figure)


def drawn(figure):
    """Laid out, as it is only when it is drawn."""
    FigureCanvasAgg(figure).draw()
    return figure


def test_the_area_under_the_drawn_precision_steps_is_the_average_precision():
    axes = plots.precision_recall_figure(LABELS, SCORES, NAMES, "model").axes[0]
    line = next(line for line in axes.lines if str(line.get_label()).startswith("Lung_Opacity"))
    assert line.get_drawstyle() == "steps-post"
    recall, precision = line.get_data()
    # Steps-post hold each point's level until the next point.
    area = np.sum(precision[:-1] * -np.diff(recall))
    assert area == pytest.approx(average_precision_score(LABELS, POSITIVE))


@pytest.mark.parametrize("draw", CURVES[:2])
def test_the_legend_lies_outside_the_curves(draw):
    axes, below = drawn(draw(LABELS, SCORES, NAMES, "model")).axes
    legend = below.get_legend().get_window_extent()
    assert not legend.overlaps(axes.get_window_extent())
    assert not legend.overlaps(axes.xaxis.label.get_window_extent())


@pytest.mark.parametrize("draw", CURVES)
def test_text_stays_within_the_figure(draw):
    title = "classical_cnn-3f9ac01b22de · validation · n = 1830 · " * 2
    figure = drawn(draw(LABELS, SCORES, ("Normal", "No Lung Opacity / Not Normal"), title))
    width, height = figure.canvas.get_width_height()
    box = figure.get_tightbbox()
    assert 0 <= box.x0 <= box.x1 <= width / figure.dpi
    assert 0 <= box.y0 <= box.y1 <= height / figure.dpi


def test_a_class_that_no_image_has_is_named_without_a_curve():
    labels = np.zeros(8, int)
    for draw, undefined in (
        (plots.roc_figure, {"Normal: AUC undefined", "Lung_Opacity: AUC undefined"}),
        (plots.precision_recall_figure, {"Lung_Opacity: average precision undefined"}),
    ):
        lines = draw(labels, SCORES, NAMES, "model").axes[0].lines
        empty = {line.get_label() for line in lines if len(line.get_xdata()) == 0}
        assert empty == undefined


@pytest.mark.parametrize("draw", CURVES)
def test_no_image_at_all_still_gives_a_figure(draw):
    figure = draw(np.zeros(0, int), np.zeros((0, 2)), NAMES, "model")
    assert plots.figure_png(figure).startswith(b"\x89PNG")


def test_dollar_signs_in_a_class_name_are_no_mathematics():
    names = ("$\\frac$", "b")
    assert plots.figure_png(plots.roc_figure(LABELS, SCORES, names, "$\\frac$"))
    assert plots.figure_png(plots.confusion_matrix_figure(np.eye(2, dtype=int), names, "m"))


def test_epochs_are_whole_numbers_even_after_one():
    history = pd.DataFrame(
        {
            "epoch": [1],
            "train_loss": [0.7],
            "validation_loss": [0.6],
            "train_accuracy": [0.6],
            "validation_accuracy": [0.7],
        }
    )
    axes = drawn(plots.history_figure(history, "model")).axes[1]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="shape"):
        plots.confusion_matrix_figure(np.zeros((2, 3), int), NAMES, "model")
    with pytest.raises(ValueError, match="lacks the columns"):
        plots.history_figure(pd.DataFrame({"epoch": [1]}), "model")
    for draw in CURVES:
        with pytest.raises(ValueError, match="sum to 1"):
            draw(LABELS, SCORES * 0.5, NAMES, "model")


@pytest.mark.parametrize("draw", CURVES)
def test_an_svg_holds_its_words_as_text_and_is_the_same_each_time(draw):
    first, second = (
        plots.figure_svg(draw(LABELS, SCORES, NAMES, "model", note="synthetic")) for _ in range(2)
    )
    assert first == second
    text = first.decode()
    assert text.lstrip().startswith("<?xml")
    assert ">model<" in text
    assert "Research use only" in text
