from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from lungopacity.errors import UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ratio_metrics
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.operating_points import (
    RULES,
    STANDARD,
    deciding_point,
    decision_shares,
    pick,
    thresholds,
)
from lungopacity.evaluation.table import decision_words
from lungopacity.models import OperatingPoint


def films(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated scores, and whether each film is positive."""
    rng = np.random.default_rng(seed)
    scores_V = rng.random(count)
    return scores_V, rng.random(count) < scores_V


def decision_metrics(scores_N, positive_N, points) -> list[Metric]:
    """As `measure` and `threshold` make them of `decision_shares`."""
    ratios = {
        (what, name): share
        for name, point in points.items()
        for what, share in decision_shares(scores_N, positive_N, point).items()
    }
    return ratio_metrics(ratios, Resampling.of([None] * len(scores_N), 50))


def achieved(point: OperatingPoint, scores_V: np.ndarray, positive_V: np.ndarray) -> tuple:
    decided_V = scores_V >= point.threshold
    return decided_V[positive_V].mean(), (~decided_V)[~positive_V].mean()


def test_operating_point_reaches_the_best_sum_of_sensitivity_and_specificity() -> None:
    scores_V, positive_V = films(500)
    point = pick("youden", scores_V, positive_V)
    decided_V = scores_V >= point.threshold
    assert point.sensitivity == pytest.approx(decided_V[positive_V].mean())
    assert point.specificity == pytest.approx(1 - decided_V[~positive_V].mean())
    false_positive_rate, true_positive_rate, _ = roc_curve(positive_V, scores_V)
    best = (true_positive_rate - false_positive_rate).max()
    assert point.sensitivity + point.specificity - 1 == pytest.approx(best)
    assert point.images == 500


def test_operating_point_lies_between_scores() -> None:
    scores_V = np.array([0.1, 0.2, 0.7, 0.9], np.float32)
    point = pick("youden", scores_V, np.array([False, False, True, True]))
    assert point.threshold == pytest.approx(0.45)
    assert (point.sensitivity, point.specificity) == (1.0, 1.0)


def test_of_equally_good_thresholds_the_more_sensitive_is_chosen() -> None:
    point = pick("youden", np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, True, False, True]))
    assert (point.sensitivity, point.specificity) == (1.0, 0.5)


def test_operating_point_of_constant_scores_calls_all_positive() -> None:
    point = pick("youden", np.full(4, 0.5), np.array([False, True, False, True]))
    assert point.threshold == 0.25


@pytest.mark.parametrize("rule", [*STANDARD, "cost=5", "cost=5@0.02", "specificity=1"])
@given(
    scores=st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.30001, 0.7, 0.9, 1.0]), min_size=4),
    flips=st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_a_threshold_does_what_it_says_it_does(rule, scores, flips) -> None:
    scores_V = np.array(scores, np.float32)
    positive_V = np.array([flips.random() < 0.5 for _ in scores])
    positive_V[0], positive_V[1] = True, False
    point = pick(rule, scores_V, positive_V)
    sensitivity, specificity = achieved(point, scores_V.astype(np.float64), positive_V)
    assert (point.sensitivity, point.specificity) == pytest.approx((sensitivity, specificity))


def every_threshold(scores_V: np.ndarray, positive_V: np.ndarray) -> np.ndarray:
    """Rows of positives found and negatives passed: whole numbers, which nothing rounds."""
    between = np.concatenate([[0], np.unique(scores_V), [2]])
    return np.array(
        [
            (np.sum(positive_V & (scores_V >= t)), np.sum(~positive_V & (scores_V < t)))
            for t in between
        ]
    )


@pytest.mark.parametrize("separation", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("least", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["sensitivity", "specificity"])
def test_of_all_that_reach_a_bound_none_does_better_in_either(kind, least, separation) -> None:
    rng = np.random.default_rng(3)
    positive_V = rng.random(200) < 0.4
    scores_V = np.round(1 / (1 + np.exp(-rng.normal(separation * positive_V, 1.0))), 2)
    point = pick(f"{kind}={least}", scores_V, positive_V)
    found = scores_V >= point.threshold
    ours = np.array([np.sum(positive_V & found), np.sum(~positive_V & ~found)])
    bounded = 0 if kind == "sensitivity" else 1
    of = (positive_V.sum(), (~positive_V).sum())[bounded]
    assert ours[bounded] >= least * of - 1e-9
    others = every_threshold(scores_V, positive_V)
    others = others[others[:, bounded] >= least * of - 1e-9]
    # First the figure that the rule leaves free, then the one that it bounds.
    best = max(others.tolist(), key=lambda pair: (pair[1 - bounded], pair[bounded]))
    assert ours.tolist() == best


@pytest.mark.parametrize("positives", [10, 12, 20])
def test_of_equally_good_thresholds_the_most_sensitive_is_chosen(positives) -> None:
    rng = np.random.default_rng(6)
    for _ in range(300):
        positive_V = np.arange(30) < positives
        scores_V = rng.integers(0, 20, 30) / 20
        found = scores_V >= pick("youden", scores_V, positive_V).threshold
        ours = (np.sum(positive_V & found), np.sum(~positive_V & ~found))
        others = every_threshold(scores_V, positive_V).tolist()
        # Both shares over one denominator: whole numbers.
        best = max(others, key=lambda p: (p[0] * (30 - positives) + p[1] * positives, p[0]))
        assert best == list(ours)


def test_a_bound_that_is_met_to_the_film_is_met() -> None:
    """In float64, 1 - 7 / 100 is less than 0.93."""
    scores_V, positive_V = np.arange(101) / 101, np.arange(101) == 93
    point = pick("specificity=0.93", scores_V, positive_V)
    assert (point.sensitivity, point.specificity) == (1.0, 0.93)


@pytest.mark.parametrize("rule", ["specificity=1", "cost=0.1", "cost=5@0.0001"])
def test_where_a_negative_scores_highest_all_may_be_negative(rule) -> None:
    scores_V = np.array([0.2, 0.4, 0.6, 0.9])
    point = pick(rule, scores_V, np.array([False, True, False, False]))
    assert point.threshold == pytest.approx(0.95)
    assert (point.sensitivity, point.specificity) == (0.0, 1.0)


def test_where_negatives_of_score_1_prevent_a_specificity_the_most_specific_is_chosen() -> None:
    scores_V = np.array([0.2, 0.4, 0.6, 1.0, 1.0])
    point = pick("specificity=0.9", scores_V, np.array([False, True, False, True, False]))
    assert (point.sensitivity, point.specificity) == (0.5, 2 / 3)
    # A lower threshold costs no specificity then, and finds more.
    scores_V = np.array([0.2, 0.8, 0.6, 1.0, 1.0])
    point = pick("specificity=0.9", scores_V, np.array([False, True, False, True, False]))
    assert (point.sensitivity, point.specificity) == (1.0, 2 / 3)


def test_the_point_that_decides_is_named() -> None:
    points = {"youden": OperatingPoint(0.4), "cost=5": OperatingPoint(0.2)}
    assert deciding_point(points, OperatingPoint(0.2)) == "cost=5"
    # As of an older folder, whose one point has no name.
    assert deciding_point({}, OperatingPoint(0.2)) == "default"


@pytest.mark.parametrize("cost", [2, 4, 7])
def test_of_equally_cheap_thresholds_the_most_sensitive_is_chosen(cost) -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        positive_V = np.arange(32) < 14
        scores_V = rng.integers(0, 20, 32) / 20
        found = scores_V >= pick(f"cost={cost}", scores_V, positive_V).threshold
        ours = (np.sum(positive_V & found), np.sum(~positive_V & ~found))
        others = every_threshold(scores_V, positive_V).tolist()
        assert max(others, key=lambda pair: (cost * pair[0] + pair[1], pair[0])) == list(ours)


def test_of_calibrated_scores_a_cost_gives_the_threshold_of_decision_theory() -> None:
    # Treat where p * cost of a miss > (1 - p) * cost of a false alarm: from 1 / (1 + 4).
    scores_V, positive_V = films(60_000)
    assert pick("cost=4", scores_V, positive_V).threshold == pytest.approx(0.2, abs=0.03)


def test_the_rarer_the_disease_the_higher_the_threshold_of_a_cost() -> None:
    scores_V, positive_V = films(2000)
    rare, common = (pick(f"cost=4@{p}", scores_V, positive_V).threshold for p in (0.02, 0.5))
    assert rare > common


def test_a_band_lies_between_a_sensitive_and_a_specific_threshold() -> None:
    scores_V, positive_V = films(2000)
    point = pick("band=0.99,0.95", scores_V, positive_V)
    assert point.review_from == pick("sensitivity=0.99", scores_V, positive_V).threshold
    assert point.threshold == pick("specificity=0.95", scores_V, positive_V).threshold


def test_a_model_that_needs_no_band_has_none() -> None:
    scores_V = np.array([0.1, 0.2, 0.8, 0.9])
    point = pick("band=0.99,0.95", scores_V, np.array([False, False, True, True]))
    assert point.review_from is None


@pytest.mark.parametrize(
    "rule",
    "best sensitivity sensitivity=0 sensitivity=1.1 specificity=x cost cost=-1 cost=1,0.5 cost=1@2 "
    "band=0.9 band=0.9,0.9,0.9 youden=1 =0.5 cost=inf cost=nan cost=1e308 cost=1e7 cost=5@nan "
    "sensitivity=nan specificity=inf band=nan,0.9 band=0.9@0.9 band=0.9,2 "
    "cost=0 cost=5@0 cost=5@1".split(),
)
def test_another_rule_is_refused_with_those_there_are(rule) -> None:
    with pytest.raises(UserError, match="is not a rule; give one such as youden or") as error:
        pick(rule, *films(20))
    assert "\n" not in str(error.value)


def test_the_share_of_a_cost_weighs_misses_and_false_alarms_alike() -> None:
    scores_V = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    positive_V = np.array([False, True, False, False, True, False, True, True])
    # A tenth of the films have the class. From 0.65, half are missed: 4 * 0.1 * 0.5 = 0.2. From
    # 0.45, a quarter are missed and a quarter are false alarms: 4 * 0.1 * 0.25 + 0.9 * 0.25.
    assert pick("cost=4@0.1", scores_V, positive_V).threshold == pytest.approx(0.65)
    assert pick("cost=10@0.1", scores_V, positive_V).threshold == pytest.approx(0.45)
    assert pick("cost=4", scores_V, positive_V).threshold == pytest.approx(0.15)


def test_the_highest_cost_still_tells_good_thresholds_from_bad_ones() -> None:
    scores_V = np.array([0.1, 0.2, 0.7, 0.9])
    point = pick("cost=1e6", scores_V, np.array([False, False, True, True]))
    assert (point.sensitivity, point.specificity) == (1.0, 1.0)


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_of_image_gives_no_threshold(kind) -> None:
    with pytest.raises(UserError, match="with and without"):
        pick("youden", np.array([0.2, 0.8]), np.array([kind, kind]))


def test_every_rule_that_is_explained_is_one() -> None:
    for rule in RULES:
        pick(rule, *films(100))


def test_decisions_are_counted_at_each_point() -> None:
    scores_N = np.array([0.1, 0.4, 0.5, 0.6, 0.9])
    positive_N = np.array([False, True, False, True, True])
    points = {"a": OperatingPoint(0.55), "b": OperatingPoint(0.95, review_from=0.45)}
    found = {
        (item.class_name, item.metric): (item.value, item.n)
        for item in decision_metrics(scores_N, positive_N, points)
    }
    assert found["a", "decision_sensitivity"] == (pytest.approx(2 / 3), 3)
    assert found["a", "decision_specificity"] == (1.0, 2)
    assert found["a", "positive_predictive_value"] == (1.0, 2)
    assert found["a", "negative_predictive_value"] == (pytest.approx(2 / 3), 3)
    assert ("a", "review_rate") not in found
    assert found["b", "review_rate"] == (pytest.approx(3 / 5), 5)
    assert np.isnan(found["b", "positive_predictive_value"][0])
    # What is under review is not negative: one of the four not positive.
    assert found["b", "negative_predictive_value"] == (0.5, 2)
    assert found["b", "decision_sensitivity"] == (0.0, 3)
    assert found["b", "decision_sensitivity_with_review"] == (pytest.approx(2 / 3), 3)
    assert ("a", "decision_sensitivity_with_review") not in found


def test_a_score_that_stands_on_a_threshold_is_counted_as_it_is_decided() -> None:
    scores_N, point = np.array([0.2, 0.45, 0.95]), OperatingPoint(0.95, review_from=0.45)
    shares = decision_shares(scores_N, np.full(3, True), point)
    decided = [point.decide(float(score)) for score in scores_N]
    assert decided == ["negative", "review", "positive"]
    found = {name: shares[name][0].tolist() for name in ("decision_sensitivity", "review_rate")}
    assert found["decision_sensitivity"] == [word == "positive" for word in decided]
    assert found["review_rate"] == [word == "review" for word in decided]


def test_films_are_counted_as_their_views_thresholds_decide() -> None:
    scores_N = np.array([0.2, 0.2, 0.2, 0.7, 0.7, 0.7, 0.95])
    views = ["PA", "AP", None, "PA", "AP", None, "AP"]
    by_view = {"PA": OperatingPoint(0.6, review_from=0.1), "AP": OperatingPoint(0.9)}
    point = OperatingPoint(0.5, by_view=by_view)
    decided = [point.decide(float(p), view) for p, view in zip(scores_N, views, strict=True)]
    assert decided == [
        "review", "negative", "negative", "positive", "negative", "positive", "positive",
    ]  # fmt: skip
    shares = decision_shares(scores_N, np.full(7, True), point, views)
    found = {name: shares[name][0].tolist() for name in ("decision_sensitivity", "review_rate")}
    assert found["decision_sensitivity"] == [word == "positive" for word in decided]
    assert found["review_rate"] == [word == "review" for word in decided]
    # Where no view is known, the thresholds for all films decide, which have no band.
    shares = decision_shares(scores_N, np.full(7, True), point)
    assert shares["decision_sensitivity"][0].tolist() == (scores_N >= 0.5).tolist()
    assert "review_rate" not in shares
    assert thresholds(point) == (
        "positive from 0.5000; PA views: positive from 0.6000, review from 0.1000; "
        "AP views: positive from 0.9000"
    )


def test_a_band_is_told_by_what_it_finds_with_its_review() -> None:
    scores_N, positive_N = films(200)
    for point, lines in ((OperatingPoint(0.6), 1), (OperatingPoint(0.6, review_from=0.2), 2)):
        told = decision_words(decision_metrics(scores_N, positive_N, {"x": point}))
        assert len(told) == lines
        assert told[0].startswith("sensitivity 0.")
    # By hand: which share stands under which name.
    found_N = scores_N >= 0.2
    review_N = found_N & (scores_N < 0.6)
    shares = (found_N[positive_N].mean(), (~positive_N)[~found_N].mean(), review_N.mean())
    names = ("sensitivity", "negative predictive value", "under review")
    expected = [f"{name} {share:.4f}" for name, share in zip(names, shares, strict=True)]
    assert re.sub(r" \(.*?\)", "", told[1]).split(", ") == expected
