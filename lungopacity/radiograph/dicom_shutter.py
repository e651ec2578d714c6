"""The display shutter of a DICOM header (PS3.3 C.7.6.11). Viewers black out what lies outside it,
such as the white that detectors give outside the collimator."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

_EDGES = ("LeftVertical", "RightVertical", "UpperHorizontal", "LowerHorizontal")


def outside_shutter(dataset: Any, shape: tuple[int, int]) -> Mask | None:
    """The pixels that the shutter hides, of this shape; None if it hides none.

    Of several shapes, each hides what lies outside it. A shape whose numbers are missing or
    nonsense counts as absent, and so does a shutter that would hide every pixel.
    """
    value = dataset.get("ShutterShape")
    if not value:
        return None
    names = [value] if isinstance(value, str) else value
    inside = np.ones(shape, np.bool_)
    for name in names:
        draw = _SHAPES.get(str(name).strip().upper())
        if draw is not None:
            with contextlib.suppress(TypeError, ValueError):
                inside &= draw(dataset, shape)
    return None if inside.all() or not inside.any() else ~inside


# Rows and columns count from 1.


def _rectangle(dataset: Any, shape: tuple[int, int]) -> Mask:
    edges = (int(dataset.get(f"Shutter{edge}Edge")) for edge in _EDGES)
    left, right, top, bottom = (max(0, edge) for edge in edges)
    inside = np.zeros(shape, np.bool_)
    inside[max(0, top - 1) : bottom, max(0, left - 1) : right] = True
    return inside


def _circle(dataset: Any, shape: tuple[int, int]) -> Mask:
    row, column = (int(place) for place in dataset.get("CenterOfCircularShutter"))
    radius = int(dataset.get("RadiusOfCircularShutter"))
    down, across = np.ogrid[1 - row : shape[0] + 1 - row, 1 - column : shape[1] + 1 - column]
    inside: Mask = down**2 + across**2 <= radius**2
    return inside


def _polygon(dataset: Any, shape: tuple[int, int]) -> Mask:
    from PIL import Image, ImageDraw

    places = [int(place) - 1 for place in dataset.get("VerticesOfThePolygonalShutter")]
    corners = list(zip(places[1::2], places[::2], strict=True))
    if len(corners) < 3:
        raise ValueError("a polygon of fewer than three corners")
    drawn = Image.new("1", shape[::-1])
    ImageDraw.Draw(drawn).polygon(corners, fill=1)
    return np.array(drawn)


_SHAPES = {"RECTANGULAR": _rectangle, "CIRCULAR": _circle, "POLYGONAL": _polygon}
