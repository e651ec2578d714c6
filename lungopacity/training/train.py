"""Labelled radiographs to a model folder: manifest ▶ split ▶ pixels ▶ fit. The whole journey reads
here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.dataset.manifest import (
    assign_splits,
    check_contents,
    check_patients,
    read_labels,
    select_classes,
)
from lungopacity.dataset.pixels import load_pixels
from lungopacity.errors import UserError
from lungopacity.models import check_network, is_model
from lungopacity.progress import Progress
from lungopacity.radiograph import Preprocessing
from lungopacity.runtime import ray_session, resolve_gpu
from lungopacity.training.fit import TrainingResult, fit
from lungopacity.training.settings import TrainingSettings

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
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    workers: int = 1,
    use_gpu: bool | None = None,
    seed: int = 0,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
) -> TrainingResult:
    """Fit a network and write a model folder to `output`.

    images: URIs of archives. `labels`: see `read_labels`. `positive_class`: None takes Lung_Opacity
    where it is one of the classes, else the last of them. None elsewhere takes the recipe's
    default. `accept`, `reject_quality`: as in screening; what is rejected is left out. The same
    call goes on where a crashed one stopped. Raises `UserError`.
    """
    if len(set(classes)) < 2:
        raise UserError("--classes: give two or more different names, as Normal,Lung_Opacity")
    accepted, rejecting = rules_from(accept, reject_quality)
    check_network(model)
    if is_model(output):
        raise UserError(f"{output}: holds a finished model; choose another --output, or remove it")
    given = {"image_size": image_size, "epochs": epochs, "batch_size": batch_size}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if positive_class is None:
        positive_class = "Lung_Opacity" if "Lung_Opacity" in classes else classes[-1]
    frame = select_classes(read_labels(labels), classes, labels)
    frame = assign_splits(frame, labels, seed)
    check_patients(frame, labels)
    # The test split is for `evaluate`. What training never loads, it cannot look at.
    frame = frame[frame["split"] != "test"].reset_index(drop=True)
    with ray_session():
        try:
            size = chosen.pop("image_size", None)
            preprocessing = Preprocessing() if size is None else Preprocessing(image_size=size)
            settings = TrainingSettings(
                model=model,
                positive_class=positive_class,
                preprocessing=preprocessing,
                workers=workers,
                use_gpu=resolve_gpu(use_gpu),
                seed=seed,
                **chosen,
            )
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-', 1)}") from error
        rules = ReadSettings(preprocessing, accept=accepted, reject_quality=rejecting)
        data = load_pixels(images, frame, classes, rules, labels)
        check_contents(data.images, labels)
        with Progress("Training", total=settings.epochs, unit="epochs") as progress:

            def show(row: dict[str, Any]) -> None:
                progress.advance(
                    row["epoch"] - progress.done,
                    note=f"validation loss {row['validation_loss']:.4f}, "
                    f"accuracy {row['validation_accuracy']:.4f}, "
                    f"{row['images_per_s']:.0f} images/s",
                )

            return fit(
                data,
                settings,
                output,
                provenance={
                    "images": list(images),
                    "labels": labels,
                    "accept": sorted(accepted),
                    "reject_quality": sorted(rejecting),
                },
                on_epoch=show,
            )
