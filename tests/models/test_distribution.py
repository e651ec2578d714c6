import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf

from lungopacity.models.distribution import (
    JointDistribution,
    TrainingDistribution,
    distribution_of_bytes,
)
from lungopacity.models.scorer import Scorer
from tests.models.tiny import tiny_model, with_distribution


def correlated(rng: np.random.Generator, count: int, features: int = 6) -> np.ndarray:
    """(count, features) with scales from 0.001 to 1000, and correlated."""
    mixing = np.random.default_rng(1).normal(size=(features, features))
    return rng.normal(size=(count, features)) @ mixing * np.logspace(-3, 3, features)


def test_one_in_a_hundred_unseen_films_is_called_unlike_the_rest():
    rng = np.random.default_rng(0)
    found = TrainingDistribution.of(correlated(rng, 3000), correlated(rng, 3000))
    assert 0.005 < (found.score(correlated(rng, 5000)) > 1).mean() < 0.016


def test_members_that_disagree_call_fewer_films_unlike_the_rest():
    rng = np.random.default_rng(0)
    part = TrainingDistribution.of(correlated(rng, 3000), correlated(rng, 3000))
    films = np.concatenate([correlated(rng, 5000), correlated(rng, 5000)], axis=1)
    assert (JointDistribution((part, part)).score(films) > 1).mean() < 0.005


def test_the_score_is_the_mahalanobis_distance_over_the_threshold():
    rng = np.random.default_rng(0)
    train = correlated(rng, 20_000)
    found = TrainingDistribution.of(train, correlated(rng, 500))
    films = correlated(rng, 20) * 3
    centred = films - train.mean(axis=0)
    precision = np.linalg.inv(np.cov(train, rowvar=False))
    distance = np.sqrt(np.einsum("nf,fg,ng->n", centred, precision, centred))
    np.testing.assert_allclose(found.score(films) * found.threshold, distance, rtol=0.15)


@settings(max_examples=25, deadline=None)
@given(st.floats(2, 1e6), st.integers(0, 5))
def test_further_out_along_any_feature_scores_higher(times, feature):
    rng = np.random.default_rng(0)
    train = correlated(rng, 500)
    found = TrainingDistribution.of(train, correlated(rng, 200))
    step = np.zeros((1, 6))
    step[0, feature] = 30 * train[:, feature].std()
    near, far = found.score(train.mean(axis=0) + np.concatenate([step, times * step]))
    assert far > near > 1
    # Farther than float32 can tell, it is still unlike, and no score that is not a number.
    step[0, feature] = 3e38
    assert np.isfinite(found.score(step))


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(np.zeros((50, 8)), id="constant"),
        pytest.param(
            np.random.default_rng(0).normal(size=(5, 200)), id="fewer-films-than-features"
        ),
        pytest.param(
            np.random.default_rng(0).normal(size=(50, 8)) * [1, 1, 1, 1, 0, 0, 0, 0], id="dead"
        ),
    ],
)
def test_features_without_spread_give_finite_scores(train):
    found = TrainingDistribution.of(train, train)
    scores = found.score(np.concatenate([train, train + 100]))
    assert np.isfinite(scores).all()
    assert (scores[len(train) :] > 1).all()


def test_turned_films_are_told_apart_where_most_lie_no_farther_out():
    rng = np.random.default_rng(0)

    def films(count: int, shift: float = 0) -> np.ndarray:
        return rng.normal(size=(count, 64)) + shift * (np.arange(64) == 3)

    train, validation = films(3000), films(3000)
    alone = TrainingDistribution.of(train, validation)
    found = TrainingDistribution.of(train, validation, films(1500, shift=4.5))
    assert (alone.score(films(1000, shift=4.5)) > 1).mean() < 0.5
    for one in (found, distribution_of_bytes(found.to_bytes())):
        turned = one.score(films(1000, shift=4.5))
        assert (turned > 1).mean() > 0.95
        assert 1.7 < np.median(turned) < 2.1
        assert 0.01 < (one.score(films(5000)) > 1).mean() < 0.025


