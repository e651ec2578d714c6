"""Converts colour to grey, and measures how much colour there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_CLEARLY = 32
"""Spread of red, green and blue, of 255, above which an eye sees colour. JPEG noise has less."""
_CLEARLY_WITHOUT_TINT = 24
"""Spread that must remain once the tint is subtracted, which takes some of a real colour along."""
_MOST_OF_A_TINT = 0.5
"""Largest spread of the mean colour, as a share of its brightest channel, that is a tint. A film's
blue base, or the yellow of its age, has 0.2."""

_LEAST_SLOPE = 0.1
"""Least rise of a channel with the luma in a tint. The weakest channel of a film's tint has 0.6."""

_LUMA = (19595, 38470, 7471)
"""Weights of red, green and blue in 65,536ths, rounded as Pillow rounds them."""


def luminance(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """ITU-R BT.601 luma, the same as Pillow's own conversion and JPEG's Y.

    rgb: (height, width, 3). Returns (height, width).
    """
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))


def deep_luminance(rgb: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """`luminance` for 16 bits, which Pillow cannot hold in colour.

    rgb: (height, width, 3). Returns (height, width).
    """
    luma = np.full(rgb.shape[:2], 1 << 15, np.uint32)
    for channel, weight in enumerate(_LUMA):
        luma += rgb[..., channel] * np.uint32(weight)
    return (luma >> 16).astype(np.uint16)


def coloured_fraction(rgb: npt.NDArray[Any]) -> float:
    """Share of pixels whose red, green and blue differ clearly, 0 … 1, judged on a coarse grid.

    One tint of the whole image, as of a scanned film with a blue base, is not counted as colour:
    red, green and blue are then linear functions of the luma, and only pixels off these lines
    count.

    rgb: (height, width, 3) uint8.
    """
    step = max(1, min(rgb.shape[:2]) // 128)
    grid = rgb[::step, ::step].reshape(-1, 3).T.astype(np.float32)
    clearly = _spread(grid) > _CLEARLY
    mean = grid.mean(axis=1, keepdims=True)
    if not clearly.any() or np.ptp(mean) > _MOST_OF_A_TINT * mean.max():
        return float(clearly.mean())
    grid -= mean
    luma = np.asarray(_LUMA, np.float32) / 65536 @ grid
    slopes = grid @ luma / max(float(luma @ luma), 1.0)
    if luma.std() > 1 and slopes.min() < _LEAST_SLOPE:
        # Channels of a tint rise together. Those of luma and chroma that a header calls RGB do not.
        return float(clearly.mean())
    beside_tint = _spread(grid - np.outer(slopes, luma))
    return float((clearly & (beside_tint > _CLEARLY_WITHOUT_TINT)).mean())


def _spread(channels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Largest minus smallest of three arrays of one length, by element. Comparing pairs takes a
    third of the time of `np.ptp`."""
    red, green, blue = channels
    spread: npt.NDArray[Any] = np.maximum(np.maximum(red, green), blue)
    spread -= np.minimum(np.minimum(red, green), blue)
    return spread
