"""How well class activation maps agree with readers' boxes.

The pointing game (Zhang et al. 2018, arXiv:1608.00507): whether the highest point of the map lies
in a box. The energy-based pointing game (Wang et al. 2020, arXiv:1910.01279): the share of the map
that lies in boxes. Both are compared with chance: the share of the film that its boxes cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ratio_metrics
from lungopacity.evaluation.metrics import Metric

TOLERANCE = 15 / 224
"""Distance by which a point may miss a box, as a fraction of the film's shorter side. The papers
allow 15 pixels of 224."""
_NOT_BLACK = 8
"""Pixels with a lower grey value count as blacked out or collimated."""
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Pointing:
    """How the map of one film agrees with its boxes."""

    hit: bool
    """Whether the highest point lies in a box. A map of zeros has no such point, and misses."""
    hit_with_tolerance: bool
    energy: float
    """Share of the map's sum that lies in boxes, 0 … 1; 0 for a map of zeros."""
    chance: float
    """Share of the pixels shown that lie in boxes: how often a random point hits."""
    chance_with_tolerance: float
    chance_not_black: float
    """`chance` among the pixels that are not black, such as the lungs of films cut to the lung
    fields."""


def peak_of(activation: npt.NDArray[np.float32]) -> tuple[float, float] | None:
    """x and y of the highest point, in pixels from the film's left and top; None for a map of
    zeros.

    activation: (height, width), 0 … 1. Interpolation repeats the outermost values up to the edges.
    So if several pixels are the highest, the one nearest to the film's centre is taken.
    """
    highest = float(activation.max(initial=0.0))
    if highest <= 0:
        return None
    rows, columns = np.nonzero(activation >= highest - _ROUNDING)
    x, y = columns + 0.5, rows + 0.5
    height, width = activation.shape
    nearest = int(np.hypot(x - width / 2, y - height / 2).argmin())
    return float(x[nearest]), float(y[nearest])


def point(
    activation: npt.NDArray[np.float32],
    film: npt.NDArray[np.uint8],
    boxes: npt.NDArray[np.float64],
    tolerance: float,
) -> Pointing:
    """Compare a map with the film's boxes.

    activation, film: (height, width), the part that the network is shown. boxes: (m, 4) x, y, width
    and height in pixels of that part, at least one box. tolerance: in the same pixels.
    """
    assert len(boxes), "a film without boxes has nothing to point at"
    distance = _distance_to_boxes(film.shape, boxes)
    inside = distance <= 0
    near = distance <= tolerance
    peak = peak_of(activation)
    place = None if peak is None else (int(peak[1]), int(peak[0]))
    total = float(activation.sum(dtype=np.float64))
    seen = film >= _NOT_BLACK
    return Pointing(
        hit=place is not None and bool(inside[place]),
        hit_with_tolerance=place is not None and bool(near[place]),
        energy=float(activation[inside].sum(dtype=np.float64)) / total if total else 0.0,
        chance=float(inside.mean()),
        chance_with_tolerance=float(near.mean()),
        chance_not_black=float(inside[seen].mean()) if seen.any() else 0.0,
    )


def pointing_metrics(
    films: Sequence[Pointing], resampling: Resampling, group: str = "all"
) -> list[Metric]:
    """The metrics of films with boxes, with intervals as in `measure`; empty without films.

    resampling: the films' patients.
    """
    if not films:
        return []
    shares = {
        "pointing_game": [film.hit for film in films],
        "pointing_game_chance": [film.chance for film in films],
        "pointing_game_chance_not_black": [film.chance_not_black for film in films],
        "pointing_game_with_tolerance": [film.hit_with_tolerance for film in films],
        "pointing_game_with_tolerance_chance": [film.chance_with_tolerance for film in films],
        "energy_in_boxes": [film.energy for film in films],
    }
    all_N = np.ones(len(films), np.bool_)
    return ratio_metrics(
        {(name, None): (np.array(each), all_N) for name, each in shares.items()}, resampling, group
    )


def _distance_to_boxes(
    shape: tuple[int, ...], boxes: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Distance in pixels from the centre of each pixel to the nearest box; 0 inside a box."""
    rows, columns = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1])[None, :] + 0.5
    nearest = np.full(shape, np.inf)
    for x, y, width, height in boxes:
        beside = np.maximum(np.maximum(x - columns, columns - (x + width)), 0)
        above = np.maximum(np.maximum(y - rows, rows - (y + height)), 0)
        nearest = np.minimum(nearest, np.hypot(beside, above))
    return nearest
