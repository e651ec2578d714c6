"""Intervals over patients, compared with other libraries and with known truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from lungopacity.evaluation.bootstrap import (
    Ranking,
    Resampling,
    drawn_precision_recall,
    drawn_roc,
    percentile_interval,
    weighted_auc,
)
from lungopacity.evaluation.metrics import wilson_interval


def drawn(figure_of, positive_N, scores_N, resampling) -> np.ndarray:
    return np.concatenate([figure_of(positive_N, scores_N, w) for w in resampling.weights()])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.sampled_from([1, 2, 9]))
def test_weighted_figures_are_those_of_scikit_learn(seed, n, digits):
    rng = np.random.default_rng(seed)
    positive_N = rng.random(n) < 0.5
    scores_N = np.round(rng.random(n), digits)  # with ties, and without
    weights_RN = rng.integers(0, 4, (3, n)).astype(float)
    areas = Ranking(positive_N, scores_N).areas(weights_RN)
    np.testing.assert_array_equal(weighted_auc(positive_N, scores_N, weights_RN), areas.auc_R)
    for weights_N, auc, precision in zip(
        weights_RN, areas.auc_R, areas.average_precision_R, strict=True
    ):
        positives, negatives = weights_N[positive_N].sum(), weights_N[~positive_N].sum()
        if positives and negatives:
            told = roc_auc_score(positive_N, scores_N, sample_weight=weights_N)
            assert auc == pytest.approx(told, abs=1e-12)
        else:
            assert np.isnan(auc)
        if positives:
            told = average_precision_score(positive_N, scores_N, sample_weight=weights_N)
            assert precision == pytest.approx(told, abs=1e-12)
        else:
            assert np.isnan(precision)


def test_films_of_a_patient_are_drawn_together_and_unknown_ones_alone():
    resampling = Resampling.of(["b", None, "a", "b", float("nan"), "a"], replicates=200)
    assert resampling.patient_N.tolist() == [0, 1, 2, 0, 3, 2]
    assert (resampling.patients, resampling.clustered) == (4, True)
    weights_RN = np.concatenate(list(resampling.weights()))
    assert weights_RN.shape == (200, 6)
    np.testing.assert_array_equal(weights_RN[:, 0], weights_RN[:, 3])
    np.testing.assert_array_equal(weights_RN[:, 2], weights_RN[:, 5])
    assert (weights_RN[:, 1] != weights_RN[:, 4]).any()
    # Each time as many patients as there are.
    assert set(weights_RN[:, [0, 1, 2, 4]].sum(axis=1)) == {4}
    assert not Resampling.of(["a", "b", None]).clustered


def test_a_seed_draws_the_same_patients_and_another_others():
    first, again, other = (
        np.concatenate(list(Resampling.of([None] * 50, 30, seed).weights())) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_many_films_are_drawn_in_parts(monkeypatch):
    resampling = Resampling.of([None] * 40, replicates=25)
    monkeypatch.setattr("lungopacity.evaluation.bootstrap._BLOCK", 400)
    parts = [len(weights_RN) for weights_RN in resampling.weights()]
    assert parts == [10, 10, 5]
    assert list(Resampling.of([]).weights()) == []


def test_with_one_film_a_patient_the_interval_is_about_delongs():
    rng = np.random.default_rng(4)
    positive_N = rng.random(600) < 0.4
    scores_N = positive_N * 1.2 + rng.normal(size=600)
    values_R = drawn(weighted_auc, positive_N, scores_N, Resampling.of([None] * 600))
    low, high = percentile_interval(values_R)
    psi = scores_N[positive_N][:, None] > scores_N[~positive_N][None, :]  # no ties
    auc, variance = psi.mean(), 0.0
    for shares in (psi.mean(axis=1), psi.mean(axis=0)):
        variance += shares.var(ddof=1) / len(shares)
    # On the logit scale, on which the AUC is about normal (Pepe 2003, ch. 5).
    half = 1.96 * np.sqrt(variance) / (auc * (1 - auc))
    centre = logit(auc)
    assert expit(centre - half) == pytest.approx(low, abs=0.004)
    assert expit(centre + half) == pytest.approx(high, abs=0.004)


def test_of_clustered_films_the_interval_holds_the_truth_and_wilsons_does_not():
    """Five films a patient whose errors go together: the variance is 1 + 4 rho times a film's."""
    rng, rho, films = np.random.default_rng(5), 0.5, 5
    held = {"bootstrap": 0, "wilson": 0}
    ratios, studies = [], 200
    for study in range(studies):
        # Beta with mean 0.8 and 1 / (a + b + 1) = rho: that is the correlation of two films.
        chance_P = rng.beta(0.8 * (1 / rho - 1), 0.2 * (1 / rho - 1), 150)
        right_N = rng.random(150 * films) < np.repeat(chance_P, films)
        patients = np.repeat(np.arange(150), films).astype(str)
        resampling = Resampling.of(patients.tolist(), 400, study)
        (weights_RN,) = resampling.weights()
        low, high = percentile_interval(weights_RN @ right_N / weights_RN.sum(axis=1))
        narrow = wilson_interval(int(right_N.sum()), len(right_N))
        held["bootstrap"] += low <= 0.8 <= high
        held["wilson"] += narrow[0] <= 0.8 <= narrow[1]
        ratios.append((high - low) / (narrow[1] - narrow[0]))
    assert np.mean(ratios) == pytest.approx(np.sqrt(1 + (films - 1) * rho), rel=0.06)
    assert 0.91 <= held["bootstrap"] / studies <= 0.98
    assert held["wilson"] / studies < 0.85


