"""Decodes with Pillow, page by page, and converts to grey by how the pixels are stored.

Pillow's plug-ins for other formats (EPS, PSD, PDF, …) are not used: they open more ways for hostile
files, and radiographs do not come in these formats.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph import tiff
from lungopacity.radiograph.colour import coloured_fraction
from lungopacity.radiograph.deep import decode_deep, is_deep
from lungopacity.radiograph.film import (
    DecodeLimits,
    Radiograph,
    as_image_error,
    error_of_part,
    is_synthetic,
    sides,
)
from lungopacity.radiograph.grey import stretch_to_uint8
from lungopacity.radiograph.jpeg import JpegHeader, decode_grey_jpeg
from lungopacity.radiograph.png import check_rows

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "BMP")
_EXIF_ORIENTATION = 0x0112
_ON_A_SIDE = (5, 6, 7, 8)
"""Orientations that swap the sides. For a TIFF, Pillow gives the size after turning."""

Grey = tuple[npt.NDArray[np.uint8], float]
"""Pixels (height, width), turned as EXIF says, and the share of coloured pixels."""


@dataclass(frozen=True)
class _Page:
    """A page that is open and not yet decoded."""

    rows: int
    columns: int
    mode: str
    """Pillow's name for how its pixels are stored."""
    synthetic: bool
    decode: Callable[[], Grey]

    def facts(self) -> dict[str, Any]:
        """The columns of a row that are known of it."""
        return {
            **sides(self.rows, self.columns),
            "photometric_interpretation": self.mode,
            "synthetic": self.synthetic,
        }


def decode_with_pillow(
    data: bytes,
    kind: str,
    pages: Sequence[int],
    limits: DecodeLimits,
    header: JpegHeader | None = None,
    at_least: int | None = None,
) -> Iterator[Radiograph | ImageError]:
    """Each page as a radiograph, or as the `ImageError` of that page alone.

    kind: what `sniff_format` returned. pages: the offset of each page of a TIFF; other formats have
    one page, because their further frames are previews or animations. header: of a JPEG. at_least:
    see `decode_radiographs`. Raises `ImageError` for a file that cannot be opened.
    """
    from PIL import Image, UnidentifiedImageError

    def open_page(index: int) -> _Page:
        try:
            return _opened(image, index, data, kind, header, at_least)
        except SyntaxError:  # of Pillow, for a page in a layout that it does not know
            if kind != "tiff":
                raise
            return _opened_without_pillow(data, pages, index)

    with warnings.catch_warnings():
        # Pillow warns of large images, for which our own limit decides, and of odd metadata.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Exception as error:
            if kind == "tiff" and isinstance(error, UnidentifiedImageError):
                yield from _each(
                    lambda at: _opened_without_pillow(data, pages, at), data, kind, pages, limits
                )
                return
            raise as_image_error(error, decoder_error) from error
        with image:
            yield from _each(open_page, data, kind, pages, limits)


def _opened(
    image: Any, index: int, data: bytes, kind: str, header: JpegHeader | None, at_least: int | None
) -> _Page:
    if index:
        image.seek(index)
    turned = kind == "tiff" and image.tag_v2.get(tiff.ORIENTATION) in _ON_A_SIDE
    columns, rows = image.size[::-1] if turned else image.size
    synthetic = any(map(is_synthetic, image.info.values()))

    def decode() -> Grey:
        return _grey_of(image, data, kind, header, at_least)

    return _Page(rows, columns, image.mode, synthetic, decode)


def _each(
    open_page: Callable[[int], _Page],
    data: bytes,
    kind: str,
    pages: Sequence[int],
    limits: DecodeLimits,
) -> Iterator[Radiograph | ImageError]:
    unpacked = 0
    films = tiff.films_of(data, pages) if kind == "tiff" else [0]
    for frame, index in enumerate(films):
        facts: dict[str, Any] = {"format": kind, "frame": frame if len(films) > 1 else None}
        try:
            page = open_page(index)
            facts |= page.facts()
            limits.check_pixels(page.rows, page.columns)
            unpacked += page.rows * page.columns
            if len(films) > 1:
                limits.check_unpacked(unpacked, len(data))
            pixels, coloured = page.decode()
            yield Radiograph(pixels=pixels, coloured_fraction=coloured, **facts)
        except Exception as error:
            failed = error_of_part(error, decoder_error, facts)
            yield failed
            if failed.code is ErrorCode.DECOMPRESSION_BOMB:
                return


def _opened_without_pillow(data: bytes, pages: Sequence[int], index: int) -> _Page:
    """A page of a TIFF in a grey layout that Pillow does not know, such as film scanners write:
    white-is-zero in big-endian words, or 10, 12 and 14 bits."""
    tags = tiff.tags_of(data, pages[index])

    def decode() -> Grey:
        grey = stretch_to_uint8(tiff.grey_values(data, index, tags))
        return _turned(grey, tags.get(tiff.ORIENTATION, 1)), 0.0

    return _Page(tags.get(tiff.ROWS, 0), tags.get(tiff.COLUMNS, 0), "I;16", False, decode)


