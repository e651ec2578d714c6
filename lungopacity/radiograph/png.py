"""PNG: a fast decoder for plain grey films, which most PNGs of archives are, and a check of all
others for missing rows."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage

# Chunks (PNG, third edition, table 5.3) that change no pixel, and hold nothing that a row keeps.
# Pillow reads a file with any other: a palette, transparency, text, EXIF.
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs"}
_PLAIN_CHUNKS |= {b"tIME", b"hIST", b"iCCP"}
_GREY = {b"\x08\x00": 8, b"\x10\x00": 16}
"""Bits of a sample by IHDR's bit depth and colour type, which is grey."""
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel, by colour type."""
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""Left, top, and steps across and down of each pass over an interlaced image (8.1)."""
_SUB = 1
_FIRST_ROWS = 4
"""Rows whose filters decide whether the fast way is worth a try."""


@dataclass(frozen=True)
class PngHeader:
    """The header of a plain grey PNG."""

    rows: int
    columns: int
    bits: int
    """8 or 16."""
    is_interlaced: bool
    critical: tuple[slice, ...]
    """Where the type and data of the IHDR and IDAT chunks are, IHDR first. The four bytes after
    each are its checksum."""


def read_plain_header(data: bytes) -> PngHeader | None:
    """The header of a grey PNG of 8 or 16 bits with only plain chunks; None for any other, or one
    that is cut."""
    bits = _GREY.get(data[24:26])
    if data[12:16] != b"IHDR" or bits is None:
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
    return PngHeader(rows, columns, bits, data[28] != 0, tuple(critical))


def decode_grey_png(data: bytes, header: PngHeader) -> npt.NDArray[Any]:
    """Samples of the file that `header` was read from: (height, width), uint8 or uint16. Checks the
    checksums.

    Raises `ImageError` (`truncated`, `corrupt_image`).
    """
    quickly = _decode_row_by_row(data, header)
    return decode_png(data) if quickly is None else quickly


def check_rows(data: bytes) -> None:
    """Raise `ImageError` (`truncated`) if the coded rows end early: Pillow leaves the rest black.

    Damage of any other kind is left to the decoder.
    """
    import imagecodecs

    columns, rows = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    bits, samples = data[24], _SAMPLES.get(data[25], 0)
    passes = _ADAM7 if data[28] else ((0, 0, 1, 1),)
    expected = 0
    for left, top, across, down in passes:
        width, height = -(-(columns - left) // across), -(-(rows - top) // down)
        if width > 0 and height > 0:
            expected += height * (1 + (width * bits * samples + 7) // 8)
    coded, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            coded.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    try:
        found = imagecodecs.deflate_decode(b"".join(coded), raw=False, out=expected)
    except imagecodecs.DeflateError:
        return
    if len(found) < expected:
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the PNG ends before its pixels do")


def decode_png(data: bytes) -> npt.NDArray[Any]:
    """All samples of any PNG, (height, width) or (height, width, samples).

    Raises `ImageError` (`truncated`, `corrupt_image`).
    """
    import imagecodecs

    try:
        pixels: npt.NDArray[Any] = imagecodecs.png_decode(data)
    except imagecodecs.PngError as error:
        text = str(error).lower()
        short = "not enough" in text or "too small" in text
        raise ImageError(
            ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            "the PNG ends before its pixels do" if short else "the PNG's coded pixels are damaged",
        ) from error
    return pixels


def _decode_row_by_row(data: bytes, header: PngHeader) -> npt.NDArray[np.uint8] | None:
    """Decode with libdeflate, in less than half of libpng's time, if no row's filter depends on
    another row (Sub: PNG, third edition, 9.2), as in files of OpenCV. None for all others, and for
    damaged files."""
    import imagecodecs

    if header.is_interlaced or header.bits > 8:
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
