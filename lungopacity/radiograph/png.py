"""PNG: the fast way to the pixels of a plain grey film, which most of an archive's PNGs are, and
the way to all bits of one that was stored in colour."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.colour import deep_luminance

# Chunks (PNG, third edition, table 5.3) that change no pixel and name nothing that a row keeps. A
# file with any other, such as a palette, transparency, text or EXIF, is Pillow's to read.
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs"}
_PLAIN_CHUNKS |= {b"tIME", b"hIST", b"iCCP"}
_GREY = b"\x08\x00"
"""In IHDR: 8 bits, colour type grey."""
_DEEP = {b"\x10\x02", b"\x10\x04", b"\x10\x06"}
"""16 bits: RGB, grey with alpha, RGB with alpha."""
_ROWS_AT_ONCE = 64
_SUB = 1
_FIRST_ROWS = 4
"""Their filters tell whether a file is worth the quick way."""


@dataclass(frozen=True)
class PngHeader:
    """What a plain grey PNG declares."""

    rows: int
    columns: int
    is_interlaced: bool
    critical: tuple[slice, ...]
    """Kind and data of the chunks that hold the picture, IHDR first; four bytes after each is its
    checksum."""


def read_plain_header(data: bytes) -> PngHeader | None:
    """The header of an 8-bit grey PNG of plain chunks; None where it is another, or cut."""
    if data[12:16] != b"IHDR" or data[24:26] != _GREY:
        return None
    at, kind, critical = 8, b"", []
    while kind != b"IEND":
        kind = data[at + 4 : at + 8]
        if kind not in _PLAIN_CHUNKS:
            return None
        length = int.from_bytes(data[at : at + 4], "big")
        if kind in (b"IHDR", b"IDAT"):
            critical.append(slice(at + 4, at + 8 + length))
        at += 12 + length
    if at > len(data):
        return None
    columns, rows = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return PngHeader(rows, columns, data[28] != 0, tuple(critical))


def decode_grey_png(data: bytes, header: PngHeader) -> npt.NDArray[np.uint8]:
    """Pixels (height, width) of the file that `header` was read from; checksums are compared.

    Raises `ImageError` (`truncated`, `corrupt_image`).
    """
    quickly = _decode_row_by_row(data, header)
    return _decode(data) if quickly is None else quickly


def is_deep(data: bytes) -> bool:
    """Whether a PNG has 16 bits a sample, and more samples a pixel than grey: of such Pillow keeps
    the upper 8 bits, which are next to nothing of a film of 12."""
    return data[12:16] == b"IHDR" and data[24:26] in _DEEP


def decode_deep_png(
    data: bytes,
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16] | None]:
    """Grey values on black (height, width), and the colours (height, width, 3) if there are any.

    Raises `ImageError` (`truncated`, `corrupt_image`).
    """
    samples: npt.NDArray[np.uint16] = _decode(data)
    rgb = samples[..., :3] if samples.shape[2] > 2 else None
    grey = np.empty(samples.shape[:2], np.uint16)
    # Some rows at a time: they stay in the cache, and what is reckoned in 32 bits stays small.
    for top in range(0, len(samples), _ROWS_AT_ONCE):
        some = slice(top, top + _ROWS_AT_ONCE)
        luma = samples[some, :, 0] if rgb is None else deep_luminance(rgb[some])
        if samples.shape[2] % 2 == 0:
            luma = (luma * samples[some, :, -1].astype(np.uint32) + 32767) // 65535
        grey[some] = luma
    return grey, rgb


def _decode(data: bytes) -> npt.NDArray[Any]:
    import imagecodecs

    try:
        pixels: npt.NDArray[Any] = imagecodecs.png_decode(data)
    except imagecodecs.PngError as error:
        told = str(error).lower()
        short = "not enough" in told or "too small" in told
        raise ImageError(
            ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            "the PNG ends before its pixels do" if short else "the PNG's coded pixels are damaged",
        ) from error
    return pixels


def _decode_row_by_row(data: bytes, header: PngHeader) -> npt.NDArray[np.uint8] | None:
    """By libdeflate, in less than half of libpng's time, where each row is filtered by itself (Sub:
    PNG, third edition, 9.2), as OpenCV writes them; None for all else, damage included."""
    import imagecodecs

    if header.is_interlaced:
        return None
    for chunk in header.critical:
        if zlib.crc32(data[chunk]).to_bytes(4, "big") != data[chunk.stop : chunk.stop + 4]:
            return None
    coded = b"".join(data[chunk.start + 4 : chunk.stop] for chunk in header.critical[1:])
    stride = 1 + header.columns
    try:
        first = zlib.decompressobj().decompress(coded, _FIRST_ROWS * stride)
        if set(first[::stride]) != {_SUB}:
            return None
        found = imagecodecs.deflate_decode(coded, raw=False, out=header.rows * stride)
    except (zlib.error, imagecodecs.DeflateError):
        return None
    if len(found) != header.rows * stride:
        return None
    rows = np.frombuffer(found, np.uint8).reshape(header.rows, stride)
    if not (rows[:, 0] == _SUB).all():
        return None
    pixels: npt.NDArray[np.uint8] = imagecodecs.delta_decode(rows[:, 1:], axis=1)
    return pixels