def decoder_error(error: Exception) -> ImageError:
    """The `ImageError` for an exception of a decoder."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "an image's signature without a valid header"
        )
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(ErrorCode.TOO_LARGE, Stage.DECODE, "declares too many pixels")
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
    text = str(error).lower()
    short = "truncated" in text or "cut short" in text or isinstance(error, EOFError)
    return ImageError(
        ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
        Stage.DECODE,
        f"the decoder refused the content ({type(error).__name__})",
    )


def _grey_of(
    image: Image.Image, data: bytes, kind: str, header: JpegHeader | None, at_least: int | None
) -> Grey:
    if kind == "jpeg":
        return _grey_of_jpeg(image, data, header, at_least)
    if kind == "tiff":
        tiff.check_coded_pixels(data, image.tag_v2)  # type: ignore[attr-defined]
    if is_deep(image, data, kind):
        return _grey_of_deep(image, data, kind)
    if kind == "png":
        image.load()
        check_rows(data)
        _scale_transparent_grey(image, bits=data[24])
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_of_wide(image, kind)
    pixels, coloured = _grey_of_8_bits(image)
    if kind == "tiff" and image.mode == "L" and _sample_format(image) == tiff.SIGNED:
        # -128 … 127, which Pillow passes on as unsigned.
        return pixels ^ np.uint8(0x80), coloured
    return pixels, coloured


def _scale_transparent_grey(image: Image.Image, bits: int) -> None:
    """Pillow spreads the grey of a 2- or 4-bit PNG over 0 … 255, but leaves the transparent value
    as stored, so no pixel would match it."""
    if image.mode == "L" and bits in (2, 4) and "transparency" in image.info:
        most = (1 << bits) - 1
        image.info["transparency"] = (image.info["transparency"] & most) * (255 // most)


def _grey_of_jpeg(
    image: Image.Image, data: bytes, header: JpegHeader | None, at_least: int | None
) -> Grey:
    # First, because it notices lost pixels: Pillow fills them with grey without an error.
    luma = None if header is None else decode_grey_jpeg(data, header, at_least)
    if at_least is not None:
        # Y of YCbCr is exactly the grey image. libjpeg cannot convert RGB to it.
        colours = None if _is_rgb_jpeg(image) else "YCbCr"
        image.draft(colours, _draft_size(image.width, image.height, at_least))
    return _grey_of_8_bits(image, luma)


def _grey_of_deep(image: Image.Image, data: bytes, kind: str) -> Grey:
    orientation = _orientation(image)  # before load(), which turns a TIFF
    image.load()  # raises for damage, as for any other image
    grey, rgb = decode_deep(image, data, kind)
    coloured = 0.0 if rgb is None else coloured_fraction(stretch_to_uint8(rgb))
    return _turned(stretch_to_uint8(grey), orientation), coloured


def _grey_of_wide(image: Image.Image, kind: str) -> Grey:
    """16 bits and more have no window here, so they are stretched to their own range, as in DICOM
    without a window."""
    values = np.asarray(image)
    if kind == "tiff" and image.mode == "I" and _sample_format(image) == tiff.UNSIGNED:
        values = values.view(np.uint32)  # Pillow has 32 bits only as signed
    grey = stretch_to_uint8(values if values.dtype == np.uint16 else values.astype(np.float64))
    # Pillow inverts white-is-zero films only up to 8 bits.
    tags = getattr(image, "tag_v2", {})
    white_is_zero = kind == "tiff" and tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
    return _turned(255 - grey if white_is_zero else grey, _orientation(image)), 0.0


def _grey_of_8_bits(image: Image.Image, luma: npt.NDArray[np.uint8] | None = None) -> Grey:
    """luma: the grey pixels, if they are decoded already. Raises `ImageError`."""
    if image.mode == "LAB":
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, "colours in CIE L*a*b*; convert it to grey"
        )
    coloured = 0.0
    if image.mode not in ("1", "L", "LA", "La"):
        image.load()
        coloured = coloured_fraction(np.asarray(_coarse(image).convert("RGB")))
    grey = _as_grey(image) if luma is None else luma
    return _turned(grey, _orientation(image)), coloured


def _sample_format(image: Any) -> int:
    """SampleFormat of a TIFF's first sample."""
    return int(image.tag_v2.get(tiff.SAMPLE_FORMAT, (tiff.UNSIGNED,))[0])


def _is_rgb_jpeg(image: Any) -> bool:
    """Whether a JPEG of three components holds RGB, by libjpeg's rules: a JFIF file does not; in
    others Adobe's marker says so, and without one the names of the components."""
    if image.mode != "RGB" or "jfif" in image.info:
        return False
    if "adobe_transform" in image.info:
        return bool(image.info["adobe_transform"] == 0)
    return bytes(component[0] for component in image.layer) == b"RGB"


def _coarse(image: Image.Image) -> Image.Image:
    """The pixels that `coloured_fraction` looks at, without converting all pixels to RGB."""
    from PIL import Image

    step = max(1, min(image.size) // 128)
    size = (-(-image.width // step), -(-image.height // step))
    # Maps the middle of an output pixel to the middle of every step-th pixel.
    offset = (1 - step) / 2
    return image.transform(
        size, Image.Transform.AFFINE, (step, 0, offset, 0, step, offset), Image.Resampling.NEAREST
    )


def _as_grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    from PIL import Image

    if image.mode in ("YCbCr", "La"):
        # Luma; or grey that is premultiplied by its alpha, which is how it looks on black.
        return np.asarray(image.getchannel(0), dtype=np.uint8)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(
            black, image if image.mode == "RGBA" else image.convert("RGBA")
        )
    return np.asarray(image if image.mode == "L" else image.convert("L"), dtype=np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow's parsers raise anything on damaged metadata; the pixels are intact
        return 1
    return orientation


def _turned(grey: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps

    if orientation == 1:
        return grey
    turned = Image.fromarray(grey)
    turned.getexif()[_EXIF_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(turned), dtype=np.uint8)


def _draft_size(columns: int, rows: int, at_least: int) -> tuple[int, int]:
    scale = at_least / max(columns, rows)
    return max(1, round(columns * scale)), max(1, round(rows * scale))
