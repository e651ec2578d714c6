import io

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lungopacity.errors import NOTICE
from lungopacity.evaluation import canvas, curves, plots
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ScoredImages, measure
from lungopacity.evaluation.paper import format_table1, table1

RNG = np.random.default_rng(0)
NAMES = ("Normal", "Lung_Opacity")
LABELS = RNG.integers(0, 2, 200)
POSITIVE = np.clip(0.3 + 0.4 * LABELS + RNG.normal(0, 0.2, 200), 0.01, 0.99)
SCORES = np.stack([1 - POSITIVE, POSITIVE], axis=1)
PATIENTS = Resampling.of([None] * 200, 20)
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "train_loss": [0.7, 0.5, 0.4],
        "validation_loss": [0.6, 0.4, 0.5],
        "train_accuracy": [0.6, 0.8, 0.9],
        "validation_accuracy": [0.6, 0.9, 0.8],
    }
)
FIGURES = {
    "confusion": lambda note: plots.confusion_matrix_figure(
        np.array([[90, 10], [5, 95]]), NAMES, "model", note
    ),
    "roc": lambda note: curves.roc_figure(
        LABELS, SCORES, NAMES, "model", note, resampling=PATIENTS, points={}
    ),
    "precision and recall": lambda note: curves.precision_recall_figure(
        LABELS, SCORES, NAMES, "model", note, resampling=PATIENTS
    ),
    "reliability": lambda note: plots.reliability_figure(
        LABELS, SCORES, NAMES, "model", note,
        positive=NAMES[1], uncalibrated=None, resampling=PATIENTS,
    ),
    "history": lambda note: plots.history_figure(HISTORY, "model", note),
}  # fmt: skip


def texts(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_png_of_some_content_with_notice_and_note(name):
    figure = FIGURES[name]("synthetic")
    image = Image.open(io.BytesIO(canvas.figure_png(figure)))
    assert image.format == "PNG"
    assert image.width >= 600
    assert np.asarray(image.convert("L")).std() > 5
    assert NOTICE in texts(figure).replace("\n", " ")
    assert "synthetic" in texts(figure)
    for axes in figure.axes[:1]:
        assert axes.get_ylabel()


def test_the_confusion_matrix_shows_counts_and_shares():
    shown = texts(FIGURES["confusion"](""))
    for text in ("90\n90.0%", "5\n5.0%", "Predicted class", "True class", *NAMES):
        assert text in shown
    matrix = np.array([[9, 1, 0], [5, 15, 20], [0, 0, 0]])
    axes = plots.confusion_matrix_figure(matrix, ("a", "b", "c"), "model").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "Predicted class, the most probable",
        "True class",
    )
    # Columns lie along x, and are what was predicted.
    at = {text.get_position(): text.get_text() for text in axes.texts}
    assert (at[1, 0], at[0, 1], at[2, 1]) == ("1\n10.0%", "5\n12.5%", "20\n50.0%")
    assert [at[column, 2] for column in range(3)] == ["0\nno image"] * 3


def test_the_history_marks_the_epoch_of_the_lowest_validation_loss():
    figure = FIGURES["history"]("")
    assert "Best epoch 2" in texts(figure)
    for axes, quantity in zip(figure.axes, ("loss", "accuracy"), strict=True):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert list(lines["Training"]) == HISTORY[f"train_{quantity}"].tolist()
        assert list(lines["Validation"]) == HISTORY[f"validation_{quantity}"].tolist()
        (star,) = [line for line in axes.lines if line.get_marker() == "*"]
        told = {"loss": (0.4, "0.4000"), "accuracy": (0.9, "90.0%")}[quantity]
        assert (list(star.get_ydata()), star.get_label()) == ([told[0]], f"Best epoch 2: {told[1]}")


def metrics_of(names):
    return measure(ScoredImages(LABELS, SCORES, names, names[1]), {}, Resampling.of([None] * 200))


def test_the_papers_own_figures_stand_beside_ours():
    metrics = metrics_of(NAMES)
    normal, opacity = table1(metrics, NAMES)
    assert (normal.paper.precision, normal.paper.recall, normal.paper.f1) == (0.92, 0.97, 0.95)
    assert (opacity.paper.precision, opacity.paper.recall, opacity.paper.f1) == (0.95, 0.85, 0.90)
    ours, less = opacity.measured, opacity.difference
    assert (less.precision, less.recall, less.f1) == pytest.approx(
        (ours.precision - 0.95, ours.recall - 0.85, ours.f1 - 0.90)
    )
    text = format_table1([normal, opacity])
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "0.9293" in text
    (recall,) = [m for m in metrics if (m.metric, m.class_name) == ("recall", "Lung_Opacity")]
    lines = text.splitlines()
    (place,) = [place for place, line in enumerate(lines) if line.startswith("Lung_Opacity")]
    below = lines[place + 1]
    assert below.startswith("  95 % interval")
    assert f"{recall.ci_low:.4f} to {recall.ci_high:.4f}" in below


def test_other_classes_have_no_paper_beside_them():
    names = ("Normal", "COVID")
    rows = table1(metrics_of(names), names)
    assert all(row.paper is None and row.difference is None for row in rows)
    text = format_table1(rows)
    assert "paper" not in text
    assert "diff" not in text
    assert text.splitlines()[1].split() == ["class", "model", "model", "model"]


def test_a_table_of_missing_metrics_is_refused():
    with pytest.raises(ValueError, match="no precision, recall, f1 of class 'Normal'"):
        table1([], NAMES)
