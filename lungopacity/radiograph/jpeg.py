"""JPEG: the size that a codestream declares, and the fast way to grey pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage

_JPEG_2000 = b"\xff\x4f\xff\x51"
# Start of frame of each process (ITU-T T.81 table B.1) and of JPEG-LS (T.87): not DHT, JPG, DAC.
_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 codestream declares; None for others."""
    if frame[:4] == _JPEG_2000:
        # SIZ (T.800 A.5.1): extent and offset of the image on the reference grid.
        x, y, x0, y0 = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
        return y - y0, x - x0
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _START_OF_FRAME:
            rows = int.from_bytes(frame[at + 5 : at + 7], "big")
            return rows, int.from_bytes(frame[at + 7 : at + 9], "big")
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def decode_grey_jpeg(data: bytes, at_least: int | None) -> npt.NDArray[np.uint8] | None:
    """Pixels of a JPEG of one component, or None where libjpeg-turbo alone cannot give them.

    `at_least`: the longer side that is enough; the DCT is then scaled. Returns (height, width).
    Raises `ImageError` (`truncated`, `corrupt_image`) where pixels were lost: libjpeg itself only
    warns, and fills the rest with grey.
    """
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours.upper() not in ("GRAY", "GREY", "GRAYSCALE"):
            return None
        scale = 1.0 if at_least is None else min(1.0, at_least / max(height, width))
        smallest = (max(1, int(height * scale)), max(1, int(width * scale)))
        pixels = simplejpeg.decode_jpeg(data, "GRAY", min_height=smallest[0], min_width=smallest[1])
    except ValueError as error:
        told = str(error).lower()
        if "premature end" in told:
            raise ImageError(
                ErrorCode.TRUNCATED, Stage.DECODE, "the JPEG ends before its pixels do"
            ) from error
        if "corrupt jpeg data" in told and "extraneous" not in told:
            raise ImageError(
                ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the JPEG's coded pixels are damaged"
            ) from error
        # Arithmetic coding, 12 bits, or bytes that do no harm: Pillow's own build may know better.
        return None
    return np.ascontiguousarray(pixels[..., 0])