def test_what_the_replicates_do_not_show_has_no_interval():
    assert percentile_interval(np.ones(100)) == (None, None)
    assert percentile_interval(np.array([0.3, 0.1 + 0.2] * 50)) == (None, None)  # but for rounding
    assert percentile_interval(np.full(100, np.nan)) == (None, None)
    values_R = np.linspace(0, 1, 100)
    values_R[:6] = np.nan
    assert percentile_interval(values_R) == (None, None)
    values_R[:5] = 0.5
    low, high = percentile_interval(values_R)
    assert 0 < low < 0.1 < 0.9 < high < 1


@pytest.mark.parametrize("replicates", [0, -1])
def test_no_replicates_are_refused(replicates):
    with pytest.raises(ValueError, match="replicates must be 1 or more"):
        Resampling.of(["a"], replicates)


def test_bands_hold_the_true_curve_at_most_of_its_points():
    rng = np.random.default_rng(6)
    positive_N = rng.random(500) < 0.5
    scores_N = rng.random(500) ** np.where(positive_N, 0.5, 1)
    # P(score > t): 1 - t of negatives, 1 - t² of positives.
    resampling = Resampling.of([None] * 500, 300)
    band, aucs_R = drawn_roc(positive_N, scores_N, resampling)
    told_R = drawn(weighted_auc, positive_N, scores_N, resampling)
    np.testing.assert_array_equal(aucs_R, told_R)
    true_G = 1 - (1 - band.grid_G) ** 2
    inside_G = (band.low_G <= true_G) & (true_G <= band.high_G)
    assert inside_G.mean() > 0.8
    middle = len(band.grid_G) // 2
    assert 0.02 < band.high_G[middle] - band.low_G[middle] < 0.2
    band, _ = drawn_precision_recall(positive_N, scores_N, resampling)
    recall_G = band.grid_G[20:-1]
    threshold_G = np.sqrt(1 - recall_G)
    true_G = recall_G / (recall_G + 1 - threshold_G)
    inside_G = (band.low_G[20:-1] <= true_G) & (true_G <= band.high_G[20:-1])
    assert inside_G.mean() > 0.8
    assert band.high_G[-1] < 0.62  # at full recall hardly better than the share of positives


@pytest.mark.parametrize("first", [False, True])
def test_the_precision_band_is_of_the_replicates_own_steps(first):
    """Where the best score is a negative's, what is held down to the first recall is not its 0."""
    positive_N = np.array([first, True, True, first, True, False, False, True])
    scores_N = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    resampling = Resampling.of([None] * 8, 60)
    (band, areas_R), curves = drawn_precision_recall(positive_N, scores_N, resampling), []
    for weights_N in np.concatenate(list(resampling.weights())):
        if weights_N[positive_N].any():
            precision, recall, _ = precision_recall_curve(
                positive_N, scores_N, sample_weight=weights_N
            )
            # At each recall that of the highest threshold that reaches it.
            least_G = np.maximum(band.grid_G, 1e-9) - 1e-12
            curves.append([precision[np.flatnonzero(recall >= least)[-1]] for least in least_G])
    low_G, high_G = np.percentile(curves, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(band.low_G, low_G)
    np.testing.assert_allclose(band.high_G, high_G)
    assert len(areas_R) == 60


def test_without_a_kind_there_is_no_band():
    alone = np.zeros(5, bool)
    resampling = Resampling.of([None] * 5, 10)
    for drawn_curve in (drawn_roc, drawn_precision_recall):
        band, areas_R = drawn_curve(alone, np.arange(5.0), resampling)
        assert band is None
        assert np.isnan(areas_R).all()


def test_some_films_are_of_the_patients_that_are_left():
    resampling = Resampling.of(["b", "a", "c", "b", None], replicates=20, seed=3)
    some = resampling.rows(np.array([2, 3, 4]))
    assert (some.patients, some.replicates, some.seed) == (3, 20, 3)
    assert resampling.rows(np.array([0, 3])).patient_N.tolist() == [0, 0]
