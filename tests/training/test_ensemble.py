"""Ensembles of real model folders, scored by `Scorer`."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from lungopacity.errors import UserError
from lungopacity.models import (
    TrainedModel,
    films_known_to,
    load_model,
    read_history,
    save_model,
    validation_films,
)
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from lungopacity.training.ensemble import ensemble
from tests.models.tiny import history_parquet, tiny_model, with_distribution

CLASSES = ("Normal", "Lung_Opacity")
FILMS = np.random.default_rng(0).integers(0, 256, (40, 96, 96), dtype=np.uint8)
LABELS = [CLASSES[number % 2] for number in range(40)]
DIGESTS = [hashlib.sha256(film.tobytes()).hexdigest() for film in FILMS]


def squares(model: TrainedModel) -> np.ndarray:
    return np.stack([model.spec.preprocessing.square(film) for film in FILMS])


def folder(
    uri: str,
    seed: int,
    size: int = 32,
    fingerprint: str = "f",
    training_films: bytes | None = None,
    **changes,
) -> TrainedModel:
    """A model folder as training writes it, of an untrained network."""
    facts = {
        "preprocessing": Preprocessing(image_size=size, mean=0.4, std=0.3),
        "temperature": 0.5 + seed,
        "training": {"settings": {"seed": 7}, "data": {"fingerprint": fingerprint}},
        **changes,
    }
    model = with_distribution_of(replace_spec(tiny_model(seed), **facts))
    logits_VK = Scorer(model).logits(squares(model))
    views = None if seed == 1 else [f"view {digest}" for digest in DIGESTS]
    kept = validation_parquet(DIGESTS, LABELS, logits_VK, model.spec.class_names, views)
    save_model(uri, model, history_parquet(), kept, training_films)
    return model


def replace_spec(model: TrainedModel, **facts) -> TrainedModel:
    return replace(model, spec=replace(model.spec, **facts))


def with_distribution_of(model: TrainedModel) -> TrainedModel:
    return with_distribution(model, squares(model))


@pytest.fixture
def members(tmp_path):
    uris = [str(tmp_path / name) for name in "ab"]
    return uris, [folder(uris[0], 1), folder(uris[1], 2)]


def test_the_ensembles_logits_are_the_mean_of_the_calibrated_ones(members, tmp_path):
    uris, models = members
    made = ensemble(uris, str(tmp_path / "both"))
    both = load_model(str(tmp_path / "both"))
    assert both.model_id == made.model_id
    # The first is an older folder, whose films have no views.
    films, _ = validation_films(str(tmp_path / "both"))
    assert (films["view_position"] == "view " + films["content_sha256"]).all()
    logits = [model.spec.calibrated(Scorer(model).logits(squares(model))) for model in models]
    scores = Scorer(both).scores(squares(both), batch_size=7)
    np.testing.assert_allclose(scores.logits_NK, sum(logits) / 2, rtol=1e-4, atol=1e-5)


def test_the_biases_of_its_members_count(tmp_path):
    uris = [str(tmp_path / name) for name in "ab"]
    models = [folder(uris[0], 1, class_biases=(0.5, -0.5)), folder(uris[1], 2)]
    made = ensemble(uris, str(tmp_path / "both"))
    assert made.spec.class_biases is not None
    both = Scorer(made)
    logits = [model.spec.calibrated(Scorer(model).logits(squares(model))) for model in models]
    found_NK = both.logits(squares(both.model))
    np.testing.assert_allclose(found_NK, sum(logits) / 2, rtol=1e-4, atol=1e-5)


def test_an_ensemble_lists_the_training_films_of_every_member(tmp_path):
    """Including those that only the first weights of one had learnt from."""
    uris = [str(tmp_path / name) for name in "abc"]
    for seed, learnt in enumerate((["x", "y"], ["x", "y", "z"], None), start=1):
        films = None if learnt is None else training_films_parquet(learnt)
        folder(uris[seed - 1], seed, training_films=films)
    ensemble(uris, str(tmp_path / "all"))
    assert films_known_to(str(tmp_path / "all")) == {"x", "y", "z", *DIGESTS}


def test_disagreement_is_the_spread_of_the_members_probabilities(members, tmp_path):
    uris, models = members
    ensemble(uris, str(tmp_path / "both"))
    both = load_model(str(tmp_path / "both"))
    probabilities = [
        model.spec.probabilities(Scorer(model).logits(squares(model)))[:, 1] for model in models
    ]
    found = Scorer(both).scores(squares(both)).disagreement_N
    np.testing.assert_allclose(found, np.std(probabilities, axis=0), rtol=1e-3, atol=1e-5)
    assert Scorer(models[0]).scores(squares(models[0])).disagreement_N is None


def test_a_films_distance_is_the_root_mean_square_of_the_members(members, tmp_path):
    uris, models = members
    ensemble(uris, str(tmp_path / "both"))
    both = Scorer(load_model(str(tmp_path / "both")))

    def unlike(scorer: Scorer) -> np.ndarray:
        return scorer.out_of_distribution(scorer.scores(squares(scorer.model)).features_NF)

    each = [unlike(Scorer(model)) for model in models]
    np.testing.assert_allclose(unlike(both), np.sqrt(np.mean(np.square(each), axis=0)), rtol=1e-3)


def test_in_bfloat16_its_scores_move_a_little(members, tmp_path):
    both = ensemble(members[0], str(tmp_path / "both"))
    found = Scorer(both, precision="bfloat16").scores(squares(both))
    np.testing.assert_allclose(found.logits_NK, Scorer(both).logits(squares(both)), atol=0.05)
    assert found.disagreement_N.dtype == np.float32


def test_members_of_two_sizes_share_one_decoded_film(tmp_path):
    uris = [str(tmp_path / name) for name in "ab"]
    small, large = folder(uris[0], 1, size=32), folder(uris[1], 2, size=64)
    both = Scorer(ensemble(uris, str(tmp_path / "both")))
    assert both.model.spec.preprocessing.image_size == 64
    logits_NK = both.logits(squares(both.model))
    alone = [m.spec.calibrated(Scorer(m).logits(squares(m))) for m in (small, large)]
    # The small member sees a film that was downscaled twice, which is not quite the same.
    np.testing.assert_allclose(logits_NK, sum(alone) / 2, atol=0.05)
    large_NHW = squares(both.model)
    twice_NHW = np.stack([small.spec.preprocessing.square(film) for film in large_NHW])
    x_N1HW = torch.from_numpy(large_NHW)[:, None] / 255
    for found, expected_NHW in zip(
        both.model.network().member_inputs(x_N1HW), (twice_NHW, large_NHW), strict=True
    ):
        # Pillow rounds to whole grey values, twice.
        np.testing.assert_allclose(
            found[:, 0].numpy() * 0.3 + 0.4, expected_NHW / 255, atol=1.01 / 255
        )


def test_an_ensemble_is_calibrated_on_its_members_validation_logits(members, tmp_path, caplog):
    uris, _ = members
    both = ensemble(uris, str(tmp_path / "both"))
    assert both.spec.operating_point.images == len(FILMS)
    assert both.spec.class_biases is None  # no member has any
    assert "20 validation films are of the positive class and 20 are not" in caplog.text
    assert 0 <= both.spec.metrics["auc"] <= 1
    assert both.spec.metrics["loss"] <= both.spec.metrics["loss_before_temperature"]
    assert read_history(str(tmp_path / "both")) is None
    assert [item["data"]["fingerprint"] for item in both.spec.training["members"]] == ["f", "f"]


def test_models_that_do_not_fit_together_are_refused(members, tmp_path):
    uris, _ = members
    output = str(tmp_path / "out")
    ensemble(uris, str(tmp_path / "both"))
    folder(str(tmp_path / "other-data"), 3, fingerprint="g")
    folder(str(tmp_path / "other-classes"), 3, class_names=("Healthy", "Lung_Opacity"))
    folder(str(tmp_path / "other-order"), 3, class_names=("Lung_Opacity", "Normal"))
    folder(str(tmp_path / "other-positive"), 3, positive_class="Normal")
    cropping = Preprocessing(image_size=32, crop_borders=True)
    folder(str(tmp_path / "cropping"), 3, preprocessing=cropping)
    save_model(str(tmp_path / "older"), replace_spec(tiny_model(5), training={
        "settings": {"seed": 7}, "data": {"fingerprint": "f"}}))  # fmt: skip
    for more, said in (
        ([uris[0]], "two or more"),
        ([*uris, uris[0]], "given twice"),
        ([uris[0], str(tmp_path / "both")], "an ensemble itself"),
        ([uris[0], str(tmp_path / "other-data")], "other films, or another split"),
        ([uris[0], str(tmp_path / "other-classes")], "give models of the same classes"),
        ([uris[0], str(tmp_path / "other-order")], "their order .* train both with the same"),
        (
            [uris[0], str(tmp_path / "other-positive")],
            "other-positive: decides about Normal, .*a about Lung_Opacity; .* --positive-class",
        ),
        ([uris[0], str(tmp_path / "cropping")], "crops borders, so they do not see the same"),
        ([uris[0], str(tmp_path / "older")], "no validation.parquet"),
        ([uris[0], str(tmp_path / "nowhere")], "not a model folder"),
    ):
        with pytest.raises(UserError, match=said):
            ensemble(more, output)
    with pytest.raises(UserError, match="holds a finished model"):
        ensemble(uris, uris[0])
