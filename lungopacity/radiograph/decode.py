"""Radiographs from the bytes of a file: grey pixels, and the few facts that a row keeps.

The format is told by content, never by name: JPEG bytes named .png are common in real archives.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph import tiff
from lungopacity.radiograph.colour import coloured_fraction
from lungopacity.radiograph.deep import decode_deep, is_deep
from lungopacity.radiograph.film import SYNTHETIC_MARK, DecodeLimits, Radiograph
from lungopacity.radiograph.grey import stretch_to_uint8
from lungopacity.radiograph.jpeg import (
    JpegHeader,
    decode_grey_jpeg,
    is_cut_jpeg_2000,
    read_header,
    scans_of,
)
from lungopacity.radiograph.png import check_rows, decode_grey_png, read_plain_header

if TYPE_CHECKING:
    from PIL import Image

# Signatures of what Pillow may open here. Its other plug-ins (EPS, PSD, PDF, …) stay shut: a wider
# door for hostile files, and no radiograph comes in them.
_PILLOW_FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "BMP")
_EXIF_ORIENTATION = 0x0112


def sniff_format(data: bytes) -> str | None:
    """The image format that the first bytes announce, or None."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[128:132] == b"DICM":
        return "dicom"
    if tiff.is_tiff(data):
        return "tiff"
    if data[:12] == b"\x00\x00\x00\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "jpeg2000"
    if data[:2] == b"BM" and len(data) >= 26 and data[6:10] == b"\0\0\0\0":
        return "bmp"
    # DICOM without preamble: a tag of group 0002 or 0008 at the start, of either byte order.
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

    `at_least`: the caller will shrink the image so that its longer side is this many pixels; a JPEG
    is then decoded straight to a DCT scale that is not below it, several times as fast. `accept`:
    of `ACCEPTABLE`, what to decode all the same.
    `hmac_key`: fills `patient_hmac` and `study_hmac`.

    A frame that cannot be decoded comes as its `ImageError`. Raises `ImageError`, and nothing else,
    for a file that cannot be decoded at all.
    """
    limits.check_size(len(data))
    kind = sniff_format(data)
    if kind is None:
        raise ImageError(
            ErrorCode.NOT_AN_IMAGE, Stage.DECODE, "no signature of a known image format"
        )
    if kind == "dicom":
        from lungopacity.radiograph.dicom import decode_dicom

        yield from decode_dicom(data, limits, accept, hmac_key)
        return
    if kind == "tiff":
        tiff.check_pages(data, limits)
    if kind == "jpeg2000" and is_cut_jpeg_2000(data):
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the image ends before its pixels do")
    film = None
    if kind == "jpeg":
        header = read_header(data)
        if header is not None and header.bits > 8:
            raise ImageError(
                ErrorCode.UNSUPPORTED,
                Stage.DECODE,
                f"a JPEG of {header.bits} bits; write it anew as PNG, or as DICOM",
            )
        # Of a sequential JPEG of one component, libjpeg reads one scan, however many there are.
        if header is None or header.progressive or header.components > 1:
            limits.check_scans(scans_of(data))
        film = _decode_plain_jpeg(data, header, limits, at_least)
    elif kind == "png":
        film = _decode_plain_png(data, limits)
    if film is not None:
        yield film
    else:
        yield from _decode_with_pillow(data, kind, limits, at_least)


def _decode_plain_jpeg(
    data: bytes, header: JpegHeader | None, limits: DecodeLimits, at_least: int | None
) -> Radiograph | None:
    """A grey JPEG that nothing need be known of but its pixels: most of an archive's JPEGs."""
    if header is None or header.components != 1 or header.may_be_turned:
        return None
    limits.check_pixels(header.rows, header.columns)
    pixels = decode_grey_jpeg(data, header, at_least)
    if pixels is None:
        return None
    return Radiograph(
        pixels=pixels,
        format="jpeg",
        rows=header.rows,
        columns=header.columns,
        photometric_interpretation="L",
        synthetic=any(_is_synthetic(comment) for comment in header.comments),
    )


