"""Labelled radiographs to a model folder: manifest ▶ split ▶ pixels ▶ fit. The whole journey reads
here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.dataset.classes import class_names_of, classes_of_labels
from lungopacity.dataset.manifest import (
    assign_splits,
    check_contents,
    check_patients,
    read_labels,
    select_classes,
)
from lungopacity.dataset.pixels import load_pixels
from lungopacity.errors import UserError
from lungopacity.models import is_model, network_card
from lungopacity.progress import Progress
from lungopacity.runtime import ray_session, resolve_gpu
from lungopacity.training.fit import TrainingResult, fit
from lungopacity.training.settings import TrainingSettings, recipe, with_words

log = logging.getLogger(__name__)

DEFAULT_CLASSES = ("Normal", "Lung_Opacity")


def train(
    images: Sequence[str],
    labels: str,
    output: str,
    *,
    model: str = "classical-cnn",
    classes: Sequence[str] = DEFAULT_CLASSES,
    positive_class: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, str] | None = None,
    workers: int = 1,
    use_gpu: bool | None = None,
    seed: int = 0,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
) -> TrainingResult:
    """Fit a network and write a model folder to `output`.

    images: URIs of archives. `labels`: see `read_labels`. `model`: see `network_card`. `classes`:
    see `classes_of_labels`. `positive_class`: None takes Lung_Opacity where it is one of the
    classes, else the last of them. `weights`: see `first_weights`. `settings`: more of the recipe
    by name, see `with_words`. None elsewhere takes the recipe's default. `accept`,
    `reject_quality`: as in screening; what is rejected is left out. The same call goes on where a
    crashed one stopped. Raises `UserError`.
    """
    accepted, rejecting = rules_from(accept, reject_quality)
    if is_model(output):
        raise UserError(f"{output}: holds a finished model; choose another --output, or remove it")
    frame = read_labels(labels)
    label_map = classes_of_labels(classes, list(frame["label"].unique()))
    names = class_names_of(label_map)
    if positive_class is None:
        positive_class = "Lung_Opacity" if "Lung_Opacity" in names else names[-1]
    given = {"weights": weights, "epochs": epochs, "batch_size": batch_size}
    try:
        chosen = _chosen(
            recipe(model),
            image_size,
            {
                **{name: value for name, value in given.items() if value is not None},
                "positive_class": positive_class,
                "workers": workers,
                "seed": seed,
            },
            settings or {},
        )
    except ValueError as error:
        raise UserError(_option(str(error))) from error
    frame = select_classes(frame, label_map, labels)
    frame = assign_splits(frame, labels, seed)
    check_patients(frame, labels)
    # The test split is for `evaluate`. What training never loads, it cannot look at.
    frame = frame[frame["split"] != "test"].reset_index(drop=True)
    with ray_session():
        chosen = replace(chosen, use_gpu=resolve_gpu(use_gpu))
        rules = ReadSettings(chosen.preprocessing, accept=accepted, reject_quality=rejecting)
        data = load_pixels(images, frame, names, rules, labels)
        check_contents(data.images, labels)
        with Progress("Training", total=chosen.epochs, unit="epochs") as progress:

            def show(row: dict[str, Any]) -> None:
                progress.advance(
                    row["epoch"] - progress.done,
                    note=f"validation loss {row['validation_loss']:.4f}, "
                    f"accuracy {row['validation_accuracy']:.4f}, "
                    f"{row['images_per_s']:.0f} images/s",
                )

            return fit(
                data,
                chosen,
                output,
                label_map=label_map,
                provenance={
                    "images": list(images),
                    "labels": labels,
                    "accept": sorted(accepted),
                    "reject_quality": sorted(rejecting),
                },
                on_epoch=show,
            )


def _option(wrong: str) -> str:
    """What is said of a setting, as of the option that gives it."""
    name = wrong.split(maxsplit=1)[0]
    if name in ("image_size", "epochs", "batch_size", "workers", "seed"):
        return f"--{name.replace('_', '-')}{wrong.removeprefix(name)}"
    return f"--{wrong}" if name == "set:" else f"--set {wrong}"


def _chosen(
    settings: TrainingSettings,
    image_size: int | None,
    options: Mapping[str, Any],
    words: Mapping[str, str],
) -> TrainingSettings:
    """The recipe with what the user wants of it. Raises `ValueError`."""
    settings = replace(settings, **options)
    if image_size is not None:
        settings = replace(
            settings, preprocessing=replace(settings.preprocessing, image_size=image_size)
        )
    settings = with_words(settings, words)
    if network_card(settings.model).fixed_size:
        size = {"image_size": settings.preprocessing.image_size}
        settings = replace(settings, model_settings={**size, **settings.model_settings})
    return settings
