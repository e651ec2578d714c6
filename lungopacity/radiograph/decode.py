"""Decodes the bytes of a file into radiographs: grey pixels, and the few facts that a row keeps.

The format is recognised by content, never by name: JPEG files named .png are common in archives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph import tiff
from lungopacity.radiograph.film import (
    DecodeLimits,
    Radiograph,
    as_image_error,
    is_synthetic,
    sides,
)
from lungopacity.radiograph.grey import stretch_to_uint8
from lungopacity.radiograph.jpeg import JpegHeader, decode_grey_jpeg, read_header, scans_of
from lungopacity.radiograph.jpeg2000 import is_cut_jpeg_2000, is_jpeg_2000
from lungopacity.radiograph.pillow import decode_with_pillow, decoder_error
from lungopacity.radiograph.png import PngHeader, decode_grey_png, read_plain_header

# First bytes of known formats that are not decoded: of cameras, browsers and archivers.
_NOT_DECODED = (
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "a picture in WebP"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"), "a picture in JPEG XL"),
    (
        re.compile(rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1|avi[fs])", re.DOTALL),
        "a picture in HEIF or AVIF",
    ),
    (re.compile(rb"II\xbc[\0\1]"), "a picture in JPEG XR"),
    (re.compile(rb"GIF8[79]a"), "a picture in GIF"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "an archive in 7z"),
    (re.compile(rb"Rar!\x1a\x07"), "an archive in RAR"),
    (re.compile(rb"\x04\x22\x4d\x18"), "a file in LZ4"),
)


def sniff_format(data: bytes) -> str | None:
    """The format that the first bytes announce, if it is one that is decoded; else None."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[128:132] == b"DICM":
        return "dicom"
    if tiff.is_tiff(data):
        return "tiff"
    if is_jpeg_2000(data):
        return "jpeg2000"
    if data[:2] == b"BM" and len(data) >= 26 and data[6:10] == b"\0\0\0\0":
        return "bmp"
    # DICOM without preamble begins with a tag of group 0002 or 0008, in either byte order.
    if data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00" and len(data) > 132:
        return "dicom"
    if data[:3] == b"\x00\x08\x00" and len(data) > 132:
        return "dicom"
    return None


def decode_radiographs(
    data: bytes,
    *,
    limits: DecodeLimits,
    at_least: int | None = None,
    accept: Set[ErrorCode] = frozenset(),
    hmac_key: bytes | None = None,
) -> Iterator[Radiograph | ImageError]:
    """Decode one file: one radiograph, or one for each frame of a DICOM object or page of a TIFF.

    `at_least`: the caller will shrink the image so that its longer side is this many pixels. A JPEG
    is then decoded at a DCT scale that is not smaller, several times as fast. `accept`: codes of
    `ACCEPTABLE` to decode instead of rejecting. `hmac_key`: the key of `patient_hmac` and
    `study_hmac`.

    Yields an `ImageError` for a frame that cannot be decoded. Raises `ImageError`, and nothing
    else, for a file that cannot be decoded at all.
    """
    limits.check_size(len(data))
    kind = sniff_format(data)
    if kind is None:
        raise _not_decoded(data)
    if kind == "dicom":
        from lungopacity.radiograph.dicom import decode_dicom

        yield from decode_dicom(data, limits, accept, hmac_key)
        return
    try:
        yield from _decoded(data, kind, limits, at_least)
    except ImageError as error:
        error.facts = {"format": kind, **error.facts}
        raise


def _not_decoded(data: bytes) -> ImageError:
    for signature, what in _NOT_DECODED:
        if signature.match(data):
            other = "PNG" if what.startswith("a picture") else "tar or zip"
            return ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, f"{what}; convert it to {other}")
    return ImageError(ErrorCode.NOT_AN_IMAGE, Stage.DECODE, "no signature of a known image format")


def _decoded(
    data: bytes, kind: str, limits: DecodeLimits, at_least: int | None
) -> Iterator[Radiograph | ImageError]:
    film = header = None
    pages = [0]
    if kind == "jpeg":
        header = read_header(data)
        _check_jpeg(data, header, limits)
        film = _decode_plain_jpeg(data, header, limits, at_least)
    elif kind == "png":
        film = _decode_plain_png(data, limits)
    elif kind == "tiff":
        pages = tiff.check_pages(data, limits)
    elif kind == "jpeg2000" and is_cut_jpeg_2000(data):
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the image ends before its pixels do")
    if film is not None:
        yield film
    else:
        yield from decode_with_pillow(data, kind, pages, limits, header, at_least)


def _check_jpeg(data: bytes, header: JpegHeader | None, limits: DecodeLimits) -> None:
    """Raises `ImageError` (`unsupported`, `decompression_bomb`)."""
    if header is not None and (header.bits > 8 or header.is_jpeg_ls):
        kind = "JPEG-LS" if header.is_jpeg_ls else "JPEG"
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.DECODE,
            f"a {kind} of {header.bits} bits; convert it to PNG or DICOM",
        )
    # libjpeg reads only one scan of a sequential JPEG of one component, however many there are.
    if header is None or header.progressive or header.components > 1:
        limits.check_scans(scans_of(data))


def _decode_plain_jpeg(
    data: bytes, header: JpegHeader | None, limits: DecodeLimits, at_least: int | None
) -> Radiograph | None:
    """A grey JPEG whose pixels are all that matters, as most JPEGs of archives are; else None."""
    if header is None or header.components != 1 or header.may_be_turned:
        return None
    synthetic = any(is_synthetic(comment) for comment in header.comments)
    return _plain_film(
        lambda: decode_grey_jpeg(data, header, at_least), "jpeg", header, limits, synthetic
    )


def _decode_plain_png(data: bytes, limits: DecodeLimits) -> Radiograph | None:
    header = read_plain_header(data)
    if header is None:
        return None

    def decode() -> npt.NDArray[np.uint8]:
        samples = decode_grey_png(data, header)
        # A PNG has no window, so 16 bits are stretched to their own range, as in such DICOM.
        return samples if header.bits == 8 else stretch_to_uint8(samples)

    return _plain_film(decode, "png", header, limits)


def _plain_film(
    decode: Callable[[], npt.NDArray[np.uint8] | None],
    kind: str,
    header: JpegHeader | PngHeader,
    limits: DecodeLimits,
    synthetic: bool = False,
) -> Radiograph | None:
    """The film with the pixels that `decode` gives; None if it gives none."""
    facts: dict[str, Any] = {
        "format": kind,
        **sides(header.rows, header.columns),
        "photometric_interpretation": "I;16" if header.bits == 16 else "L",  # Pillow's names
        "synthetic": synthetic,
    }
    try:
        limits.check_pixels(header.rows, header.columns)
        pixels = decode()
    except ImageError as error:
        error.facts = facts
        raise
    except Exception as error:
        raise as_image_error(error, decoder_error, facts) from error
    return None if pixels is None else Radiograph(pixels=pixels, **facts)
