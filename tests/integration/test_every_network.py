"""Each network trains an epoch; all of them in one ensemble screen an archive in one pass."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import safetensors.torch

import lungopacity
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.dataset.manifest import assign_splits, read_labels
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.models import NETWORK_NAMES, load_model, weights_of
from lungopacity.models.networks import build_network
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import open_store
from lungopacity.training.fit import fit
from lungopacity.training.settings import recipe

CLASSES = ("Normal", "Lung_Opacity")
SMALL = {
    "alexnet": 64,
    "cov-net": 48,
    "densenet-121": 32,
    "resnet-50": 32,
}
"""Sides of the inputs, in pixels; the others take 40."""


@pytest.fixture(scope="module")
def archive(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("films"))
    write_phantom_archive(open_store(folder), PhantomSettings(images=60, image_size=96))
    return folder


def pixels(archive: str, side: int) -> LabelledPixels:
    labels = f"{archive}/labels.csv"
    frame = assign_splits(read_labels(labels), labels, seed=0)
    return load_pixels(
        [f"{archive}/archive"], frame, CLASSES, ReadSettings(Preprocessing(image_size=side)), labels
    )


@pytest.mark.timeout(400)
def test_each_network_trains_and_all_screen_together(archive: str, tmp_path) -> None:
    cached: dict[int, LabelledPixels] = {}
    members = []
    for name in NETWORK_NAMES:
        side = SMALL.get(name, 40)
        if side not in cached:
            cached[side] = pixels(archive, side)
        settings = recipe(name)
        settings = replace(
            settings,
            epochs=1,
            batch_size=16,
            preprocessing=replace(settings.preprocessing, image_size=side),
        )
        result = fit(cached[side], settings, str(tmp_path / name))
        (row,) = result.history
        assert row["train_loss"] > 0, name
        members.append(str(tmp_path / name))
    assert load_model(members[-1]).spec.training["weights"]["licence"] == "Apache-2.0"

    both = lungopacity.ensemble(members, str(tmp_path / "all"))
    assert both.spec.preprocessing.image_size == 64
    report = lungopacity.evaluate(
        str(tmp_path / "all"), [f"{archive}/archive"], f"{archive}/labels.csv",
        str(tmp_path / "report"), split="all",
    )  # fmt: skip
    assert report.images == 60
    run = lungopacity.screen(f"{archive}/archive", str(tmp_path / "all"), str(tmp_path / "results"))
    assert (run.images, run.ok) == (60, 60)
    screened = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT coalesce(member, image) AS image, p_Lung_Opacity, ensemble_disagreement "
        "FROM predictions",
    ).to_pandas()
    evaluated = pd.read_parquet(tmp_path / "report" / "predictions.parquet")
    merged = screened.merge(evaluated, on="image", suffixes=("", "_evaluated"))
    assert len(merged) == 60
    assert (merged["p_Lung_Opacity"] - merged["p_Lung_Opacity_evaluated"]).abs().max() < 1e-4
    assert merged["ensemble_disagreement"].between(0, 0.5).all()
    assert merged["ensemble_disagreement"].nunique() > 1


def test_what_is_frozen_stays_and_the_head_learns_from_a_file_of_weights(
    archive: str, tmp_path
) -> None:
    before = build_network("cov-net", 3)
    (tmp_path / "first.safetensors").write_bytes(weights_of(before))
    settings = replace(
        recipe("cov-net"),
        weights=str(tmp_path / "first.safetensors"),
        epochs=1,
        frozen_epochs=1,
        preprocessing=Preprocessing(image_size=32),
    )
    model = fit(pixels(archive, 32), settings, str(tmp_path / "model")).model
    after = safetensors.torch.load(model.weights)
    for name, tensor in before.state_dict().items():
        if not name.startswith("head."):
            assert after[name].equal(tensor), name
    assert after["head.weight"].shape == (2, 256)
    assert model.spec.training["weights"]["source"].endswith("first.safetensors")
