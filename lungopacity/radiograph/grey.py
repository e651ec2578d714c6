"""Maps grey values of any depth to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage

_FEW = 0.02
"""Share of the pixels, at either end of the values, that may be text, a marker or dead pixels."""
_PLACES_AT_ONCE = 1 << 16


def stretch_to_uint8(
    values: npt.NDArray[Any], low: float | None = None, high: float | None = None
) -> npt.NDArray[np.uint8]:
    """Map `low … high` (default: `own_range`) to 0 … 255, rounded.

    `values`: any shape. Values outside the range are clipped. A constant image becomes 0. Raises
    `ImageError` (`corrupt_image`) for values that are not finite.
    """
    if low is None or high is None:
        low, high = _own_range_of(values)
    if not np.isfinite([low, high]).all():
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "grey values that are not finite numbers"
        )
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    if values.dtype == np.uint16:
        # Mapping each of 65,536 values once, and not each pixel, is several times as fast.
        return look_up(stretch_to_uint8(np.arange(65536.0), low, high), values)
    scaled = (values - low) * (255.0 / (high - low))
    grey: npt.NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return grey


def look_up(table_V: npt.NDArray[np.uint8], places: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """`table_V[places]` in a third of the time: calls `take` on few enough places at once that the
    64-bit copy it makes of them stays in the cache.

    places: integers within the table, any shape. Returns the same shape.
    """
    flat = places.reshape(-1)
    found = np.empty(flat.shape, table_V.dtype)
    for first in range(0, len(flat), _PLACES_AT_ONCE):
        some = slice(first, first + _PLACES_AT_ONCE)
        found[some] = table_V.take(flat[some])
    return found.reshape(places.shape)


def own_range(
    values_V: npt.NDArray[np.floating], counts_V: npt.NDArray[np.integer]
) -> tuple[float, float]:
    """The values to show as black and as white if the image does not say: the range of all values
    that occur, without those far from the rest. Otherwise a 12-bit film with a line of text in 16
    bits would show the text and nothing else.

    values_V, counts_V: the values that occur, ascending, and how often. A value is far if it lies
    further from the range of the middle 96 % of the pixels than that range is wide.
    """
    share_V = np.cumsum(counts_V) / counts_V.sum()
    first, last = (float(values_V[np.searchsorted(share_V, share)]) for share in (_FEW, 1 - _FEW))
    low, high, width = float(values_V[0]), float(values_V[-1]), last - first
    if width > 0:
        low = first if low < first - width else low
        high = last if high > last + width else high
    return low, high


def _own_range_of(values: npt.NDArray[Any]) -> tuple[float, float]:
    if values.dtype == np.uint16:
        counts_V = np.bincount(values.ravel())
        values_V = np.flatnonzero(counts_V)
        return own_range(values_V.astype(np.float64), counts_V[values_V])
    if not np.isfinite(values).all():
        return np.nan, np.nan
    found_V, counts_V = np.unique(values, return_counts=True)
    return own_range(found_V.astype(np.float64), counts_V)
