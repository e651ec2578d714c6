"""Films whose class a small network learns in seconds, and the settings of such a run."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd

from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.radiograph import Preprocessing
from lungopacity.training import AugmentationSettings, TrainingSettings

SMALL_RUN = TrainingSettings(
    model_settings={"channels": (8, 16, 32), "convolutions": (1, 1, 1)},
    preprocessing=Preprocessing(image_size=32),
    epochs=6,
    batch_size=16,
    learning_rate=4e-3,
)

EVERYTHING = replace(
    SMALL_RUN,
    augmentation=AugmentationSettings(erase_probability=0.3),
    class_balance="sampling",
    mixup_alpha=0.1,
    ema_decay=0.8,
    frozen_epochs=1,
)
"""The same with everything else that a run can do."""

CLASS_NAMES = ("Normal", "Lung_Opacity")


def blob_films(train: int = 96, validation: int = 41, test: int = 10) -> LabelledPixels:
    """Noise of 32 x 32 pixels; a positive film, every other one, has a bright blob somewhere."""
    rng = np.random.default_rng(0)
    films, size = train + validation + test, 32
    labels_N = np.arange(films) % 2
    pixels_NHW = rng.normal(80, 20, (films, size, size))
    rows, columns = np.mgrid[:size, :size]
    for film in np.flatnonzero(labels_N):
        y, x = rng.uniform(0.3 * size, 0.7 * size, 2)
        distance = (rows - y) ** 2 + (columns - x) ** 2
        pixels_NHW[film] += 110 * np.exp(-distance / (2 * (0.12 * size) ** 2))
    split_N = np.array(["train"] * train + ["validation"] * validation + ["test"] * test)
    return _labelled(pixels_NHW.clip(0, 255).astype(np.uint8), labels_N.astype(np.int64), split_N)


def chosen(films: LabelledPixels, kept: np.ndarray) -> LabelledPixels:
    """The films of these indices."""
    return _labelled(films.pixels_NHW[kept], films.labels_N[kept], films.split_N[kept])


def _labelled(pixels_NHW: np.ndarray, labels_N: np.ndarray, split_N: np.ndarray) -> LabelledPixels:
    images = pd.DataFrame(
        {
            "image": [f"{number}.png" for number in range(len(labels_N))],
            "content_sha256": [hashlib.sha256(film.tobytes()).hexdigest() for film in pixels_NHW],
            "label": [CLASS_NAMES[label] for label in labels_N],
            "split": split_N,
            "patient_id": None,
            "view_position": ["PA" if number % 2 else None for number in range(len(labels_N))],
            "header_view": None,
        }
    )
    return LabelledPixels(
        pixels_NHW=pixels_NHW,
        labels_N=labels_N,
        split_N=split_N,
        class_names=CLASS_NAMES,
        images=images,
        unreadable=pd.DataFrame(columns=["image", "split", "error_code", "error_message"]),
        rejected=pd.DataFrame(columns=["image", "split", "error_code", "error_message"]),
        synthetic=True,
    )