def _decode_plain_png(data: bytes, limits: DecodeLimits) -> Radiograph | None:
    header = read_plain_header(data)
    if header is None:
        return None
    limits.check_pixels(header.rows, header.columns)
    try:
        pixels = decode_grey_png(data, header)
    except Exception as error:
        raise _as_image_error(error) from error
    return Radiograph(
        pixels=pixels,
        format="png",
        rows=header.rows,
        columns=header.columns,
        photometric_interpretation="L",
    )


def _decode_with_pillow(
    data: bytes, kind: str, limits: DecodeLimits, at_least: int | None
) -> Iterator[Radiograph | ImageError]:
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        # Pillow warns of large images, where our own limit decides, and of odd metadata.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        except Exception as error:
            if kind == "tiff" and isinstance(error, UnidentifiedImageError):
                yield from _decode_uncommon_tiff(data, limits)
                return
            raise _as_image_error(error) from error
        with image:
            # Of the other formats, further frames are previews or animations.
            try:
                pages = int(getattr(image, "n_frames", 1)) if kind == "tiff" else 1
            except Exception as error:
                raise _as_image_error(error) from error
            limits.check_frames(pages)
            unpacked = 0
            for page in range(pages):
                facts: dict[str, Any] = {"format": kind, "frame": page if pages > 1 else None}
                try:
                    if page:
                        image.seek(page)
                    facts |= {
                        "rows": image.height,
                        "columns": image.width,
                        "photometric_interpretation": image.mode,
                        "synthetic": any(_is_synthetic(text) for text in image.info.values()),
                    }
                    limits.check_pixels(image.height, image.width)
                    unpacked += image.height * image.width
                    if pages > 1:
                        limits.check_unpacked(unpacked, len(data))
                    pixels, coloured = _grey_pixels(image, data, kind, at_least)
                    yield Radiograph(pixels=pixels, coloured_fraction=coloured, **facts)
                except Exception as error:
                    failed = _as_image_error(error)
                    failed.facts = facts
                    yield failed
                    if failed.code is ErrorCode.DECOMPRESSION_BOMB:
                        return


def _decode_uncommon_tiff(data: bytes, limits: DecodeLimits) -> Iterator[Radiograph | ImageError]:
    """Of grey layouts that Pillow knows none of, as of film scanners: white is zero in big-endian
    words, or 10, 12 and 14 bits."""
    pages = tiff.check_pages(data, limits)
    unpacked = 0
    for index, begin in enumerate(pages):
        facts: dict[str, Any] = {"format": "tiff", "frame": index if len(pages) > 1 else None}
        try:
            tags = tiff.tags_of(data, begin)
            rows, columns = tags.get(tiff.ROWS, 0), tags.get(tiff.COLUMNS, 0)
            limits.check_pixels(rows, columns)
            # Only now: more than the limit may be more than a column of a table holds.
            facts |= {"rows": rows, "columns": columns, "photometric_interpretation": "I;16"}
            unpacked += rows * columns
            if len(pages) > 1:
                limits.check_unpacked(unpacked, len(data))
            grey = stretch_to_uint8(tiff.grey_values(data, index, tags))
            yield Radiograph(pixels=_turned(grey, tags.get(tiff.ORIENTATION, 1)), **facts)
        except Exception as error:
            failed = _as_image_error(error)
            failed.facts = facts
            yield failed
            if failed.code is ErrorCode.DECOMPRESSION_BOMB:
                return


def _as_image_error(error: Exception) -> ImageError:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, ImageError):
        return error
    if isinstance(error, UnidentifiedImageError):
        return ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the signature is there, the header is not"
        )
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(ErrorCode.TOO_LARGE, Stage.DECODE, "declares too many pixels")
    if isinstance(error, MemoryError):
        return ImageError(ErrorCode.TOO_LARGE, Stage.DECODE, "takes more memory than allowed")
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
    told = str(error).lower()
    short = "truncated" in told or "cut short" in told or isinstance(error, EOFError)
    return ImageError(
        ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
        Stage.DECODE,
        f"decoder refused the content ({type(error).__name__})",
    )


