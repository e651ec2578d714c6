"""Stored DICOM values to grey, by the pipeline of PS3.4 N.2 in its order.

Pixel padding ▶ Modality LUT or rescale ▶ VOI LUT or window ▶ Presentation LUT (MONOCHROME1) ▶
aspect ratio. The LUTs are pydicom's own functions. Values of up to 16 bits go through them once
each, as a table, instead of once a pixel: the same numbers, several times as fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.grey import stretch_to_uint8

_MAX_TABLE_BITS = 16


def grey_of(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.uint8]:
    """Grey pixels of MONOCHROME2 polarity.

    stored: (height, width) integers as decoded. Returns the same shape, uint8. Raises `ImageError`.
    """
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the header does not say the polarity"
        )
    stored = _without_unused_bits(stored, dataset)
    padding = _padding_of(stored, dataset)
    used = stored if padding is None or padding.all() else stored[~padding]
    grey = _windowed(stored, used, dataset)
    if photometric == "MONOCHROME1":
        # It shows its smallest value as white (PS3.3 C.7.6.3.1.2). A DX object says so once more,
        # as Presentation LUT Shape INVERSE (C.8.11.3): that is the same inversion, not a second.
        grey = 255 - grey
    if padding is not None:
        grey[padding] = 0
    return grey


def _without_unused_bits(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[Any]:
    """Overlays of old objects lie in the bits above Bits Stored, and are not image."""
    kept = int(dataset.BitsStored)
    spare = 8 * stored.dtype.itemsize - kept
    if not 0 < kept <= 32 or stored.dtype.kind not in "iu" or spare <= 0:
        return stored
    low, high = _stored_range(dataset)
    if stored.min() >= low and stored.max() <= high:
        return stored
    # Shifted up and down again, the sign bit of signed values is carried along.
    shifted: npt.NDArray[Any] = np.right_shift(np.left_shift(stored, spare), spare)
    return shifted


def _stored_range(dataset: Any) -> tuple[int, int]:
    bits = int(dataset.BitsStored)
    if int(dataset.get("PixelRepresentation") or 0):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _padding_of(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.bool_] | None:
    """Pixels outside the image proper (PS3.3 C.7.5.1.1.2): no part of any range, shown black."""
    first = dataset.get("PixelPaddingValue")
    if not isinstance(first, int):
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((first, last if isinstance(last, int) else first))
    padding: npt.NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def _windowed(
    stored: npt.NDArray[Any], used: npt.NDArray[Any], dataset: Any
) -> npt.NDArray[np.uint8]:
    window = _usable_window(dataset)
    low, high = _stored_range(dataset)
    if stored.dtype.kind not in "iu" or high - low >= 2**_MAX_TABLE_BITS:
        values = _looked_up(stored, dataset, window)
        ends = _display_range(_looked_up(used, dataset, window), dataset, window)
        return stretch_to_uint8(values, *ends)
    table = _looked_up(np.arange(low, high + 1).astype(stored.dtype), dataset, window)
    present = np.zeros(len(table), np.bool_)
    present[used.ravel().astype(np.int32) - low if low else used.ravel()] = True
    greys = stretch_to_uint8(table, *_display_range(table[present], dataset, window))
    grey: npt.NDArray[np.uint8] = greys[stored.astype(np.int32) - low if low else stored]
    return grey


def _usable_window(dataset: Any) -> bool:
    """Whether VOI LUT or window apply. Scanners write a width of 0 where they mean none."""
    if "VOILUTSequence" in dataset:
        return True
    width, centre = (_first(dataset.get(name)) for name in ("WindowWidth", "WindowCenter"))
    if width is None or centre is None:
        return False
    exact = str(dataset.get("VOILUTFunction") or "LINEAR") != "LINEAR"
    return width > 0 if exact else width >= 1


def _first(value: Any) -> float | None:
    try:
        first = value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value
        return None if first is None else float(first)
    except (TypeError, ValueError, IndexError):
        return None


def _looked_up(values: npt.NDArray[Any], dataset: Any, window: bool) -> npt.NDArray[np.float64]:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    modality = apply_modality_lut(values, dataset)
    seen = apply_voi_lut(modality, dataset, index=0) if window else modality
    return np.asarray(seen, dtype=np.float64)


def _display_range(
    used: npt.NDArray[np.float64], dataset: Any, window: bool
) -> tuple[float, float]:
    """What becomes black and white.

    A VOI LUT: the range of its entries. A window: the range that it maps onto, which is that of the
    modality values' type; taking what occurs instead would undo a window that clips nothing.
    Neither: all values of 8 bits, as other formats have it; of more bits, what occurs in the image,
    for detectors seldom use all of them.
    """
    if window and "VOILUTSequence" in dataset:
        entries = np.asarray(dataset.VOILUTSequence[0].LUTData)
        if entries.dtype.kind in "iu" and entries.size > 1:
            return float(entries.min()), float(entries.max())
    elif "ModalityLUTSequence" not in dataset and (window or int(dataset.BitsStored) <= 8):
        slope = _first(dataset.get("RescaleSlope"))
        intercept = _first(dataset.get("RescaleIntercept")) or 0.0
        ends = [
            end * (1.0 if slope is None else slope) + intercept for end in _stored_range(dataset)
        ]
        return min(ends), max(ends)
    return float(used.min()), float(used.max())


def pixel_aspect_of(dataset: Any) -> float:
    """Height over width of one pixel: 1 where the header is silent or says nonsense."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        value = dataset.get(keyword)
        try:
            ratio = float(value[0]) / float(value[1])
        except (TypeError, ValueError, IndexError, ZeroDivisionError):
            continue
        if 0.1 < ratio < 10:
            return ratio
    return 1.0


def with_square_pixels(grey: npt.NDArray[np.uint8], aspect: float) -> npt.NDArray[np.uint8]:
    """Shrink the side along which pixels lie closer, so that they become square.

    `aspect`: height over width of a pixel. Within 1 % of 1 nothing is done.
    """
    from PIL import Image

    if abs(aspect - 1) < 0.01:
        return grey
    height, width = grey.shape
    if aspect > 1:
        width = max(1, round(width / aspect))
    else:
        height = max(1, round(height * aspect))
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
