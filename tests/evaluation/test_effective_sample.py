"""The interval of a proportion of films that may be of the same patient."""

from __future__ import annotations

import numpy as np
import pytest

from lungopacity.evaluation.bootstrap import Resampling, percentile_interval
from lungopacity.evaluation.effective_sample import clustered_interval
from lungopacity.evaluation.metrics import wilson_interval


def test_of_a_film_a_patient_it_is_wilsons_up_to_1():
    for hits in (0, 1, 20, 38, 39, 40):
        found = clustered_interval(np.arange(40) < hits, np.arange(40) + 7)
        assert found == wilson_interval(hits, 40)
    assert clustered_interval(np.arange(40) < 38, np.arange(40)) == pytest.approx(
        (0.835, 0.986), abs=5e-4
    )


@pytest.mark.parametrize("hits", [0, 1, 30, 59, 60])
def test_copies_of_a_film_count_once(hits):
    hit_N, patient_N = np.repeat(np.arange(60) < hits, 4), np.repeat(np.arange(60), 4)
    found = clustered_interval(hit_N, patient_N)
    assert found == pytest.approx(wilson_interval(hits, 60), abs=0.003)


def test_one_patient_with_most_films_tells_little():
    """If the films of a patient are copies, 30 of 50 have the weight of one."""
    patient_N = np.minimum(np.arange(50), 20)
    low, high = clustered_interval(np.ones(50, bool), patient_N)
    size = 50**2 / (20 + 30**2)
    assert (low, high) == pytest.approx(wilson_interval(size, size))


@pytest.mark.parametrize("films_each", [2, 3, 5])
def test_no_mistake_is_no_jump(films_each):
    """Each of the first mistakes is of another patient, which is where a bootstrap begins at 1."""
    n = 50 * films_each
    patient_N = np.repeat(np.arange(50), films_each)
    bounds = []
    for mistakes in range(9):
        hit_N = np.ones(n, bool)
        hit_N[: mistakes * films_each : films_each] = False
        bounds.append(clustered_interval(hit_N, patient_N))
    lows, highs = np.array(bounds).T
    assert lows[0] == pytest.approx(wilson_interval(50, 50)[0])
    assert highs[0] == 1.0
    assert (highs[1:] < 1).all()
    assert np.abs(np.diff(lows)).max() < 0.025
    assert np.abs(np.diff(highs)).max() < 0.02


@pytest.mark.parametrize(("share", "alike"), [(0.8, 0.5), (0.95, 0.2), (0.95, 0.8)])
def test_it_holds_the_truth_where_the_bootstrap_and_single_films_do_not(share, alike):
    """A hundred films, of one to five a patient. The denominator is chance, too, as of precision:
    each film counts in one of two cases."""
    rng, studies = np.random.default_rng(1), 400
    patient_of = np.repeat(np.arange(66), [1, 2, 3, 4, 5, 3] * 11)
    held = dict.fromkeys(("effective", "bootstrap", "films"), 0)
    for study in range(studies):
        # The correlation of two films of a patient is 1 / (a + b + 1).
        a, b = share * (1 / alike - 1), (1 - share) * (1 / alike - 1)
        counted_N = rng.random(198) < 0.5
        hit_N = (rng.random(198) < rng.beta(a, b, 66)[patient_of])[counted_N]
        patient_N = patient_of[counted_N]
        resampling = Resampling.of(patient_N.astype(str).tolist(), 100, study)
        (weights_RN,) = resampling.weights()
        drawn_R = weights_RN @ hit_N / weights_RN.sum(axis=1)
        found = {
            "effective": clustered_interval(hit_N, patient_N),
            "films": wilson_interval(int(hit_N.sum()), len(hit_N)),
            "bootstrap": percentile_interval(drawn_R),
        }
        for name, (low, high) in found.items():
            held[name] += low is not None and low <= share <= high
    assert 0.93 < held["effective"] / studies < 0.99, held
    assert held["bootstrap"] < held["effective"], held
    assert held["films"] < held["effective"], held
