"""Colour to grey, and how much colour there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_CLEARLY = 32
"""Of 255: spread of red, green and blue above which an eye sees a colour; noise of JPEG is less."""


_LUMA = (19595, 38470, 7471)
"""Weights of red, green and blue in 65,536ths, rounded as Pillow rounds them."""


def luminance(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """ITU-R BT.601 luma, as Pillow's own conversion and JPEG's Y have it.

    rgb: (height, width, 3). Returns (height, width).
    """
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))


def deep_luminance(rgb: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """`luminance` of 16 bits, for which Pillow has no colours.

    rgb: (height, width, 3). Returns (height, width).
    """
    luma = np.full(rgb.shape[:2], 1 << 15, np.uint32)
    for channel, weight in enumerate(_LUMA):
        luma += rgb[..., channel] * np.uint32(weight)
    return (luma >> 16).astype(np.uint16)


def coloured_fraction(rgb: npt.NDArray[Any]) -> float:
    """Share of pixels whose red, green and blue differ clearly, 0 … 1; judged on a coarse grid.

    rgb: (height, width, 3) uint8.
    """
    step = max(1, min(rgb.shape[:2]) // 128)
    grid = rgb[::step, ::step].astype(np.int16)
    return float((grid.max(axis=2) - grid.min(axis=2) > _CLEARLY).mean())
