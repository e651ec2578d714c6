"""Films with more than one sample per pixel, of more than 8 bits. Pillow keeps only the upper 8
bits of 16, in which a 12-bit film is almost black."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph import tiff
from lungopacity.radiograph.colour import deep_luminance
from lungopacity.radiograph.jpeg2000 import bits_of_jpeg_2000
from lungopacity.radiograph.png import decode_png

Samples = npt.NDArray[np.uint16]

_PNG_DEEP = {b"\x10\x02", b"\x10\x04", b"\x10\x06"}
"""Bit depth and colour type in IHDR: 16 bits, and RGB, grey with alpha or RGB with alpha."""
_PNG_DEEP_GREY = b"\x10\x00"
"""16 bits of grey. If one value is transparent (tRNS), Pillow does not apply that."""
_ROWS_AT_ONCE = 64


def is_deep(image: Any, data: bytes, kind: str) -> bool:
    """Whether `image`, which Pillow opened, must be decoded by `decode_deep`."""
    if kind == "png":
        form = data[24:26] if data[12:16] == b"IHDR" else b""
        return form in _PNG_DEEP or (form == _PNG_DEEP_GREY and "transparency" in image.info)
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA"):
        return False
    if kind == "tiff":
        bits = image.tag_v2.get(tiff.BITS, ())
        return bool(bits) and set(bits) == {16}
    return kind == "jpeg2000" and bits_of_jpeg_2000(data) > 8


def decode_deep(image: Any, data: bytes, kind: str) -> tuple[Samples, Samples | None]:
    """Grey values on black, (height, width), and the colours, (height, width, 3), if there are any.

    `image`: as Pillow opened it, at the wanted page. Raises `ImageError`.
    """
    samples = _samples(image, data, kind)
    has_alpha = samples.shape[2] % 2 == 0
    if kind == "tiff" and has_alpha:
        has_alpha = image.tag_v2.get(tiff.EXTRA_SAMPLES, (0,))[0] == tiff.NOT_MULTIPLIED
    # Only JPEG 2000 may have fewer than 16 bits.
    opaque = (1 << bits_of_jpeg_2000(data)) - 1 if kind == "jpeg2000" else 65535
    rgb = samples[..., :3] if samples.shape[2] > 2 else None
    grey = np.empty(samples.shape[:2], np.uint16)
    # A few rows at a time, so that they and their 32-bit copies stay in the cache.
    for top in range(0, len(samples), _ROWS_AT_ONCE):
        some = slice(top, top + _ROWS_AT_ONCE)
        luma = samples[some, :, 0] if rgb is None else deep_luminance(rgb[some])
        if has_alpha:
            luma = (luma * samples[some, :, -1].astype(np.uint32) + opaque // 2) // opaque
        grey[some] = luma
    return grey, rgb


def _samples(image: Any, data: bytes, kind: str) -> Samples:
    import imagecodecs

    if kind == "png":
        return decode_png(data)
    try:
        if kind == "tiff":
            samples: Samples = imagecodecs.tiff_decode(data, index=image.tell())
            if image.tag_v2.get(tiff.PLANES) == tiff.ONE_A_SAMPLE:
                samples = np.moveaxis(samples, 0, -1)
        else:
            samples = imagecodecs.jpeg2k_decode(data)
    except (imagecodecs.TiffError, imagecodecs.Jpeg2kError, NotImplementedError) as error:
        raise _uncommon() from error
    if samples.ndim != 3 or samples.dtype != np.uint16:
        raise _uncommon()
    return samples


def _uncommon() -> ImageError:
    return ImageError(
        ErrorCode.UNSUPPORTED,
        Stage.DECODE,
        "colours of more than 8 bits in an uncommon coding; convert it to grey",
    )