def test_where_turned_films_lie_well_apart_no_upright_film_is_flagged():
    rng = np.random.default_rng(0)
    train, validation, turned = (rng.normal(size=(count, 8)) for count in (2000, 2000, 900))
    turned[:, 3] += 12
    found = TrainingDistribution.of(train, validation, turned)
    assert found.turned is not None
    unseen = rng.normal(size=(5000, 8))
    alone = TrainingDistribution.of(train, validation)
    np.testing.assert_array_equal(found.score(unseen) > 1, alone.score(unseen) > 1)


def test_where_turned_films_look_like_upright_ones_the_distance_alone_is_kept():
    rng = np.random.default_rng(0)
    train, validation = correlated(rng, 500), correlated(rng, 500)
    found = TrainingDistribution.of(train, validation, correlated(rng, 300))
    assert found.turned is None
    assert found.threshold == TrainingDistribution.of(train, validation).threshold


def test_a_distribution_comes_back_from_its_file():
    rng = np.random.default_rng(0)
    saved = TrainingDistribution.of(correlated(rng, 100), correlated(rng, 50))
    loaded = distribution_of_bytes(saved.to_bytes())
    films = correlated(rng, 30)
    np.testing.assert_array_equal(saved.score(films), loaded.score(films))


@pytest.mark.parametrize("films", [20, 200])
def test_the_distance_is_that_of_ledoit_and_wolfs_covariance(films):
    rng = np.random.default_rng(0)
    train = rng.normal(size=(films, 60)) @ rng.normal(size=(60, 60))
    found = TrainingDistribution.of(train, train)
    scaled = (train - train.mean(axis=0)) / train.std(axis=0)
    covariance = LedoitWolf(assume_centered=True).fit(scaled).covariance_
    squares = np.einsum("nf,fg,ng->n", scaled, np.linalg.inv(covariance), scaled)
    np.testing.assert_allclose(found.score(train) * found.threshold, np.sqrt(squares), rtol=2e-3)


def test_a_joint_one_comes_back_from_its_file():
    rng = np.random.default_rng(0)
    parts = tuple(
        TrainingDistribution.of(correlated(rng, 100), correlated(rng, 50)) for _ in range(2)
    )
    joint = JointDistribution(parts)
    films = [correlated(rng, 30) for _ in parts]
    loaded = distribution_of_bytes(joint.to_bytes())
    expected = np.sqrt((parts[0].score(films[0]) ** 2 + parts[1].score(films[1]) ** 2) / 2)
    np.testing.assert_allclose(loaded.score(np.concatenate(films, axis=1)), expected, rtol=1e-5)


def test_a_scorer_tells_noise_from_what_its_model_was_trained_on():
    rng = np.random.default_rng(0)
    films = rng.integers(0, 60, (200, 32, 32), dtype=np.uint8)
    scorer = Scorer(with_distribution(tiny_model(), films))
    noise = rng.integers(0, 256, (20, 32, 32), dtype=np.uint8)
    assert (scorer.out_of_distribution(scorer.scores(noise).features_NF) > 1).all()
    assert (scorer.out_of_distribution(scorer.scores(films).features_NF) > 1).mean() <= 0.02


def test_on_a_gpu_the_device_multiplies_and_the_score_is_the_same(monkeypatch):
    films = np.random.default_rng(0).integers(0, 60, (200, 32, 32), dtype=np.uint8)
    scorer = Scorer(with_distribution(tiny_model(), films))
    features_NF = scorer.scores(films).features_NF
    expected_N = scorer.out_of_distribution(features_NF)
    monkeypatch.setattr(Scorer, "_device", torch.device("cpu"))  # stands for the GPU
    monkeypatch.setattr(np, "matmul", None)
    scorer.use_gpu = True
    for _ in range(2):
        found_N = scorer.out_of_distribution(features_NF)
        np.testing.assert_allclose(found_N, expected_N, rtol=1e-5)
    (stays,) = scorer._on_gpu.values()
    assert stays.shape == (features_NF.shape[1],) * 2


def test_a_model_without_a_distribution_gives_no_distance():
    scorer = Scorer(tiny_model())
    films = np.zeros((2, 32, 32), np.uint8)
    assert scorer.out_of_distribution(scorer.scores(films).features_NF) is None
