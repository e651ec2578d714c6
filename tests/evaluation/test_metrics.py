import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial
from sklearn import metrics as sklearn_metrics

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ScoredImages, measure
from lungopacity.evaluation.metrics import (
    Metric,
    age_band,
    calibration_bins,
    confusion_matrix,
    difference_interval,
    paired_difference_interval,
    wilson_interval,
)
from lungopacity.evaluation.table import largest_gaps, uncompared_groups
from lungopacity.models import OperatingPoint

NAMES = ("Normal", "Lung_Opacity")
NAMES_OF_THREE = (*NAMES, "Not_Normal")


def two_class(positive_N) -> np.ndarray:
    positive_N = np.asarray(positive_N, float)
    return np.stack([1 - positive_N, positive_N], axis=1)


def classification_metrics(
    labels_N, probabilities_NK, names, positive=None, groups=None, points=None
):
    """Of `measure`, with intervals of hardly any draws."""
    images = ScoredImages(
        labels_N, probabilities_NK, tuple(names), positive or names[0], points=points or {}
    )
    return measure(images, groups or {}, Resampling.of([None] * len(labels_N), 2))


def values(metrics, group="all") -> dict:
    return {(m.metric, m.class_name): m.value for m in metrics if m.group == group}


# Truth: 4 normal, 4 opacities. Predicted: one false positive, two missed.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
SCORES = two_class([0.1, 0.2, 0.3, 0.8, 0.9, 0.7, 0.4, 0.2])


