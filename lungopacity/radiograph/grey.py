"""Grey values of any depth to 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def stretch_to_uint8(
    values: npt.NDArray[Any], low: float | None = None, high: float | None = None
) -> npt.NDArray[np.uint8]:
    """Map `low … high` (default: the image's own minimum and maximum) to 0 … 255, rounded.

    `values`: any shape. Values outside are clipped. A constant image becomes 0. Raises `ValueError`
    for values that are no numbers.
    """
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    if not np.isfinite([low, high]).all():
        raise ValueError("grey values that are no numbers")
    if not high > low:
        return np.zeros(values.shape, np.uint8)
    if values.dtype == np.uint16:
        # Each of 65,536 values once, instead of each pixel: the same, several times as fast.
        table: npt.NDArray[np.uint8] = stretch_to_uint8(np.arange(65536.0), low, high)[values]
        return table
    scaled = (values - low) * (255.0 / (high - low))
    grey: npt.NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return grey
