"""One radiograph: from the bytes of a file to grey pixels and the few facts that its row keeps.

The format is told by content, never by name: JPEG bytes named .png are common in real archives.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import SYNTHETIC_MARK, DecodeLimits, Radiograph
from lungopacity.radiograph.grey import stretch_to_uint8

# Signatures of what Pillow may open here. Its other plug-ins (EPS, PSD, PDF, …) stay shut: a wider
# door for hostile files, and no radiograph comes in them.
_PILLOW_FORMATS = ("PNG", "JPEG", "TIFF", "JPEG2000", "BMP")


def sniff_format(data: bytes) -> str | None:
    """The image format that the first bytes announce, or None."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[128:132] == b"DICM":
        return "dicom"
    if data[:4] in (b"II*\x00", b"MM\x00*"):
        return "tiff"
    if data[:12] == b"\x00\x00\x00\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "jpeg2000"
    if data[:2] == b"BM" and len(data) >= 26 and data[6:10] == b"\0\0\0\0":
        return "bmp"
    # DICOM without preamble: a group 0002 or 0008 tag at the start, little endian.
    if data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00" and len(data) > 132:
        return "dicom"
    return None


def decode_radiograph(
    data: bytes, *, limits: DecodeLimits, at_least: int | None = None
) -> Radiograph:
    """Decode one file.

    `at_least`: the caller will shrink the image so that its longer side is this many pixels; a JPEG
    is then decoded straight to the smallest DCT scale that is not below it, three times as fast.

    Raises `ImageError`, and nothing else, for content that cannot be decoded.
    """
    limits.check_size(len(data))
    kind = sniff_format(data)
    if kind is None:
        raise ImageError(
            ErrorCode.NOT_AN_IMAGE, Stage.DECODE, "no signature of a known image format"
        )
    if kind == "dicom":
        from lungopacity.radiograph.dicom import decode_dicom

        return decode_dicom(data, limits)
    return replace(_decode_with_pillow(data, limits, at_least), format=kind)


def _decode_with_pillow(data: bytes, limits: DecodeLimits, at_least: int | None) -> Radiograph:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Our own limit, checked below before any pixel is decoded, replaces Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        with image:
            columns, rows = image.size
            limits.check_pixels(rows, columns)
            mode = image.mode
            synthetic = any(_is_synthetic(text) for text in image.info.values())
            if at_least is not None and image.format == "JPEG":
                image.draft("L", _draft_size(columns, rows, at_least))
            pixels = _grey_pixels(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the signature is there, the header is not"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(ErrorCode.TOO_LARGE, Stage.DECODE, "declares too many pixels") from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        short = "truncated" in str(error).lower() or "cut short" in str(error).lower()
        raise ImageError(
            ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            f"decoder refused the content ({type(error).__name__})",
        ) from error
    return Radiograph(
        pixels=pixels,
        format="",
        rows=rows,
        columns=columns,
        photometric_interpretation=mode,
        synthetic=synthetic,
    )


def _is_synthetic(comment: object) -> bool:
    if isinstance(comment, bytes):
        comment = comment.decode("ascii", "replace")
    return isinstance(comment, str) and comment.lower().startswith(SYNTHETIC_MARK)


def _draft_size(columns: int, rows: int, at_least: int) -> tuple[int, int]:
    scale = at_least / max(columns, rows)
    return max(1, round(columns * scale)), max(1, round(rows * scale))


def _grey_pixels(image: object) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps

    assert isinstance(image, Image.Image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits and more carry no window: their own range is mapped, as for such DICOM.
        return stretch_to_uint8(np.asarray(image, dtype=np.float64))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return np.asarray(image.convert("L"), dtype=np.uint8)
