"""PNG: the fast way to the pixels of a plain grey film, which most of an archive's PNGs are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage

# Chunks (PNG, third edition, table 5.3) that change no pixel and name nothing that a row keeps. A
# file with any other, such as a palette, transparency, text or EXIF, is Pillow's to read.
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs"}
_PLAIN_CHUNKS |= {b"tIME", b"hIST", b"iCCP"}
_GREY = b"\x08\x00"
"""In IHDR: 8 bits, colour type grey."""


@dataclass(frozen=True)
class PngHeader:
    """What a plain grey PNG declares."""

    rows: int
    columns: int


def read_plain_header(data: bytes) -> PngHeader | None:
    """The header of an 8-bit grey PNG of plain chunks; None where it is another, or cut."""
    if data[12:16] != b"IHDR" or data[24:26] != _GREY:
        return None
    at, kind = 8, b""
    while kind != b"IEND":
        kind = data[at + 4 : at + 8]
        if kind not in _PLAIN_CHUNKS:
            return None
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    if at > len(data):
        return None
    columns, rows = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return PngHeader(rows, columns)


def decode_grey_png(data: bytes) -> npt.NDArray[np.uint8]:
    """Pixels (height, width) of a file that has a plain header; checksums are compared.

    Raises `ImageError` (`truncated`, `corrupt_image`).
    """
    import imagecodecs

    try:
        pixels: npt.NDArray[np.uint8] = imagecodecs.png_decode(data)
    except imagecodecs.PngError as error:
        told = str(error).lower()
        short = "not enough" in told or "too small" in told
        raise ImageError(
            ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            "the PNG ends before its pixels do" if short else "the PNG's coded pixels are damaged",
        ) from error
    return pixels
