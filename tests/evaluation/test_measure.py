"""Every metric of an evaluation with its interval, and the figures under weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import (
    ScoredImages,
    Statistics,
    measure,
    measure_with_gaps,
    ratio_metrics,
)
from lungopacity.evaluation.metrics import wilson_interval
from lungopacity.evaluation.table import uncompared_groups
from lungopacity.models import OperatingPoint

WITHOUT_INTERVAL = ("support", "confusion", "expected_calibration_error_by_chance")
PROPORTIONS = (
    "accuracy", "precision", "recall", "specificity", "decision_sensitivity",
    "decision_specificity", "decision_sensitivity_with_review", "positive_predictive_value",
    "negative_predictive_value", "review_rate",
)  # fmt: skip
POINTS = {"youden": OperatingPoint(0.5), "band": OperatingPoint(0.7, review_from=0.3)}


def scored(n: int, seed: int = 0, classes: int = 2, separation: float = 2.0) -> ScoredImages:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, classes, n)
    logits_NK = rng.normal(size=(n, classes)) + separation * np.eye(classes)[labels_N]
    shares = [np.exp(scale * logits_NK) for scale in (1.0, 2.0)]
    calibrated, raw = (share / share.sum(axis=1, keepdims=True) for share in shares)
    names = tuple(f"class {index}" for index in range(classes))
    return ScoredImages(labels_N, calibrated, names, "class 1", raw, POINTS)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 40), st.integers(0, 1000))
def test_a_weight_is_as_if_the_film_were_there_so_many_times(classes, n, seed):
    images = scored(n, seed, classes)
    weights_N = np.random.default_rng(seed).integers(0, 3, n)
    weights_N[0] += 1
    found = Statistics(images).under(weights_N[None].astype(float))
    copied = images.rows(np.repeat(np.arange(n), weights_N))
    told = {
        (item.metric, item.class_name): item.value
        for item in measure(copied, {}, Resampling.of([None] * len(copied.labels_N), 2))
        if item.metric not in WITHOUT_INTERVAL
    }
    assert set(found) == set(told)
    for key, value in told.items():
        assert found[key][0] == pytest.approx(value, abs=1e-12, nan_ok=True), key


def test_every_figure_but_counts_has_an_interval_around_it_in_every_subgroup():
    images = scored(240, separation=1.0)
    groups = {"view_position": (["PA", "AP", None] * 80)}
    metrics = measure(images, groups, Resampling.of([str(row // 2) for row in range(240)], 300))
    assert {item.group for item in metrics} == {
        "all", "view_position=AP", "view_position=PA", "view_position=unknown",
    }  # fmt: skip
    for item in metrics:
        if item.metric in WITHOUT_INTERVAL:
            assert (item.ci_low, item.ci_high, item.ci_method) == (None, None, None)
        else:
            assert item.ci_low <= item.value <= item.ci_high, item
            assert item.ci_low < item.ci_high, item
            of_films = item.metric in PROPORTIONS
            assert item.ci_method == ("wilson_effective" if of_films else "bootstrap"), item
    counted = {item.group: (item.n, item.patients) for item in metrics if item.metric == "brier"}
    assert counted["all"] == (240, 120)
    assert counted["view_position=PA"] == (80, 80)
    (recall,) = [
        item
        for item in metrics
        if (item.group, item.metric, item.class_name) == ("all", "recall", "class 1")
    ]
    of_class = np.flatnonzero(images.labels_N == 1)
    assert (recall.n, recall.patients) == (len(of_class), len(set(of_class // 2)))


def test_the_values_are_those_without_resampling_and_the_seed_decides_the_intervals():
    images = scored(90, classes=3)
    first, again, other = (
        measure(images, {}, Resampling.of([None] * 90, 50, seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert [item.value for item in first] == [item.value for item in other]
    uncalibrated = replace(images, probabilities_NK=images.uncalibrated_NK)
    raw = measure(uncalibrated, {}, Resampling.of([None] * 90, 2))
    for name in ("brier", "expected_calibration_error"):
        of_raw = {item.class_name: item.value for item in raw if item.metric == name}
        before = [item for item in first if item.metric == f"{name}_before_temperature"]
        assert before
        for item in before:
            assert item.value == pytest.approx(of_raw[item.class_name])
    assert [item.ci_low for item in first] != [item.ci_low for item in other]


@pytest.mark.parametrize(("n", "separation"), [(60, 0.0), (300, 1.0), (800, 6.0)])
def test_the_calibration_error_by_chance_is_that_of_a_perfectly_calibrated_model(n, separation):
    images, rng = scored(n, separation=separation), np.random.default_rng(1)
    names = {None: "predicted", "class 1": "positive"}
    told = {
        item.class_name: item.value
        for item in measure(images, {}, Resampling.of([None] * n, 2))
        if item.metric == "expected_calibration_error_by_chance"
    }
    assert set(told) == set(names)
    errors: dict[str | None, list[float]] = {name: [] for name in names}
    for _ in range(300):
        drawn = replace(
            images, labels_N=(rng.random(n) < images.probabilities_NK[:, 1]).astype(int)
        )
        found = Statistics(drawn).under(np.ones((1, n)))
        for name in names:
            errors[name].append(found["expected_calibration_error", name][0])
    for name in names:
        assert told[name] == pytest.approx(np.mean(errors[name]), rel=0.12), names[name]


def test_clustered_films_have_wider_intervals():
    """Each film three times, as if a patient had three that are all alike."""
    images = scored(100)
    thrice = images.rows(np.repeat(np.arange(100), 3))
    alone = measure(images, {}, Resampling.of([None] * 100))
    together = measure(thrice, {}, Resampling.of([str(row // 3) for row in range(300)]))
    torn = measure(thrice, {}, Resampling.of([None] * 300))
    for first, second, narrow in zip(alone, together, torn, strict=True):
        if first.ci_method == "bootstrap":
            assert (second.ci_low, second.ci_high) == pytest.approx((first.ci_low, first.ci_high))
            ratio = (second.ci_high - second.ci_low) / (narrow.ci_high - narrow.ci_low)
            assert 1.4 < ratio < 2.2, first.metric
        elif first.ci_method:
            bounds = pytest.approx((first.ci_low, first.ci_high), abs=0.01)
            assert (second.ci_low, second.ci_high) == bounds, first.metric
            assert narrow.ci_low > second.ci_low, first.metric


def test_the_interval_of_a_calibration_error_is_moved_to_its_value_and_no_others_is():
    """A replicate's error has the chance of two draws, and is too large on the average."""
    images, resampling = scored(200), Resampling.of([None] * 200, 400)
    replicates = Statistics(images).under(np.concatenate(list(resampling.weights())))
    metrics = [item for item in measure(images, {}, resampling) if item.ci_method == "bootstrap"]
    moved = {item.metric for item in metrics if "calibration" in item.metric}
    assert len(moved) == 2
    for item in metrics:
        values_R = replicates[item.metric, item.class_name]
        if item.metric in moved:
            values_R = np.maximum(values_R + item.value - values_R.mean(), 0)
        low, high = np.percentile(values_R[np.isfinite(values_R)], [2.5, 97.5])
        assert (item.ci_low, item.ci_high) == pytest.approx((low, high)), item


