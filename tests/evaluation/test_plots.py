"""What the curves themselves show; `test_paper_and_plots` has what every figure carries."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.text import Text
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lungopacity.evaluation import canvas, curves, plots
from lungopacity.evaluation.bootstrap import Ranking, Resampling, percentile_interval
from lungopacity.evaluation.metrics import calibration_bins
from lungopacity.models import OperatingPoint

NAMES = ("Normal", "Lung_Opacity")
LABELS = np.array([1, 0, 1, 0, 0, 1, 0, 1])
POSITIVE = np.array([0.9, 0.8, 0.7, 0.6, 0.55, 0.4, 0.3, 0.2])
SCORES = np.stack([1 - POSITIVE, POSITIVE], axis=1)


def roc(labels, scores, names, title, note="", points=None, **more):
    more = {"resampling": Resampling.of([None] * len(labels), 20), **more}
    return curves.roc_figure(labels, scores, names, title, note, points=points or {}, **more)


def precision_recall(labels, *given, **more):
    more = {"resampling": Resampling.of([None] * len(labels), 20), **more}
    return curves.precision_recall_figure(labels, *given, **more)


def reliability(labels, scores, names, *given, **more):
    patients = Resampling.of([None] * len(labels), 20)
    more = {"positive": names[1], "uncalibrated": None, "resampling": patients, **more}
    return plots.reliability_figure(labels, scores, names, *given, **more)


CURVES = (roc, precision_recall, reliability)


def drawn(figure):
    """Laid out, as it is only when it is drawn."""
    FigureCanvasAgg(figure).draw()
    return figure


def test_the_area_under_the_drawn_precision_steps_is_the_average_precision():
    axes = precision_recall(LABELS, SCORES, NAMES, "model").axes[0]
    line = next(line for line in axes.lines if str(line.get_label()).startswith("Lung_Opacity"))
    assert line.get_drawstyle() == "steps-post"
    recall, precision = line.get_data()
    # Steps-post hold each point's level until the next point.
    area = np.sum(precision[:-1] * -np.diff(recall))
    assert area == pytest.approx(average_precision_score(LABELS, POSITIVE))


def test_the_drawn_roc_curve_is_that_of_scikit_learn_with_its_counts():
    labels = np.array([1, 0, 1, 0, 0, 0, 0, 1])
    axes = roc(labels, SCORES, NAMES, "model").axes[0]
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith("Lung_Opacity")]
    false_rates, true_rates, _ = roc_curve(labels, POSITIVE)
    np.testing.assert_allclose(line.get_data(), (false_rates, true_rates))
    auc = roc_auc_score(labels, POSITIVE)
    assert line.get_label().startswith(f"Lung_Opacity (n = 3): AUC {auc:.3f} (95 % interval ")


def test_precision_stands_beside_the_share_that_chance_alone_reaches():
    labels = np.array([1, 0, 1, 0, 0, 0, 0, 1])
    axes = precision_recall(labels, SCORES, NAMES, "model").axes[0]
    shares = {
        line.get_label(): line.get_ydata()[0]
        for line in axes.lines
        if "Chance" in str(line.get_label())
    }
    assert shares == {"Chance: 0.625": 0.625, "Chance: 0.375": 0.375}
    assert axes.get_xlabel() == "Recall (sensitivity)"
    assert axes.get_ylabel() == "Precision (positive predictive value)"


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
        (roc, {"Normal: AUC undefined", "Lung_Opacity: AUC undefined"}),
        (precision_recall, {"Lung_Opacity: average precision undefined"}),
    ):
        lines = draw(labels, SCORES, NAMES, "model").axes[0].lines
        empty = {line.get_label() for line in lines if len(line.get_xdata()) == 0}
        assert empty == undefined


MANY = np.random.default_rng(1)
MANY_LABELS = MANY.integers(0, 2, 120)
MANY_POSITIVE = np.clip(0.3 + 0.4 * MANY_LABELS + MANY.normal(0, 0.2, 120), 0.01, 0.99)
MANY_SCORES = np.stack([1 - MANY_POSITIVE, MANY_POSITIVE], axis=1)
PATIENTS = Resampling.of([str(row // 2) for row in range(120)], 200)
POINTS = {
    "youden": OperatingPoint(float(MANY_POSITIVE[MANY_LABELS == 1][0])),
    "band=0.99,0.95": OperatingPoint(0.7, review_from=0.2),
}


@pytest.mark.parametrize("draw", CURVES[:2])
def test_with_patients_each_curve_lies_in_its_band_and_the_legend_has_the_bootstraps_interval(draw):
    figure = drawn(draw(MANY_LABELS, MANY_SCORES, NAMES, "model", resampling=PATIENTS))
    axes, below = figure.axes
    bands = [item for item in axes.collections if isinstance(item, PolyCollection)]
    assert len([band for band in bands if band.get_paths()]) == 2
    words = [text.get_text() for text in below.get_legend().get_texts()]
    assert "Pointwise 95 % band over patients" in words
    (weights_RN,) = PATIENTS.weights()
    areas = Ranking(MANY_LABELS == 1, MANY_POSITIVE).areas(weights_RN)
    values_R = areas.auc_R if draw is roc else areas.average_precision_R
    low, high = percentile_interval(values_R)
    (told,) = [text for text in words if text.startswith("Lung_Opacity (n = ")]
    assert f"(95 % interval {low:.3f}–{high:.3f})" in told
    box = axes.get_window_extent()
    assert box.width == pytest.approx(box.height, abs=1)


@pytest.mark.parametrize("kind", [0, 1])
def test_of_films_of_one_kind_no_operating_point_is_marked(kind):
    points = {"Lung_Opacity": POINTS}
    axes = roc(np.full(8, kind), SCORES, NAMES, "model", points=points).axes[0]
    assert {line.get_marker() for line in axes.lines} == {"None"}
    (chance,) = [line for line in axes.lines if line.get_label() == "Chance"]
    assert (*chance.get_xdata(), *chance.get_ydata()) == (0, 1, 0, 1)
    assert axes.get_xlabel() == "False positive rate (1 - specificity)"
    assert axes.get_ylabel() == "True positive rate (sensitivity)"


def test_operating_points_are_marked_where_they_lie():
    figure = roc(MANY_LABELS, MANY_SCORES, NAMES, "model", points={"Lung_Opacity": POINTS})
    marks = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", None)]
    assert len({line.get_marker() for line in marks}) == 2
    # A film that stands on the threshold is called.
    (x,), (y,) = marks[0].get_data()
    assert y == pytest.approx(
        (POINTS["youden"].threshold <= MANY_POSITIVE)[MANY_LABELS == 1].mean()
    )
    called = MANY_POSITIVE >= 0.7
    (x,), (y,) = marks[1].get_data()
    assert x == pytest.approx(called[MANY_LABELS == 0].mean())
    assert y == pytest.approx(called[MANY_LABELS == 1].mean())
    # Of two classes both curves pass near it: whose sensitivity it is, the legend says.
    told = f"band=0.99,0.95: sensitivity {y:.3f} for Lung_Opacity, specificity {1 - x:.3f}"
    assert marks[1].get_label() == told


def test_the_words_of_many_points_do_not_overlap():
    points = {f"point {number}": OperatingPoint(number / 20) for number in range(20)}
    figure = drawn(
        roc(
            MANY_LABELS, MANY_SCORES, NAMES, "model · " * 20, "synthetic",
            resampling=PATIENTS, points={"Lung_Opacity": points},
        )
    )  # fmt: skip
    axes, below = figure.axes
    texts = [axes.title, axes.xaxis.label, *below.get_legend().get_texts(), figure._supxlabel]
    texts.append(figure._suptitle)
    boxes = [text.get_window_extent() for text in texts]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :]), texts[place]
    marks = [mark for mark in axes.lines if mark.get_marker() not in ("None", None)]
    assert len({(mark.get_marker(), mark.get_markeredgecolor()) for mark in marks}) == 20


def test_reliability_is_shown_before_and_after_calibration_with_bars_over_patients():
    raw = MANY_SCORES**2 / (MANY_SCORES**2).sum(axis=1, keepdims=True)
    # Films of one patient lie in one bin: they tell as little as one of them.
    rows = np.repeat(np.arange(120), 2)
    widths = []
    for patients in (rows, np.arange(240)):
        resampling = Resampling.of([str(patient) for patient in patients], 200)
        figure = reliability(
            MANY_LABELS[rows], MANY_SCORES[rows], NAMES, "model",
            uncalibrated=raw[rows], resampling=resampling,
        )  # fmt: skip
        (bars,) = figure.axes[0].collections
        widths.append(sum(np.ptp(bar[:, 1]) for bar in bars.get_segments()))
    assert 1.2 < widths[0] / widths[1] < 1.7
    before = calibration_bins(MANY_LABELS[rows], raw[rows])
    (line,) = [line for line in figure.axes[0].lines if "Before" in str(line.get_label())]
    told = f", before {before.expected_calibration_error:.3f}"
    assert figure.axes[0].get_title().endswith(told)
    confidence_B = before.confidence_B[before.count_B > 0]
    np.testing.assert_allclose(line.get_xdata(), confidence_B)


def test_reliability_is_shown_of_the_probability_that_decides_too():
    names = ("Normal", "No Lung Opacity / Not Normal")
    figure = drawn(reliability(MANY_LABELS, MANY_SCORES, names, "model", positive=names[1]))
    predicted, decides = (axes for axes in figure.axes if "error" in axes.get_title())
    bins = calibration_bins(MANY_LABELS, MANY_SCORES, 1)
    assert bins.count_B[:7].any()
    assert bins.count_B[8:].any()
    told = f"Expected calibration error {bins.expected_calibration_error:.3f}"
    assert decides.get_title() == f"{names[1]}\n{told}"
    assert predicted.get_title().startswith("The predicted class\n")
    # The bin that holds 0.5 is shown whole.
    assert predicted.get_xlim()[0] == pytest.approx(7 / 15 - 0.01)
    (container,) = decides.containers
    shares, _, _ = container.lines
    filled = bins.count_B > 0
    np.testing.assert_allclose(shares.get_xdata(), bins.confidence_B[filled])
    np.testing.assert_allclose(shares.get_ydata(), (bins.correct_B / bins.count_B)[filled])
    below = figure.axes[figure.axes.index(decides) + 1]
    assert [bar.get_height() for bar in below.patches] == bins.count_B.tolist()
    width, height = figure.canvas.get_width_height()
    box = figure.get_tightbbox()
    assert 0 <= box.x0 <= box.x1 <= width / figure.dpi
    assert 0 <= box.y0 <= box.y1 <= height / figure.dpi


def test_each_panel_of_reliability_has_its_own_line_of_before():
    labels, rng = np.arange(90) % 3, np.random.default_rng(2)
    raw, shares = (rng.dirichlet(np.ones(3), 90) for _ in range(2))
    figure = reliability(labels, shares, ("a", "b", "c"), "model", positive="b", uncalibrated=raw)
    panels = [axes for axes in figure.axes if "error" in axes.get_title()]
    for axes, index, leftmost in zip(panels, (None, 1), (1 / 3, 0), strict=True):
        (line,) = [line for line in axes.lines if "Before" in str(line.get_label())]
        bins = calibration_bins(labels, raw, index)
        np.testing.assert_allclose(line.get_xdata(), bins.confidence_B[bins.count_B > 0])
        # No predicted class of three is less probable than a third.
        assert axes.get_xlim()[0] == pytest.approx(leftmost - 0.01)


@pytest.mark.parametrize("draw", CURVES)
def test_no_image_at_all_still_gives_a_figure(draw):
    figure = draw(np.zeros(0, int), np.zeros((0, 2)), NAMES, "model")
    assert canvas.figure_png(figure).startswith(b"\x89PNG")


def test_dollar_signs_in_a_class_name_are_no_mathematics():
    names = ("$\\frac$", "b")
    assert canvas.figure_png(roc(LABELS, SCORES, names, "$\\frac$"))
    assert canvas.figure_png(plots.confusion_matrix_figure(np.eye(2, dtype=int), names, "m"))


def test_names_that_differ_at_their_end_stay_two_in_a_legend():
    names = [f"Bacterial_pneumonia_acquired_{where}" for where in ("at_home", "in_hospital")]
    figure = roc(LABELS, SCORES, names, "model")
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "Bacterial_pneum…ired_at_home (n" in words
    assert "Bacterial_pneum…_in_hospital (n" in words
    figure = plots.confusion_matrix_figure(np.eye(2, dtype=int), names, "model")
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks[0] == "Bacterial_\npneumonia_\nacquired_at_home"


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
        canvas.figure_svg(draw(LABELS, SCORES, NAMES, "model", note="synthetic")) for _ in range(2)
    )
    assert first == second
    text = first.decode()
    assert text.lstrip().startswith("<?xml")
    assert ">model<" in text
    assert "Research use only" in text