def test_counts_and_proportions_by_hand():
    found = values(classification_metrics(LABELS, SCORES, NAMES, positive="Lung_Opacity"))
    assert found["accuracy", None] == 5 / 8
    assert found["balanced_accuracy", None] == (3 / 4 + 2 / 4) / 2
    assert found["precision", "Lung_Opacity"] == 2 / 3
    assert found["recall", "Lung_Opacity"] == 2 / 4
    assert found["f1", "Lung_Opacity"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["specificity", "Lung_Opacity"] == 3 / 4
    assert found["recall", "Normal"] == found["specificity", "Lung_Opacity"]
    assert found["support", "Normal"] == 4
    assert found["confusion", "true=Lung_Opacity,predicted=Normal"] == 2
    assert found["confusion", "true=Normal,predicted=Lung_Opacity"] == 1
    # 16 pairs: 0.9 and 0.7 beat 4 and 3, 0.4 beats 3, 0.2 beats 1 and ties with 1.
    assert found["roc_auc", "Lung_Opacity"] == (4 + 3 + 3 + 1.5) / 16
    assert found["roc_auc", "Normal"] == pytest.approx(found["roc_auc", "Lung_Opacity"])


def test_brier_scores_by_hand():
    found = values(classification_metrics(LABELS, SCORES, NAMES, positive="Lung_Opacity"))
    errors = np.array([0.1, 0.2, 0.3, 0.8, 0.1, 0.3, 0.6, 0.8]) ** 2
    assert found["brier_binary", "Lung_Opacity"] == pytest.approx(errors.mean())
    assert found["brier", None] == pytest.approx(2 * errors.mean())
    truth = np.array([0.9, 0.8, 0.7, 0.2, 0.9, 0.7, 0.4, 0.2])
    assert found["log_loss", None] == pytest.approx(-np.log(truth).mean())


@pytest.mark.parametrize("classes", [2, 3])
def test_figures_are_those_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels, names = rng.integers(0, classes, 90), [f"class {n}" for n in range(classes)]
    p_NK = np.round(rng.dirichlet(np.ones(classes), 90), 2) + 0.01  # with ties
    p_NK[0] = 1e-9  # so sure, and wrong
    p_NK[0, labels[0] - 1] = 1
    p_NK /= p_NK.sum(axis=1, keepdims=True)
    predicted = p_NK.argmax(axis=1)
    # Decisions are about a class that is not the last.
    decides, point = classes - 2, OperatingPoint(0.3)
    found = values(classification_metrics(labels, p_NK, names, names[decides], points={"x": point}))
    assert found["accuracy", None] == pytest.approx(
        sklearn_metrics.accuracy_score(labels, predicted)
    )
    balanced = sklearn_metrics.balanced_accuracy_score(labels, predicted)
    assert found["balanced_accuracy", None] == pytest.approx(balanced)
    assert found["log_loss", None] == pytest.approx(sklearn_metrics.log_loss(labels, p_NK))
    columns = sklearn_metrics.precision_recall_fscore_support(labels, predicted)
    for metric, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [found[metric, name] for name in names] == pytest.approx(column)
    is_true, p_N = labels == decides, p_NK[:, decides]
    brier = sklearn_metrics.brier_score_loss(is_true, p_N)
    assert found["brier_binary", names[decides]] == pytest.approx(brier)
    decided = is_true, p_N >= point.threshold
    for metric, score, kind in (
        ("decision_sensitivity", sklearn_metrics.recall_score, 1),
        ("decision_specificity", sklearn_metrics.recall_score, 0),
        ("positive_predictive_value", sklearn_metrics.precision_score, 1),
        ("negative_predictive_value", sklearn_metrics.precision_score, 0),
    ):
        assert found[metric, "x"] == pytest.approx(score(*decided, pos_label=kind)), metric
    for index, name in enumerate(names):
        ranked = labels == index, p_NK[:, index]
        assert found["roc_auc", name] == pytest.approx(sklearn_metrics.roc_auc_score(*ranked))
        precision = sklearn_metrics.average_precision_score(*ranked)
        assert found["average_precision", name] == pytest.approx(precision)


def test_calibration_error_by_hand():
    """Two bins: 0.95 with 1 of 2 right, and 0.65 with 2 of 2 right."""
    labels = np.array([1, 0, 1, 1])
    found = values(classification_metrics(labels, two_class([0.95, 0.95, 0.65, 0.65]), NAMES))
    assert found["expected_calibration_error", None] == pytest.approx((0.45 + 0.35) / 2)
    bins = calibration_bins(labels, two_class([0.95, 0.95, 0.65, 0.65]))
    assert bins.count_B.sum() == 4
    assert bins.correct_B.sum() == 3


@pytest.mark.parametrize("index", [None, 0, 2])
def test_calibration_bins_are_those_of_guo_and_others(index):
    """15 of equal width, each with its upper edge; the first and the last are used, too."""
    rng = np.random.default_rng(4)
    p_NK = rng.dirichlet(np.full(3, 0.4), 600)
    p_NK[:3] = [[0, 0.2, 0.8], [1, 0, 0], [0.4, 0.6, 0]]  # on edges
    labels = rng.integers(0, 3, 600)
    of_N = p_NK.argmax(axis=1) if index is None else np.full(600, index)
    p_N, right_N = p_NK[np.arange(600), of_N], of_N == labels
    error, filled = 0.0, 0
    for low in range(15):
        in_bin = (p_N > low / 15) & (p_N <= (low + 1) / 15) | ((low == 0) & (p_N == 0))
        if in_bin.any():
            error += in_bin.mean() * abs(right_N[in_bin].mean() - p_N[in_bin].mean())
            filled += 1
    bins = calibration_bins(labels, p_NK, index)
    assert (len(bins.count_B), (bins.count_B > 0).sum()) == (15, filled)
    assert bins.expected_calibration_error == pytest.approx(error)
    name = None if index is None else NAMES_OF_THREE[index]
    metrics = classification_metrics(labels, p_NK, NAMES_OF_THREE, positive=name)
    assert values(metrics)["expected_calibration_error", name] == pytest.approx(error)


def test_errors_of_opposite_sign_do_not_cancel_in_the_class_that_decides():
    """Its 0.1 happens 2 times in 10, and its 0.9 ten times: both are confidences of 0.9, of which 9
    in 10 are right."""
    labels = np.array([1] * 2 + [0] * 8 + [1] * 10)
    metrics = classification_metrics(
        labels, two_class([0.1] * 10 + [0.9] * 10), NAMES, positive="Lung_Opacity"
    )
    found = values(metrics)
    assert found["expected_calibration_error", None] == pytest.approx(0)
    assert found["expected_calibration_error", "Lung_Opacity"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe, Stat Med 1998;17:857, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    # Newcombe, Stat Med 1998;17:873, table II, method 10.
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_intervals_of_differences_are_the_published_ones(first, second, low, high):
    shares = (
        Metric("all", "recall", None, part / n, *wilson_interval(part, n), n)
        for part, n in (first, second)
    )
    assert difference_interval(*shares) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_paired_difference_is_the_published_one_and_holds_95_of_100():
    # Fagerland, Lydersen & Laake, Stat Med 2014;33:2850, airway hyper-responsiveness.
    assert paired_difference_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert paired_difference_interval(1, 7, 21) == pytest.approx((0.026, 0.517), abs=5e-4)
    low, high = paired_difference_interval(0, 0, 96)
    assert high == -low == pytest.approx(1.96**2 / (96 + 1.96**2), abs=1e-5)
    assert paired_difference_interval(0, 9, 9)[1] == 1
    # Of 100 images, 4 differ on average: nearly all in favour of the second, and as many of either.
    for first, second in ((0.004, 0.036), (0.02, 0.02)):
        held = sum(
            multinomial.pmf([b, c, 100 - b - c], 100, [first, second, 1 - first - second])
            for b in range(12)
            for c in range(16)
            if np.prod(np.subtract(paired_difference_interval(b, c, 100), second - first)) <= 0
        )
        assert 0.945 < held < 0.985


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 2, 5), (2, -1, 5), (3, 3, 5)])
def test_an_impossible_paired_difference_is_refused(counts):
    with pytest.raises(ValueError, match="no paired proportions"):
        paired_difference_interval(*counts)


