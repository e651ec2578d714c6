"""Sums by cell, compared with a matrix product over all films."""

from __future__ import annotations

import numpy as np
import pytest

from lungopacity.evaluation.weighted_sums import WeightedSums


@pytest.mark.parametrize("films", [1, 7, 500])
def test_sums_by_cell_are_those_over_all_films(films):
    rng = np.random.default_rng(films)
    flags = [rng.random(films) < share for share in (0.5, 0.1, 0, 1, *[0.5] * 9)]
    columns = [flags[0], rng.random(films), *flags[1:], rng.normal(size=films)]
    binned = [(rng.integers(0, 15, films), rng.normal(size=films)) for _ in range(2)]
    weights_RN = rng.integers(0, 4, (3, films)).astype(float)
    sums_RF, in_bins = WeightedSums(columns, binned, 15).under(weights_RN)
    np.testing.assert_allclose(sums_RF, weights_RN @ np.stack(columns, axis=1), atol=1e-12)
    for found_RB, (bin_N, value_N) in zip(in_bins, binned, strict=True):
        for told_B, weights_N in zip(found_RB, weights_RN, strict=True):
            expected_B = np.bincount(bin_N, weights_N * value_N, 15)
            np.testing.assert_allclose(told_B, expected_B, atol=1e-12)
