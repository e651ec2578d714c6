"""What a training run is asked to do, checked as far as possible without reading a film."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.dataset.classes import class_names_of, classes_of_labels, positive_class_of
from lungopacity.dataset.manifest import (
    assign_splits,
    check_classes,
    check_contents,
    check_patients,
    left_out,
    read_labels,
    select_classes,
)
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.errors import ErrorCode, UserError
from lungopacity.models import network_card, settings_of_network
from lungopacity.runtime import own_memory_bytes
from lungopacity.training.catalogue import parameters
from lungopacity.training.settings import TrainingSettings, recipe, with_words
from lungopacity.words import counted

log = logging.getLogger(__name__)

DEFAULT_CLASSES = ("Normal", "Lung_Opacity")
_OF_NETWORK = "model_settings."
_BYTES_OF_WEIGHT = 4


@dataclass(frozen=True)
class TrainingTask:
    """Films, classes and settings of one training run, or of the trials of a search."""

    images: Sequence[str]
    labels: str
    classes: Sequence[str]
    """As the user gave them."""
    words: Mapping[str, str]
    """Settings that the user gave by name; `settings` includes them."""
    frame: pd.DataFrame
    """Labels of the train and validation splits."""
    label_map: dict[str, str]
    left_out: dict[str, dict[str, int]]
    """Images whose label belongs to no class; see `manifest.left_out`."""
    settings: TrainingSettings
    accepted: frozenset[ErrorCode]
    rejecting: frozenset[str]

    def load(self) -> LabelledPixels:
        """Reads and decodes the films. Needs a running Ray. Raises `UserError`."""
        rules = ReadSettings(
            self.settings.preprocessing, accept=self.accepted, reject_quality=self.rejecting
        )
        names = class_names_of(self.label_map)
        data = load_pixels(self.images, self.frame, names, rules, self.labels)
        check_contents(data.images, self.labels)
        return data

    def provenance(self) -> dict[str, Any]:
        """Where the films came from, for the model folder."""
        return {
            "images": list(self.images),
            "labels": self.labels,
            "accept": sorted(self.accepted),
            "reject_quality": sorted(self.rejecting),
        }


def training_task(
    images: Sequence[str],
    labels: str,
    *,
    model: str,
    classes: Sequence[str],
    positive_class: str | None,
    image_size: int | None,
    options: Mapping[str, Any],
    words: Mapping[str, str],
    accept: Sequence[str],
    reject_quality: Sequence[str] | None,
) -> TrainingTask:
    """Checks the arguments. options: settings by name, None for the recipe's value. words: further
    settings, see `with_words`. The others are as in `train`. Raises `UserError`."""
    accepted, rejecting = rules_from(accept, reject_quality)
    frame = read_labels(labels)
    label_map = classes_of_labels(classes, list(frame["label"].unique()))
    names = class_names_of(label_map)
    given = {name: value for name, value in options.items() if value is not None}
    given["positive_class"] = positive_class_of(names, positive_class)
    try:
        chosen = _chosen(recipe(model), image_size, given, words)
    except ValueError as error:
        raise UserError(option_of(str(error))) from error
    positive_class_of(names, chosen.positive_class)  # --set may have named another
    _check_network(chosen, len(names), words)
    others = left_out(frame, label_map)
    frame = select_classes(frame, label_map, labels)
    frame = assign_splits(frame, labels)
    check_classes(frame, names, labels)
    check_patients(frame, labels)
    # The test split is for `evaluate`. Training cannot use what it never loads.
    frame = frame[frame["split"] != "test"].reset_index(drop=True)
    return TrainingTask(
        images, labels, classes, words, frame, label_map, others, chosen, accepted, rejecting
    )


def option_of(wrong: str) -> str:
    """An error message about a setting, reworded to name the option that sets it."""
    name, rest = wrong.removeprefix("preprocessing.").split(maxsplit=1)
    if name in ("image_size", "epochs", "batch_size", "workers", "seed"):
        return f"--{name.replace('_', '-')} {rest}"
    return f"--{wrong}" if name == "set:" else f"--set {wrong}"


def warn_of_no_effect(task: TrainingTask) -> None:
    """Warns of settings that do nothing beside the others. They are not refused, because the best
    trial of a search may have drawn them."""
    settings = task.settings
    erase = "augmentation.erase_fraction"
    if erase in task.words and not settings.augmentation.erase_probability:
        log.warning(
            "--set %s=%s has no effect while augmentation.erase_probability is 0",
            erase,
            task.words[erase],
        )
    # The first epoch counts as a lower loss, and nothing is left to stop after the last.
    if settings.patience and settings.patience >= settings.epochs - 1:
        log.warning(
            "--set patience=%d has no effect: training ends after %s anyway",
            settings.patience,
            counted(settings.epochs, "epoch"),
        )


def _chosen(
    settings: TrainingSettings,
    image_size: int | None,
    options: Mapping[str, Any],
    words: Mapping[str, str],
) -> TrainingSettings:
    """The recipe with the user's changes. Raises `ValueError`."""
    if "use_gpu" in words:
        raise ValueError("set: use_gpu is chosen by --use-gpu and --no-gpu")
    size = {} if image_size is None else {"preprocessing": {"image_size": image_size}}
    settings = with_words(settings, words, {**options, **size})
    if network_card(settings.model).fixed_size:
        side = {"image_size": settings.preprocessing.image_size}
        settings = replace(settings, model_settings={**side, **settings.model_settings})
    return settings


def _check_network(settings: TrainingSettings, classes: int, words: Mapping[str, str]) -> None:
    """Raises `UserError` where the network cannot be built with these settings, or cannot take
    films of this size."""
    size = settings.preprocessing.image_size
    given = [f"{name}={word}" for name, word in words.items() if name.startswith(_OF_NETWORK)]
    of_size = f"--image-size {size}"
    of_network = f"--set {' '.join(given)}" if given else of_size
    for option, tried in ((of_network, None), (of_size, size)):
        try:
            found = settings_of_network(settings.model, classes, settings.model_settings, tried)
        except ValueError as error:
            raise UserError(
                f"{option}: {error}; see `lungopacity models {settings.model}`"
            ) from error
    if given and found is not None:  # regnets cannot be counted, nor made larger
        weights = parameters(settings.model, classes, settings.model_settings)
        needed, has = _BYTES_OF_WEIGHT * weights, own_memory_bytes()
        if needed > has:
            raise UserError(
                f"{of_network}: the network's {weights:,} weights need {needed / 2**30:,.0f} GiB "
                f"of memory, and this machine has {has / 2**30:,.0f}; give smaller numbers"
            )