def test_at_none_and_at_all_a_bound_is_the_share_itself():
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_an_impossible_proportion_is_refused(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(successes, n)


def test_what_is_not_defined_is_nan_with_its_n_and_never_zero():
    metrics = classification_metrics(np.array([0, 0]), two_class([0.1, 0.2]), NAMES)
    found = values(metrics)
    for key in (
        ("recall", "Lung_Opacity"),
        ("precision", "Lung_Opacity"),
        ("roc_auc", "Lung_Opacity"),
        ("average_precision", "Lung_Opacity"),
        ("roc_auc", None),
        ("balanced_accuracy", None),
    ):
        assert math.isnan(found[key]), key
    assert found["accuracy", None] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 1000))
def test_confusion_cells_sum_to_the_images_and_recalls_to_the_accuracy(classes, n, seed):
    rng = np.random.default_rng(seed)
    names = [f"class {index}" for index in range(classes)]
    labels = rng.integers(0, classes, n)
    probabilities = rng.dirichlet(np.ones(classes), n)
    metrics = classification_metrics(labels, probabilities, names)
    cells = [m.value for m in metrics if m.metric == "confusion"]
    assert sum(cells) == n
    assert len(cells) == classes**2
    found = values(metrics)
    right = sum(
        found["recall", name] * found["support", name] for name in names if found["support", name]
    )
    assert right / n == pytest.approx(found["accuracy", None])


def test_rows_of_the_confusion_matrix_are_the_truth():
    matrix = confusion_matrix(np.array([0, 0, 1]), np.array([1, 0, 1]), 2)
    assert matrix.tolist() == [[1, 1], [0, 1]]


def test_subgroups_divide_the_images_and_unknown_is_one_of_them():
    groups = {"view_position": ["PA", "PA", "AP", "AP", "PA", "AP", None, None]}
    metrics = classification_metrics(LABELS, SCORES, NAMES, groups=groups)
    sizes = {m.group: m.n for m in metrics if m.metric == "accuracy"}
    assert sizes == {
        "all": 8,
        "view_position=AP": 3,
        "view_position=PA": 3,
        "view_position=unknown": 2,
    }
    assert values(metrics, "view_position=AP")["accuracy", None] == 2 / 3


@pytest.mark.parametrize(
    ("years", "band"),
    [
        (0, "under-18"), (17.9, "under-18"), (18, "18-39"), (40, "40-64"), (65, "65-89"),
        (89.9, "65-89"), (90, "90+"),
    ],
)  # fmt: skip
def test_age_bands_meet_without_a_gap(years, band):
    assert age_band(years) == band


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.array([0, 1]), two_class([0.5]), "shape"),
        (np.array([2]), two_class([0.5]), "labels"),
        (np.array([0]), np.array([[np.nan, 1.0]]), "NaN"),
        (np.array([0]), np.array([[0.9, 0.9]]), "sum to 1"),
        (np.array([0]), np.array([[0.5, 0.5002]]), "sum to 1"),
        (np.array([0]), np.array([[-0.5, 1.5]]), "below 0"),
        (np.array([0]), np.array([[0.0, 1.5]]), "sum to 1"),
        (np.array([0]), np.array([[1.0]]), "not \\(n, 2\\)"),
        (np.array([0.0]), two_class([0.5]), "labels are float64, not integers"),
    ],
)
def test_invalid_scores_are_refused(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probabilities, NAMES)


