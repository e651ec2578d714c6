"""A small model with fresh weights, for tests in which its scores do not matter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from lungopacity.models import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    build_network,
    save_model,
    weights_of,
)
from lungopacity.models.compiled import compile_network, to_bytes
from lungopacity.models.distribution import TrainingDistribution
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from lungopacity.storage.parquet import parquet_bytes

_COMPILED: dict[str, bytes] = {}
"""The compiled network by model id: most tests have the same."""


def tiny_model(seed: int = 0, image_size: int = 32, **changes: object) -> TrainedModel:
    torch.manual_seed(seed)
    facts = {
        "architecture": "classical-cnn",
        "architecture_settings": {},
        "class_names": ("Normal", "Lung_Opacity"),
        "positive_class": "Lung_Opacity",
        "preprocessing": Preprocessing(image_size=image_size),
        "operating_point": OperatingPoint(0.5),
        **changes,
    }
    spec = ModelSpec(**facts)
    network = build_network(spec.architecture, len(spec.class_names), spec.architecture_settings)
    return TrainedModel(spec, weights_of(network))


def with_distribution(model: TrainedModel, films_NHW: np.ndarray) -> TrainedModel:
    """The model as if it had been trained on these films."""
    features_NF = Scorer(model).scores(films_NHW).features_NF
    fitted = TrainingDistribution.of(features_NF[::2], features_NF[1::2])
    return replace(model, distribution=fitted.to_bytes())


def history_parquet() -> bytes:
    names = ("train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
    return parquet_bytes(pa.table({"epoch": [1, 2], **{name: [0.6, 0.4] for name in names}}))


def compiled(model: TrainedModel) -> TrainedModel:
    key = model.model_id
    if key not in _COMPILED:
        _COMPILED[key] = to_bytes([compile_network(model)])
    return replace(model, compiled=_COMPILED[key])


def write_tiny_model(
    uri: str, training_films: bytes | None = None, *, is_compiled: bool = False, **changes: object
) -> TrainedModel:
    """is_compiled: as training leaves it. Compiling takes a second, but processes that score with
    it do without torch, whose import costs each of them three."""
    model = tiny_model(**changes)
    if is_compiled:
        model = compiled(model)
    save_model(uri, model, history_parquet(), training_films_parquet=training_films)
    return model
