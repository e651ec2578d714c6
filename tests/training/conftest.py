"""A small Ray, and films whose class a network learns in seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import ray

from lungopacity.radiograph import Preprocessing
from lungopacity.training import TrainingSettings

SMALL_RUN = TrainingSettings(
    model_settings={"channels": (8, 16, 32), "convolutions": (1, 1, 1)},
    preprocessing=Preprocessing(image_size=32),
    epochs=6,
    batch_size=16,
    learning_rate=4e-3,
)


@dataclass(frozen=True)
class BlobFilms:
    """Noise; a positive film has a bright blob somewhere."""

    pixels_NHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    split_N: npt.NDArray[np.str_]
    class_names: tuple[str, ...] = ("Normal", "Lung_Opacity")
    synthetic: bool = True

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.pixels_NHW.tobytes()).hexdigest()


def make_blob_films(train: int = 96, validation: int = 41, size: int = 32, seed: int = 0) -> BlobFilms:
    rng = np.random.default_rng(seed)
    films = train + validation + 10
    labels_N = np.arange(films) % 2
    pixels_NHW = rng.normal(80, 20, (films, size, size))
    rows, columns = np.mgrid[:size, :size]
    for film in np.flatnonzero(labels_N):
        y, x = rng.uniform(0.3 * size, 0.7 * size, 2)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * (0.12 * size) ** 2))
        pixels_NHW[film] += 110 * blob
    split_N = np.array(["train"] * train + ["validation"] * validation + ["test"] * 10)
    return BlobFilms(
        pixels_NHW.clip(0, 255).astype(np.uint8), labels_N.astype(np.int64), split_N
    )


@pytest.fixture(scope="session")
def blob_films() -> BlobFilms:
    return make_blob_films()


@pytest.fixture(scope="session")
def small_ray() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