def _is_synthetic(comment: object) -> bool:
    if isinstance(comment, bytes):
        comment = comment.decode("ascii", "replace")
    return isinstance(comment, str) and comment.lower().startswith(SYNTHETIC_MARK)


def _grey_pixels(
    image: Image.Image, data: bytes, kind: str, at_least: int | None
) -> tuple[npt.NDArray[np.uint8], float]:
    """Grey pixels, turned as EXIF says, and the share of coloured ones."""
    luma = None
    if kind == "jpeg":
        # Asked first: Pillow fills pixels that were lost with grey, and says nothing.
        header = read_header(data)
        luma = None if header is None else decode_grey_jpeg(data, header, at_least)
    if kind == "jpeg" and at_least is not None:
        # YCbCr where the file has it: its Y is the grey image, exactly. libjpeg makes none of RGB.
        colours = None if _is_rgb_jpeg(image) else "YCbCr"
        image.draft(colours, _draft_size(image.width, image.height, at_least))
    if is_deep(image, data, kind):
        orientation = _orientation(image)  # first: of a TIFF, Pillow turns what it has loaded
        image.load()  # damage is told as of any other
        deep, rgb = decode_deep(image, data, kind)
        coloured = 0.0 if rgb is None else coloured_fraction(stretch_to_uint8(rgb))
        return _turned(stretch_to_uint8(deep), orientation), coloured
    if kind == "png":
        image.load()
        check_rows(data)
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits and more carry no window: their own range is mapped, as for such DICOM.
        values = np.asarray(image)
        if kind == "tiff" and image.mode == "I" and _sample_format(image) == tiff.UNSIGNED:
            values = values.view(np.uint32)  # of 32 bits; Pillow has them with a sign only
        grey = stretch_to_uint8(values if values.dtype == np.uint16 else values.astype(np.float64))
        # Pillow inverts white-is-zero films of up to 8 bits only.
        tags = getattr(image, "tag_v2", {})
        white_is_zero = kind == "tiff" and tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
        return _turned(255 - grey if white_is_zero else grey, _orientation(image)), 0.0
    coloured = 0.0
    if image.mode not in ("1", "L", "LA"):
        image.load()
        coloured = coloured_fraction(np.asarray(_coarse(image).convert("RGB")))
    grey = _as_grey(image) if luma is None else luma
    if kind == "tiff" and image.mode == "L" and _sample_format(image) == tiff.SIGNED:
        grey = grey ^ np.uint8(0x80)  # -128 … 127, which Pillow passes on as if they had no sign
    return _turned(grey, _orientation(image)), coloured


def _sample_format(image: Any) -> int:
    """Of a TIFF's first sample."""
    return int(image.tag_v2.get(tiff.SAMPLE_FORMAT, (tiff.UNSIGNED,))[0])


def _is_rgb_jpeg(image: Any) -> bool:
    """Whether a JPEG of three components holds RGB, as libjpeg tells it: a JFIF file does not, of
    others Adobe's marker says it, and without one the names of the components."""
    if image.mode != "RGB" or "jfif" in image.info:
        return False
    if "adobe_transform" in image.info:
        return bool(image.info["adobe_transform"] == 0)
    return bytes(component[0] for component in image.layer) == b"RGB"


def _coarse(image: Image.Image) -> Image.Image:
    """The pixels that `coloured_fraction` looks at, without a copy of all of them in RGB."""
    from PIL import Image

    step = max(1, min(image.size) // 128)
    size = (-(-image.width // step), -(-image.height // step))
    # The middle of an output pixel is taken to the middle of every step-th pixel.
    offset = (1 - step) / 2
    return image.transform(
        size, Image.Transform.AFFINE, (step, 0, offset, 0, step, offset), Image.Resampling.NEAREST
    )


def _as_grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    from PIL import Image

    if image.mode == "YCbCr":
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
    except Exception:  # Pillow's parsers raise anything of damaged metadata; the pixels are whole
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
