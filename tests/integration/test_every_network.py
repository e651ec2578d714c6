"""Each network trains an epoch; all in one ensemble screen an archive in one pass."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import lungopacity
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.dataset.manifest import assign_splits, read_labels
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.models import (
    NETWORK_NAMES,
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    films_known_to,
    load_model,
    save_model,
    weights_of,
)
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.models.networks import build_network
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import open_store
from lungopacity.training.fit import first_tensors, fit
from lungopacity.training.loop import Films, Worker, _train_epoch, _validation_logits
from lungopacity.training.settings import TrainingSettings, recipe

CLASSES = ("Normal", "Lung_Opacity")
SIDE = 64
"""Of the inputs, in pixels: alexnet takes no less."""


@pytest.fixture(scope="module")
def archive(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("films"))
    write_phantom_archive(open_store(folder), PhantomSettings(images=40, image_size=96))
    return folder


@pytest.fixture(scope="module")
def films(archive: str) -> LabelledPixels:
    labels = f"{archive}/labels.csv"
    frame = assign_splits(read_labels(labels), labels, seed=0)
    rules = ReadSettings(Preprocessing(image_size=SIDE))
    return load_pixels([f"{archive}/archive"], frame, CLASSES, rules, labels)


@pytest.fixture
def untrained(films: LabelledPixels, tmp_path: Path) -> list[str]:
    """Model folders of all networks, with the weights that they begin with."""
    kept = films.split_N == "validation"
    of = films.images[kept]
    for name in NETWORK_NAMES:
        torch.manual_seed(0)
        model = model_of(name, build_network(name, 2, short(name).model_settings), films)
        logits_VK = Scorer(model).logits(films.pixels_NHW[kept])
        said = validation_parquet(
            of["content_sha256"].to_list(), of["label"].to_list(), logits_VK, CLASSES
        )
        save_model(
            str(tmp_path / name),
            model,
            validation_parquet=said,
            training_films_parquet=training_films_parquet([name]),
        )
    return [str(tmp_path / name) for name in NETWORK_NAMES]


def model_of(name: str, network: torch.nn.Module, films: LabelledPixels) -> TrainedModel:
    spec = ModelSpec(
        architecture=name,
        architecture_settings=asdict(network.settings),
        class_names=CLASSES,
        positive_class="Lung_Opacity",
        preprocessing=short(name).preprocessing,
        operating_point=OperatingPoint(0.5),
        training={"settings": {"seed": 0}, "data": {"fingerprint": films.fingerprint}},
    )
    return TrainedModel(spec, weights_of(network))


def short(name: str, **changes: object) -> TrainingSettings:
    settings = recipe(name)
    pixels = replace(settings.preprocessing, image_size=SIDE)
    return replace(settings, epochs=1, batch_size=16, preprocessing=pixels, **changes)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_each_network_learns_for_an_epoch_and_scores(films, name) -> None:
    settings = replace(short(name), batch_size=4)
    shown = Films(
        films.pixels_NHW,
        films.labels_N,
        np.flatnonzero(films.split_N == "train")[:8],
        np.flatnonzero(films.split_N == "validation"),
        classes=2,
    )
    worker = Worker(settings, shown, rank=0, workers=1, device=torch.device("cpu"))
    torch.manual_seed(0)
    network = build_network(name, 2, settings.model_settings)
    before = {key: part.clone() for key, part in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    row = _train_epoch(worker, network, optimizer, 1, None)
    assert 0 < row["train_loss"] < 20
    learnt = network.state_dict()
    assert all(not learnt[key].equal(before[key]) for key, _ in network.named_parameters())
    scorer = Scorer(model_of(name, network, films))
    logits_VK = scorer.logits(films.pixels_NHW[shown.validation])
    expected_VK = _validation_logits(worker, network)
    np.testing.assert_allclose(logits_VK, expected_VK.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("only_trained")
def test_ray_trains_the_head_on_imagenets_weights_from_a_file(films, tmp_path) -> None:
    name, classes = "efficientnet-lite0", (*CLASSES, "TB")
    before = build_network(name, len(classes))
    published = first_tensors(before, short(name))
    assert published is not None
    spec = ModelSpec(
        architecture=name,
        architecture_settings=asdict(before.settings),
        class_names=classes,
        positive_class="Lung_Opacity",
        preprocessing=Preprocessing(SIDE),
        operating_point=OperatingPoint(0.5),
        training={"weights": published.facts},
    )
    digests = films.images["content_sha256"]
    tested = digests[films.split_N == "test"].iloc[0]
    save_model(
        str(tmp_path / "first"),
        TrainedModel(spec, weights_of(before)),
        training_films_parquet=training_films_parquet([tested, "of other labels"]),
    )
    weights = str(tmp_path / "first" / "model.safetensors")
    output = str(tmp_path / "model")
    result = fit(films, short(name, weights=weights, frozen_epochs=1), output)
    (row,) = result.history
    assert row["train_loss"] > 0
    model = result.model
    assert load_model(output).model_id == model.model_id
    after = safetensors.torch.load(model.weights)
    for part, tensor in before.state_dict().items():
        if not part.startswith("head."):
            assert after[part].equal(tensor), part
    assert len(after["head.weight"]) == len(CLASSES)
    assert model.spec.training["weights"]["source"].endswith("first/model.safetensors")
    assert model.spec.training["weights"]["licence"] == "Apache-2.0"
    # What the first model knew is no test of the second.
    own = set(digests[films.split_N != "test"])
    assert films_known_to(output) == own | {tested, "of other labels"}


def test_all_networks_screen_an_archive_together(archive, untrained, tmp_path) -> None:
    together = lungopacity.ensemble(untrained, str(tmp_path / "all"))
    assert together.spec.training["data"]["fingerprint"]
    assert films_known_to(str(tmp_path / "all")) >= set(NETWORK_NAMES)
    run = lungopacity.screen(f"{archive}/archive", str(tmp_path / "all"), str(tmp_path / "results"))
    assert (run.images, run.ok) == (40, 40)
    rows = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT p_Lung_Opacity p, logit_Normal a, logit_Lung_Opacity b, ensemble_disagreement d "
        "FROM predictions",
    ).to_pandas()
    normal, opacity = together.spec.class_biases or (0, 0)
    log_odds = (rows["b"] - rows["a"]) / together.spec.temperature + opacity - normal
    assert (rows["p"] - 1 / (1 + np.exp(-log_odds))).abs().max() < 1e-5
    assert rows["d"].between(0, 0.5).all()
    assert rows["d"].nunique() > 1
