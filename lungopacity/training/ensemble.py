"""Makes one model folder of several: their logits are averaged, and calibrated again on the
validation films that they share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import safetensors.torch

from lungopacity.errors import UserError
from lungopacity.models import (
    ENSEMBLE,
    ModelSpec,
    TrainedModel,
    find_training_films,
    load_model,
    refuse_model,
    save_model,
    validation_films,
)
from lungopacity.models.compiled import of_bytes, to_bytes
from lungopacity.models.distribution import JointDistribution, TrainingDistribution
from lungopacity.models.ensemble_settings import EnsembleMember, EnsembleSettings, member_prefix
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.radiograph import Preprocessing
from lungopacity.results.schema import logit_columns
from lungopacity.runtime import versions
from lungopacity.training.calibrate import calibrate, warn_of_few


def ensemble(models: Sequence[str], output: str) -> TrainedModel:
    """Writes an ensemble of the model folders at the URIs `models` to `output`.

    No film is read: each folder holds its model's logits of the validation films, decoded at the
    model's own image size. In use, a member smaller than the largest gets the largest one's input,
    downscaled, so its logits differ slightly from those that the ensemble is calibrated on. Raises
    `UserError` where there are fewer than two models, their classes, positive class, border
    cropping or training data differ, one is an ensemble itself or given twice, or the output holds
    a model.
    """
    refuse_model(output)
    if len(models) < 2:
        raise UserError("--model: give two or more model folders")
    trained = [load_model(uri) for uri in models]
    _check(models, trained)
    members = EnsembleSettings(tuple(_member(model) for model in trained))
    logits = [_calibrated_logits(uri, model) for uri, model in zip(models, trained, strict=True)]
    for uri, frame in zip(models, logits, strict=True):
        if not frame.index.equals(logits[0].index):
            raise UserError(f"{uri}: was validated on other films than {models[0]}")
    mean_VK = np.stack([frame.to_numpy(np.float32) for frame in logits]).mean(axis=0)
    first = trained[0].spec
    class_V = logits[0].index.get_level_values("label")
    labels_V = np.array([first.class_names.index(name) for name in class_V])
    shifted = any(model.spec.class_biases is not None for model in trained)
    found = calibrate(mean_VK, labels_V, first.positive_index, shifted=shifted)
    warn_of_few(labels_V, first.positive_index)
    spec = ModelSpec(
        architecture=ENSEMBLE,
        architecture_settings=asdict(members),
        class_names=first.class_names,
        positive_class=first.positive_class,
        preprocessing=Preprocessing(
            max(item.image_size for item in members.members),
            mean=0.0,
            std=1.0,
            crop_borders=first.preprocessing.crop_borders,
        ),
        operating_point=found.operating_point,
        operating_points=found.operating_points,
        label_map=first.label_map,
        temperature=found.temperature,
        class_biases=found.class_biases,
        metrics=found.metrics,
        training={
            "settings": {"seed": first.training["settings"]["seed"]},
            "data": first.training["data"],
            "members": [dict(model.spec.training) for model in trained],
            "versions": versions(),
        },
        synthetic=any(model.spec.synthetic for model in trained),
    )
    model = TrainedModel(spec, _weights(trained), _distribution(trained), _compiled(trained))
    digests = logits[0].index.get_level_values("content_sha256")
    save_model(
        output,
        model,
        validation_parquet=validation_parquet(
            list(digests),
            list(class_V),
            mean_VK,
            logit_columns(first.class_names),
            _views(models),
        ),
        training_films_parquet=_training_films(models),
    )
    return model


def _check(uris: Sequence[str], trained: Sequence[TrainedModel]) -> None:
    first = trained[0].spec
    ids = [model.model_id for model in trained]
    if len(set(ids)) < len(ids):
        raise UserError("--model: one model is given twice")
    for uri, model in zip(uris, trained, strict=True):
        spec = model.spec
        if spec.architecture == ENSEMBLE:
            raise UserError(f"{uri}: is an ensemble itself; give its members")
        if spec.class_names != first.class_names:
            same = set(spec.class_names) == set(first.class_names)
            raise UserError(
                f"{uri}: has the classes {', '.join(spec.class_names)}, and {uris[0]} "
                f"{', '.join(first.class_names)}; "
                + (
                    "their order is that of the scores: train both with the same --classes"
                    if same
                    else "give models of the same classes"
                )
            )
        if spec.positive_class != first.positive_class:
            raise UserError(
                f"{uri}: decides about {spec.positive_class}, and {uris[0]} about "
                f"{first.positive_class}; train both with the same --positive-class"
            )
        if spec.preprocessing.crop_borders != first.preprocessing.crop_borders:
            raise UserError(
                f"{uri}: only one of it and {uris[0]} crops borders, so they do not see the same "
                "pixels; train both with the same --set preprocessing.crop_borders"
            )
        if spec.training["data"]["fingerprint"] != first.training["data"]["fingerprint"]:
            raise UserError(
                f"{uri}: learnt from other films, or another split of them, than {uris[0]}; one "
                "may have learnt from films that the other was validated on; train both on the "
                "same labels file"
            )


def _member(model: TrainedModel) -> EnsembleMember:
    import torch

    spec, size = model.spec, model.spec.preprocessing.image_size
    with torch.no_grad():
        features_BF = model.network().describe(torch.zeros(1, 1, size, size))  # type: ignore[operator]
    return EnsembleMember(
        model_id=model.model_id,
        architecture=spec.architecture,
        architecture_settings=dict(spec.architecture_settings),
        image_size=size,
        mean=spec.preprocessing.mean,
        std=spec.preprocessing.std,
        temperature=spec.temperature,
        class_biases=spec.class_biases,
        features=features_BF.shape[1],
    )


def _calibrated_logits(uri: str, model: TrainedModel) -> pd.DataFrame:
    """Calibrated logits of the validation films, a column per class in their order, sorted by the
    index (content_sha256, label)."""
    films, logits_VK = validation_films(uri)
    index = pd.MultiIndex.from_frame(films[["content_sha256", "label"]])
    return pd.DataFrame(model.spec.calibrated(logits_VK), index).sort_index()


def _views(uris: Sequence[str]) -> list[str | None]:
    """The views of the validation films, in the order of `_calibrated_logits`: of the first member
    that records any, for older folders do not."""
    for uri in uris:
        films = validation_films(uri)[0].sort_values(["content_sha256", "label"])
        views = films["view_position"].to_list()
        if any(views):
            break
    return views


def members_of(model: TrainedModel) -> list[TrainedModel]:
    """The models of an ensemble, with everything that determines its scores."""
    tensors = safetensors.torch.load(model.weights)
    settings = EnsembleSettings(**model.spec.architecture_settings)
    found = []
    for number, member in enumerate(settings.members):
        prefix = member_prefix(number)
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        spec = replace(
            model.spec,
            architecture=member.architecture,
            architecture_settings=member.architecture_settings,
            preprocessing=replace(
                model.spec.preprocessing,
                image_size=member.image_size,
                mean=member.mean,
                std=member.std,
            ),
            temperature=member.temperature,
            class_biases=None if member.class_biases is None else tuple(member.class_biases),
        )
        found.append(TrainedModel(spec, safetensors.torch.save(own)))
    return found


def _training_films(models: Sequence[str]) -> bytes | None:
    """`training_films.parquet` of all members. They trained on the same films, but a member's first
    weights may have learnt from others. None where no member's folder has the file."""
    kept = [find_training_films(uri) for uri in models]
    tables = [pd.read_parquet(io.BytesIO(data)) for data in kept if data is not None]
    if not tables:
        return None
    return training_films_parquet(list(dict.fromkeys(pd.concat(tables)["content_sha256"])))


def _weights(trained: Sequence[TrainedModel]) -> bytes:
    tensors = {
        f"{member_prefix(number)}{name}": tensor
        for number, model in enumerate(trained)
        for name, tensor in safetensors.torch.load(model.weights).items()
    }
    return safetensors.torch.save(tensors)


def _distribution(trained: Sequence[TrainedModel]) -> bytes | None:
    """The members' distributions; None where a member's folder has none."""
    parts = [model.training_distribution() for model in trained]
    kept = tuple(part for part in parts if isinstance(part, TrainingDistribution))
    return JointDistribution(kept).to_bytes() if len(kept) == len(parts) else None


def _compiled(trained: Sequence[TrainedModel]) -> bytes | None:
    """The members' compiled networks; None unless all are compiled, because the others would have
    to wait for the one in torch."""
    kept = [model.compiled for model in trained if model.compiled is not None]
    if len(kept) < len(trained):
        return None
    return to_bytes([network for data in kept for network in of_bytes(data)])
