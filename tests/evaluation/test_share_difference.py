"""The difference of two models in a share of films: McNemar's test, and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.compare import share_difference
from lungopacity.evaluation.metrics import paired_difference_interval


@pytest.mark.parametrize("alike", [False, True], ids=["films alone", "films of a patient alike"])
def test_the_interval_of_a_few_films_that_differ_holds_the_truth(alike):
    """Four of 200 films on average, all but a tenth in favour of the second model. The percentile
    bootstrap over patients holds the truth in 88 and 79 of 100."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(300):
        patients = rng.permutation(np.arange(200) % 100)
        which = rng.choice(3, 200, p=[0.002, 0.018, 0.98])
        which = which[patients] if alike else which
        right_N2 = np.stack([which != 1, which != 0], axis=1)
        found = share_difference(right_N2, Resampling.of(patients.tolist()))
        held += found.ci_low <= 0.016 <= found.ci_high
    assert 0.93 < held / 300 <= 1


def test_the_films_of_a_patient_that_differ_alike_count_as_one():
    right_N2 = np.ones((120, 2), bool)
    right_N2[:4, 0] = False
    apart, torn, one = (
        share_difference(right_N2, Resampling.of(patients))
        for patients in (list(range(120)), list(np.arange(120) % 40), list(np.arange(120) // 4))
    )
    assert (apart.ci_low, apart.ci_high) == paired_difference_interval(0, 4, 120)
    assert apart.ci_low > 0
    # Never narrower than of single films, though here films of a patient differ less than others.
    assert (torn.ci_low, torn.ci_high) == (apart.ci_low, apart.ci_high)
    # All four films are of one of 30 patients.
    effect = 4 * 30 / 29
    expected = paired_difference_interval(0, 4 / effect, 120 / effect)
    assert (one.ci_low, one.ci_high) == pytest.approx(expected)
    assert one.ci_low < 0
    assert one.ci_high > 1.2 * apart.ci_high


def test_if_nothing_tells_how_alike_the_films_of_a_patient_are_they_count_as_copies():
    for patients, size in ((list(range(60)) * 2, 60), (["p"] * 120, 1)):
        same = share_difference(np.ones((120, 2), bool), Resampling.of(patients))
        assert (same.ci_low, same.ci_high) == paired_difference_interval(0, 0, size)
        assert same.p_value == 1
        other = share_difference(np.tile([False, True], (120, 1)), Resampling.of(patients))
        assert (other.ci_low, other.ci_high) == paired_difference_interval(0, size, size)
    mixed = np.tile([[False, True], [True, True]], (60, 1))
    one = share_difference(mixed, Resampling.of(["p"] * 120))
    assert (one.ci_low, one.ci_high) == paired_difference_interval(0, 0.5, 1)


def test_mcnemar_counts_the_films_that_one_alone_gets_right():
    right = np.array([[True, False]] * 9 + [[False, True]] * 1 + [[True, True]] * 90)
    found = share_difference(right, Resampling.of([None] * 100))
    assert (found.only_first_right, found.only_second_right) == (9, 1)
    assert found.difference == pytest.approx(-0.08)
    assert found.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert (found.first, found.second) == pytest.approx((0.99, 0.91))