def test_the_interval_of_a_calibration_error_does_not_reach_below_0():
    """Half of the films that have 0.5 are of the class: what replicates show is chance alone."""
    images = ScoredImages(np.arange(60) % 2, np.full((60, 2), 0.5), ("a", "b"), "b")
    metrics = measure(images, {}, Resampling.of([None] * 60, 300))
    errors = [item for item in metrics if item.metric == "expected_calibration_error"]
    assert [item.class_name for item in errors] == [None, "b"]
    for item in errors:
        assert (item.value, item.ci_low) == (0.0, 0.0)
        assert item.ci_high > 0


def test_a_model_without_a_mistake_is_not_certain():
    """Thirty films of ten patients: Wilson's interval of ten; where no formula is, none."""
    labels_N = np.arange(30) % 2
    positive_N = np.where(labels_N == 1, 0.9, 0.1)
    images = ScoredImages(
        labels_N, np.stack([1 - positive_N, positive_N], axis=1), ("a", "b"), "b", None, POINTS
    )
    metrics = measure(images, {}, Resampling.of([str(row // 3) for row in range(30)]))
    found = {(item.metric, item.class_name): item for item in metrics}
    accuracy = found["accuracy", None]
    assert (accuracy.value, accuracy.patients) == (1.0, 10)
    assert (accuracy.ci_low, accuracy.ci_high) == pytest.approx(wilson_interval(10, 10))
    assert accuracy.ci_method == "wilson_effective"
    review = found["review_rate", "band"]
    assert review.value == 0.0
    assert (review.ci_low, review.ci_high) == pytest.approx(wilson_interval(0, 10))
    assert found["roc_auc", "b"].value == 1.0
    assert found["roc_auc", "b"].ci_low is None
    assert found["f1", "b"].ci_method is None


def test_the_gap_between_subgroups_has_an_interval_of_the_same_draws():
    """Of two subgroups that are alike in every draw there is none."""
    images = scored(240, separation=1.0)
    views, resampling = ["PA", "AP"] * 120, Resampling.of([str(row // 4) for row in range(240)])
    metrics, gaps = measure_with_gaps(images, {"view_position": views}, resampling, "youden")
    assert metrics == measure(images, {"view_position": views}, resampling)
    assert {gap.figure for gap in gaps} == {"AUC", "sensitivity", "specificity"}
    for gap in gaps:
        assert gap.ci_low < gap.size < gap.ci_high
        widths = [item.ci_high - item.ci_low for item in (gap.worst, gap.best)]
        expected = math.hypot(*widths)  # of independent ones; these are of the same patients
        assert gap.ci_high - gap.ci_low == pytest.approx(expected, rel=0.25)
    twins = images.rows(np.repeat(np.arange(120), 2))
    _, alike = measure_with_gaps(twins, {"view_position": views}, resampling, "youden")
    assert {(gap.size, gap.ci_low, gap.ci_high) for gap in alike} == {(0.0, None, None)}


def test_a_subgroup_that_is_ranked_without_a_mistake_is_compared():
    """No draw moves its AUC of 1, nor shows how far the gap would vary; of few opacities that says
    nothing."""
    images, views = scored(240, separation=1.0), np.repeat(["PA", "AP"], 120)
    right_N = images.labels_N[:, None] == np.arange(2)
    shares_NK = np.where(views[:, None] == "PA", right_N, images.probabilities_NK)
    images = replace(images, probabilities_NK=shares_NK.astype(np.float64))

    def gaps_of(images, views):
        resampling = Resampling.of([None] * len(views))
        metrics, gaps = measure_with_gaps(images, {"view": list(views)}, resampling, "youden")
        few = uncompared_groups(metrics, images.positive, "youden")
        return {gap.figure: gap for gap in gaps}, [item.group for item in few]

    gaps, few = gaps_of(images, views)
    assert (gaps["AUC"].worst.group, gaps["AUC"].best.group) == ("view=AP", "view=PA")
    assert gaps["AUC"].best.value == 1.0
    assert (gaps["AUC"].ci_low, gaps["AUC"].ci_high) == (None, None)
    assert few == []
    of_pa = np.flatnonzero(views == "PA")
    assert gaps_of(images.rows(of_pa), views[of_pa]) == ({}, [])  # nothing but another is lacking
    opacities = of_pa[images.labels_N[of_pa] == images.positive_index]
    kept = np.setdiff1d(np.arange(240), opacities[29:])
    gaps, few = gaps_of(images.rows(kept), views[kept])
    assert "AUC" not in gaps
    assert few == []  # it is compared by specificity


def test_a_gap_to_a_subgroup_without_a_mistake_has_the_doubt_of_both():
    """Of 30 opacities all are found, of 60 all but five: by Fisher's exact test, p is 0.17. Draws
    move only the five, and would let the gap begin above 0."""
    positive_N = np.repeat([0.9, 0.1], [85, 95])
    labels_N = np.repeat([1, 0], 90)
    sites = ["B"] * 30 + ["A"] * 60 + ["A", "B"] * 45
    images = ScoredImages(
        labels_N, np.stack([1 - positive_N, positive_N], axis=1), ("a", "b"), "b", None, POINTS
    )
    _, gaps = measure_with_gaps(images, {"site": sites}, Resampling.of([None] * 180), "youden")
    found = {gap.figure: gap for gap in gaps}
    gap = found["sensitivity"]
    assert (gap.worst.group, gap.best.group) == ("site=A", "site=B")
    below = math.hypot(1 - wilson_interval(30, 30)[0], gap.worst.ci_high - 55 / 60)
    assert gap.ci_low == pytest.approx(gap.size - below)
    assert gap.ci_high == pytest.approx(1 - gap.worst.ci_low)
    assert gap.ci_low < 0
    # Neither calls a normal film positive, and neither is known to have no false alarm.
    assert found["specificity"].size == 0
    assert -0.12 < found["specificity"].ci_low < 0 < found["specificity"].ci_high < 0.12


def test_one_kind_of_film_or_one_patient_is_no_error():
    """Draws of one patient are all alike. The films of one may all be copies of a single film."""
    images = scored(12).rows(np.flatnonzero(scored(12).labels_N == 0))
    metrics = measure(images, {}, Resampling.of([None] * len(images.labels_N), 50))
    found = {(item.metric, item.class_name): item for item in metrics}
    assert np.isnan(found["roc_auc", "class 1"].value)
    assert found["roc_auc", "class 1"].ci_low is None
    assert found["recall", "class 1"].patients == 0
    one = measure(scored(12), {}, Resampling.of(["a"] * 12, 50))
    for item in one:
        if item.metric in PROPORTIONS and item.n:
            bounds = wilson_interval(item.value, 1)
            assert (item.ci_low, item.ci_high) == pytest.approx(bounds), item
        else:
            assert item.ci_method is None, item


def test_shares_and_means_have_the_intervals_of_a_report():
    images = scored(120, separation=1.0)
    resampling = Resampling.of([str(row // 3) for row in range(120)], 200)
    expected = {(item.metric, item.class_name): item for item in measure(images, {}, resampling)}
    true_N = images.labels_N == 1
    called_N = images.probabilities_NK[:, 1] >= 0.5
    ratios = {
        ("recall", "class 1"): (called_N & true_N, true_N),
        ("accuracy", None): (called_N == true_N, np.ones(120, bool)),
        ("brier_binary", "class 1"): (
            (images.probabilities_NK[:, 1] - true_N) ** 2,
            np.ones(120, bool),
        ),
    }
    found = ratio_metrics(ratios, resampling)
    assert [(item.metric, item.class_name) for item in found] == list(ratios)
    for item in found:
        told = expected[item.metric, item.class_name]
        assert (item.value, item.n, item.patients) == pytest.approx(
            (told.value, told.n, told.patients)
        )
        assert (item.ci_low, item.ci_high) == pytest.approx((told.ci_low, told.ci_high))
        assert item.ci_method == told.ci_method
