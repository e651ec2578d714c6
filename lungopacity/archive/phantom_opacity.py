"""Lung opacities of the synthetic films: fluid or tissue that replaces air in the lung.

An opacity is a map of the cm of air that became soft tissue, which never exceeds the air that is
there. Kinds and looks follow Hansell et al., Fleischner Society glossary, Radiology 2008;246:697.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

OpacityKind = Literal[
    "consolidation", "nodule", "bronchopneumonia", "pleural_effusion", "ground_glass"
]
OPACITY_KINDS: tuple[OpacityKind, ...] = get_args(OpacityKind)

_BOX_THRESHOLD = 0.3
"""A box encloses the pixels above this share of the opacity's greatest thickness."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the film: left, top, width and height."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class LungField:
    """One lung as the beam sees it. Maps are (size, size) float32."""

    x: Array
    """cm, towards the film's right edge."""
    y: Array
    """cm, downwards."""
    air: Array
    """Path through aerated lung, in cm."""
    side: int
    """-1 for the lung on the film's left, which is the patient's right; else 1."""
    base_y: float
    """y of the diaphragm's dome, in cm."""


def add_opacities(
    rng: np.random.Generator, kind: OpacityKind, lungs: list[LungField]
) -> tuple[Array, tuple[Box, ...]]:
    """Draw opacities of one kind.

    lungs: both. Returns the path in cm that changed from air to soft tissue, (size, size) float32,
    and one box per opacity, in the order in which they were drawn.
    """
    total = np.zeros_like(lungs[0].air)
    boxes: list[Box] = []
    air = lungs[0].air + lungs[1].air
    for fluid in _DRAW[kind](rng, lungs):
        boxes.append(_box_of(fluid))
        total += fluid
    return np.minimum(total, 0.97 * air), tuple(boxes)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Gaussian noise with a standard deviation of about 0.8, smooth over size / cells pixels."""
    from PIL import Image

    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    resized = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32)


def soft_step(distance: Array, softness: float) -> Array:
    """0 … 1 as `distance` goes from negative to positive, over about `softness`, float32."""
    return _as_fluid(1 / (1 + np.exp(np.clip(-distance / softness, -30, 30))))


def _consolidation(rng: np.random.Generator, lungs: list[LungField]) -> list[Array]:
    """A filled part of a lobe: dense, ragged, often with a straight edge at a fissure."""
    lung = _one(rng, lungs)
    x, y = _place(rng, lung)
    wide, tall = rng.uniform(2.4, 5.0), rng.uniform(2.4, 6.0)
    dx, dy = (lung.x - x) / wide, (lung.y - y) / tall
    ragged = 0.35 * smooth_noise(rng, lung.x.shape[0], 14)
    filled = soft_step(1 - np.sqrt(dx * dx + dy * dy) + ragged, 0.12)
    if rng.random() < 0.5:
        fissure = rng.choice([-1.0, 1.0]) * (lung.y - y + 0.15 * lung.side * (lung.x - x))
        filled *= soft_step(fissure + 0.5 * tall, 0.1)
    depth = rng.uniform(0.35, 0.85)
    return [_as_fluid(depth * filled * lung.air)]


def _nodule(rng: np.random.Generator, lungs: list[LungField]) -> list[Array]:
    """One to three balls. A nodule of more than 3 cm is a mass."""
    found = []
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        lung = _one(rng, lungs)
        x, y = _place(rng, lung)
        radius = float(np.exp(rng.uniform(np.log(1.0), np.log(3.2))))
        r2 = ((lung.x - x) ** 2 + (lung.y - y) ** 2) / radius**2
        ball = 2 * radius * np.sqrt(np.maximum(1 - r2, 0))
        found.append(_as_fluid(np.minimum(ball, lung.air)))
    return found


def _bronchopneumonia(rng: np.random.Generator, lungs: list[LungField]) -> list[Array]:
    """Patches without sharp edges, in the lower parts of both lungs."""
    strength = rng.uniform(0.25, 0.7)
    found = []
    for lung in lungs:
        for _ in range(int(rng.integers(2, 5))):
            x, y = _place(rng, lung, low=True)
            radius = rng.uniform(1.2, 2.8)
            r2 = ((lung.x - x) ** 2 + (lung.y - y) ** 2) / radius**2
            mottled = np.clip(0.8 + 0.5 * smooth_noise(rng, lung.x.shape[0], 30), 0, 1.5)
            found.append(_as_fluid(strength * np.exp(-r2) * mottled * lung.air))
    return found


def _pleural_effusion(rng: np.random.Generator, lungs: list[LungField]) -> list[Array]:
    """Fluid at the base of one or both lungs, whose upper edge rises towards the chest wall."""
    chosen = lungs if rng.random() < 0.25 else [_one(rng, lungs)]
    found = []
    for lung in chosen:
        outward = np.clip((lung.side * lung.x - 2.0) / 10.0, 0, 1.2)
        height = rng.uniform(1.5, 7.0)
        meniscus = lung.base_y + 1.2 - height - (1.0 + 0.35 * height) * outward**3
        below = soft_step(lung.y - meniscus, 0.35)
        found.append(_as_fluid(rng.uniform(0.6, 0.9) * below * lung.air))
    return found


def _ground_glass(rng: np.random.Generator, lungs: list[LungField]) -> list[Array]:
    """A haze over much of a lung through which the vessels still show."""
    chosen = lungs if rng.random() < 0.6 else [_one(rng, lungs)]
    strength = rng.uniform(0.2, 0.5)
    found = []
    for lung in chosen:
        x, y = _place(rng, lung)
        far = ((lung.x - x) / 4.5) ** 2 + ((lung.y - y) / 6.0) ** 2
        uneven = np.clip(0.8 + 0.5 * smooth_noise(rng, lung.x.shape[0], 10), 0, 1.5)
        found.append(_as_fluid(strength * np.exp(-0.5 * far) * uneven * lung.air))
    return found


_DRAW: dict[OpacityKind, Callable[[np.random.Generator, list[LungField]], list[Array]]] = {
    "consolidation": _consolidation,
    "nodule": _nodule,
    "bronchopneumonia": _bronchopneumonia,
    "pleural_effusion": _pleural_effusion,
    "ground_glass": _ground_glass,
}


def _one(rng: np.random.Generator, lungs: list[LungField]) -> LungField:
    return lungs[int(rng.integers(len(lungs)))]


def _place(rng: np.random.Generator, lung: LungField, low: bool = False) -> tuple[float, float]:
    """x and y, in cm, of a random point well inside the aerated lung."""
    inside = lung.air > 0.45 * lung.air.max()
    if low:
        inside &= lung.y > 0
    spots = np.flatnonzero(inside)
    spot = spots[int(rng.integers(len(spots)))]
    return float(lung.x.flat[spot]), float(lung.y.flat[spot])


def _as_fluid(values: npt.NDArray[np.floating]) -> Array:
    return np.asarray(values, dtype=np.float32)


def _box_of(fluid: Array) -> Box:
    seen = fluid > _BOX_THRESHOLD * fluid.max()
    rows = np.flatnonzero(seen.any(axis=1))
    columns = np.flatnonzero(seen.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return Box(left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