def test_arguments_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="two or more different class names"):
        classification_metrics(LABELS, SCORES, ("Normal", "Normal"))
    with pytest.raises(ValueError, match="column view_position has 1 values, not 8"):
        classification_metrics(LABELS, SCORES, NAMES, groups={"view_position": ["PA"]})
    with pytest.raises(ValueError, match="nan years is not an age"):
        age_band(float("nan"))
    with pytest.raises(ValueError, match="differ"):
        confusion_matrix(LABELS, LABELS[:1], 2)


def test_an_unknown_positive_class_is_refused():
    with pytest.raises(ValueError, match="positive class 'COVID'"):
        classification_metrics(LABELS, SCORES, NAMES, positive="COVID")


def test_the_largest_gap_between_subgroups_comes_first():
    def auc(group, value, n=100, positive=50, patients=None):
        yield Metric(group, "roc_auc", "Lung_Opacity", value, 0.1, 1.0, n, patients=patients)
        yield Metric(group, "decision_sensitivity", "youden", 0.9, 0.8, 1.0, positive)
        yield Metric(group, "decision_specificity", "youden", 0.9, 0.8, 1.0, n - positive)

    metrics = [
        *auc("all", 0.97),
        *auc("patient_sex=M", 0.96),
        *auc("patient_sex=F", 0.97, n=60, positive=30),
        *auc("view_position=PA", 0.91),
        *auc("view_position=AP", 0.98),
        *auc("view_position=LL", 0.5, patients=29),  # their films resemble each other
        *auc("view_position=unknown", 0.2, n=29, positive=15),
        *auc("age=18-39", 0.9, positive=29),  # ranks of a few films: chance, whatever the interval
        *auc("age=90+", 1.0, positive=71),
        Metric("age=18-39", "roc_auc", "Normal", 0.5, 0.4, 0.6, 100),
    ]
    gaps = largest_gaps(metrics, "Lung_Opacity", "youden")
    found = [(gap.worst.group, gap.best.group) for gap in gaps if gap.figure == "AUC"]
    assert found == [
        ("view_position=PA", "view_position=AP"),
        ("patient_sex=M", "patient_sex=F"),
    ]
    assert gaps[0].size == pytest.approx(0.07)


def test_a_gap_of_decisions_shows_where_the_auc_has_none():
    """Another scanner's scores are shifted: it ranks as well, and misses a third more."""

    def of(site, metric, value, n, class_name="youden"):
        known = None if np.isnan(value) else value
        return Metric(f"site={site}", metric, class_name, value, known, known, n)

    metrics = [
        of("A", "roc_auc", 0.97, 90, "Lung_Opacity"),
        of("B", "roc_auc", 0.97, 90, "Lung_Opacity"),
        of("A", "decision_sensitivity", 0.95, 40),
        of("A", "decision_specificity", 0.95, 50),
        of("B", "decision_specificity", 0.95, 50),
        of("B", "decision_sensitivity", 0.60, 40),
        of("B", "decision_sensitivity", 0.10, 40, "specificity=0.95"),
        of("C", "decision_sensitivity", 0.20, 29),
        of("D", "roc_auc", math.nan, 50, "Lung_Opacity"),  # films of one kind
        of("D", "decision_specificity", 0.95, 50),
        *(of(site, "accuracy", 0.9, n, None) for site, n in {"A": 90, "B": 90, "D": 50}.items()),
        of("C", "accuracy", 0.9, 29, None),
        # Of its ward it alone has normal films enough, and nothing to be compared with.
        Metric("ward=E", "decision_specificity", "youden", 0.95, 0.9, 0.99, 50),
        Metric("ward=E", "accuracy", None, 0.9, 0.8, 0.95, 60),
    ]
    first, *others = largest_gaps(metrics, "Lung_Opacity", "youden")
    assert (first.figure, first.column) == ("sensitivity", "site")
    assert first.size == pytest.approx(0.35)
    assert (first.worst.group, first.best.group) == ("site=B", "site=A")
    assert [(gap.figure, gap.size) for gap in others] == [("AUC", 0), ("specificity", 0)]
    assert (others[0].worst.group, others[0].best.group) == ("site=A", "site=B")
    few = uncompared_groups(metrics, "Lung_Opacity", "youden")
    assert [item.group for item in few] == ["site=C", "ward=E"]
