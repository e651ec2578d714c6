"""Decodes DICOM objects to radiographs: first the header, then frame by frame. `dicom_grey` maps
the grey values.

Errors quote no header value, because any text element can hold a name.
"""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from collections.abc import Iterator, Set
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.colour import coloured_fraction, deep_luminance, luminance
from lungopacity.radiograph.dicom_frames import (
    check_encapsulation,
    codestreams_held,
    forget_offsets,
    frames_held,
    header_of_frame,
    is_compressed,
    set_transfer_syntax,
    stored_values,
)
from lungopacity.radiograph.dicom_grey import (
    grey_of,
    pixel_aspect_of,
    with_square_pixels,
    without_unused_bits,
)
from lungopacity.radiograph.dicom_header import (
    check_kind,
    check_wanted,
    facts_of,
    is_image_class,
    photometric_of,
)
from lungopacity.radiograph.dicom_lut import with_palette
from lungopacity.radiograph.film import DecodeLimits, Radiograph, as_image_error, error_of_part
from lungopacity.radiograph.grey import stretch_to_uint8

# pydicom's warnings quote the offending value, which may be a name, so none is passed on.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_META_BYTES = 1024
"""The file meta group names the transfer syntax within so many bytes."""
_MAX_READS = 1_000_000
"""pydicom needs two or three for an element, and about two microseconds for each."""
_PIXEL_STEP = 4096
"""pydicom reads more bytes of compressed pixels at once than this."""
_PIXEL_DATA = 0x7FE00010
_FEWER = "fewer pixels than declared"
_OTHER_COLOURS = {"YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK", "XYB"}
"""Most are retired. pydicom does not convert them, so hue, or Y, would be taken for red."""
_NOT_OF_COLOURS = {"MONOCHROME1", "PALETTE COLOR"}
"""Of three samples these would be taken for red, green and blue: a film for its own negative."""


def decode_dicom(
    data: bytes,
    limits: DecodeLimits,
    accept: Set[ErrorCode] = frozenset(),
    hmac_key: bytes | None = None,
) -> Iterator[Radiograph | ImageError]:
    """Each frame as a radiograph, or as the `ImageError` of that frame alone.

    `accept`: see `dicom_header.check_wanted`. `hmac_key`: see `decode_radiographs`. Raises
    `ImageError` for an object without an image to score, or with a header that cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts: dict[str, object] = {"format": "dicom"}
        try:
            dataset = _read(data, limits)
            is_cut = _ends_inside_a_value(dataset)
            check_kind(dataset)
            facts = facts_of(dataset, hmac_key)
            _check_pixel_data(dataset, is_cut)
            check_wanted(dataset, facts, accept)
            declared, frames = _frames(dataset, limits)
        except ImageError as error:
            error.facts = {} if error.code is ErrorCode.NOT_AN_IMAGE else facts
            raise
        except Exception as error:
            # Bound to no name: this frame would keep the error, its traceback this frame and what
            # was inflated, and the next file would find no memory left.
            raise as_image_error(error, _header_error, facts) from error
        for index in range(min(declared, frames + 1)):
            own = facts if declared == 1 else {**facts, "frame": index}
            try:
                if index >= frames:
                    # Thousands may be declared and missing: they get one row.
                    raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, _FEWER)
                yield _radiograph(dataset, index, own, limits)
            except Exception as error:
                yield error_of_part(error, _pixel_error, own)


def _read(data: bytes, limits: DecodeLimits) -> Any:
    import pydicom
    from pydicom.filereader import read_partial

    if _has_meta(data) and DeflatedExplicitVRLittleEndian.encode() in data[:_META_BYTES]:
        return _read_deflated(data, limits)
    dataset = pydicom.dcmread(_Bounded(data), force=True)
    # pydicom returns nothing of a file that ends inside an element. If that element is junk after
    # the pixels, the film is intact; if it is the pixels, the header is.
    for last in (_PIXEL_DATA, _PIXEL_DATA - 1):
        if "PixelData" not in dataset:
            part = read_partial(_Bounded(data), partial(_is_after, last), force=True)
            dataset = part if len(part) > len(dataset) else dataset
    known = "SOPClassUID" in dataset or "Rows" in dataset or "PixelData" in dataset
    if not known and not _has_meta(data):
        raise ImageError(
            ErrorCode.NOT_AN_IMAGE, Stage.DECODE, "no signature of a known image format"
        )
    return dataset


def _is_after(last: int, tag: int, vr: str | None, length: int) -> bool:
    return tag > last


class _Bounded(io.BytesIO):
    """A file that bounds pydicom's reads: it takes every 8 bytes of zeros for an element."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _MAX_READS + len(data) // _PIXEL_STEP

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ImageError(
                ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "more DICOM elements than any object has"
            )
        return super().read(size)


def _has_meta(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def _read_deflated(data: bytes, limits: DecodeLimits) -> Any:
    """The dataset of a deflated file, inflated here because pydicom has no limit of size."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset

    file = _Bounded(data)
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data[file.tell() :], limits.max_size_bytes)
    if inflater.unconsumed_tail:
        raise ImageError(
            ErrorCode.DECOMPRESSION_BOMB,
            Stage.DECODE,
            f"inflates to more than {limits.max_size_bytes} bytes",
        )
    dataset = read_dataset(_Bounded(inflated), False, True)
    dataset.file_meta = FileMetaDataset(meta)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _ends_inside_a_value(dataset: Any) -> bool:
    """Whether the file is cut inside its last element, of which pydicom then gives a part.

    Call it before any value is read: that replaces the raw element, which has the length.
    """
    tags = list(dataset.keys())
    last: Any = dataset.get_item(tags[-1]) if tags else None
    length = getattr(last, "length", None)
    return isinstance(length, int) and 0 < length < 0xFFFFFFFF and len(last.value or b"") < length


def _check_pixel_data(dataset: Any, is_cut: bool) -> None:
    """Raises `ImageError` for an object without usable pixels: cut off, of a kind that has none, or
    in floating point."""
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, "floating-point pixels")
    if dataset.get("PixelData"):
        return
    if is_cut or "Rows" in dataset or "SOPClassUID" not in dataset or is_image_class(dataset):
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the header of an image without pixels")
    raise ImageError(ErrorCode.NO_PIXELS, Stage.DECODE, "the object holds no pixel data")


def _frames(dataset: Any, limits: DecodeLimits) -> tuple[int, int]:
    """How many frames the object declares, and how many of them its pixel data can hold. Completes
    the header, see `_complete`.

    Raises `ImageError` if no frame can be decoded.
    """
    try:
        limits.check_pixels(int(dataset.Rows), int(dataset.Columns))
        frames = int(dataset.get("NumberOfFrames") or 1)
        samples = int(dataset.get("SamplesPerPixel") or 1)
        allocated = int(dataset.BitsAllocated)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "rows, columns, frames or bits unreadable"
        ) from error
    if samples not in (1, 3) or allocated not in (1, 8, 16, 32):
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, f"{samples} samples of {allocated} bits a pixel"
        )
    limits.check_frames(frames)
    frames = max(1, frames)
    set_transfer_syntax(dataset)
    _complete(dataset)
    subsampled = dataset.get("PhotometricInterpretation") == "YBR_FULL_422"
    bits = int(dataset.Rows) * int(dataset.Columns) * (2 if subsampled else samples) * allocated
    check_encapsulation(dataset, (frames * bits + 7) // 8)
    if is_compressed(dataset):
        if codestreams_held(dataset) > frames:
            # The films beyond the declared number would be skipped.
            raise ImageError(
                ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "more compressed frames than are declared"
            )
        forget_offsets(dataset, frames)
        if frames > 1:
            pixels = frames * int(dataset.Rows) * int(dataset.Columns)
            limits.check_unpacked(pixels, len(dataset.PixelData))
        whole = frames_held(dataset, frames) if frames > 1 else 1
        if 0 < whole < frames:
            # Otherwise pydicom joins fragments that are a frame each.
            dataset.NumberOfFrames = whole
        return frames, whole
    if subsampled and int(dataset.Columns) % 2:
        # Two columns share their chroma, so the last one of a row would take that of the next row.
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "YBR_FULL_422 in an odd number of columns"
        )
    whole = len(dataset.PixelData) * 8 // bits
    if whole >= 2 * frames:
        # Rows, bits or frames are wrong, and a part of the film would pass for all of it.
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "at least twice the pixels that are declared"
        )
    if 0 < whole < frames:
        dataset.NumberOfFrames = whole  # otherwise pydicom decodes none of them
    return frames, whole


def _complete(dataset: Any) -> None:
    """Fill in what pydicom requires and some objects omit, if there is no doubt about it.

    Raises `ImageError` if there is.
    """
    for keyword, usual in (("SamplesPerPixel", 1), ("PixelRepresentation", 0)):
        if dataset.get(keyword) is None:
            setattr(dataset, keyword, usual)
    if is_compressed(dataset) and dataset.get("PlanarConfiguration") is None:
        dataset.PlanarConfiguration = 0  # the codestream has its own
    colours = ("PlanarConfiguration",) if int(dataset.SamplesPerPixel) == 3 else ()
    for keyword in ("BitsStored", "PhotometricInterpretation", *colours):
        if dataset.get(keyword) in (None, ""):
            raise ImageError(ErrorCode.CORRUPT_IMAGE, Stage.DECODE, f"the header has no {keyword}")
    photometric = photometric_of(dataset)
    if photometric is None:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            "the header's PhotometricInterpretation is not a term of the standard",
        )
    dataset.PhotometricInterpretation = photometric  # the only spelling that pydicom knows
    if int(dataset.SamplesPerPixel) == 3 and photometric in _OTHER_COLOURS:
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, f"colours in {photometric}")
    if int(dataset.SamplesPerPixel) == 3 and photometric in _NOT_OF_COLOURS:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, f"three samples a pixel in {photometric}"
        )


def _radiograph(
    dataset: Any, index: int, facts: dict[str, object], limits: DecodeLimits
) -> Radiograph:
    stored = stored_values(dataset, index, limits)
    header = header_of_frame(dataset, index)
    coloured = 0.0
    if stored.ndim == 3:
        stored, dataset = without_unused_bits(stored, dataset)
        if stored.dtype == np.uint16 and int(dataset.BitsStored) > 8:
            # As for other formats (`deep`): a 12-bit film is almost black in the upper 8 bits.
            rgb, grey = stretch_to_uint8(stored), stretch_to_uint8(deep_luminance(stored))
        else:
            rgb = stored if stored.dtype == np.uint8 else _to_8_bits(stored, dataset)
            grey = luminance(rgb)
        coloured = coloured_fraction(rgb)
    elif str(dataset.get("PhotometricInterpretation") or "") == "PALETTE COLOR":
        rgb = with_palette(stored, dataset)
        coloured = coloured_fraction(rgb)
        grey = luminance(rgb)
    else:
        grey = grey_of(stored, header)
    pixels = with_square_pixels(grey, pixel_aspect_of(header))
    return Radiograph(pixels=pixels, coloured_fraction=coloured, **facts)  # type: ignore[arg-type]


def _to_8_bits(stored: npt.NDArray[Any], dataset: Any) -> npt.NDArray[np.uint8]:
    shift = max(0, int(dataset.BitsStored) - 8)
    eight: npt.NDArray[np.uint8] = np.clip(stored.astype(np.int64) >> shift, 0, 255).astype(
        np.uint8
    )
    return eight


def _header_error(error: Exception) -> ImageError:
    """The `ImageError` for an exception of pydicom, which parses values only when they are read."""
    return ImageError(
        ErrorCode.CORRUPT_IMAGE,
        Stage.DECODE,
        f"DICOM header cannot be read ({type(error).__name__})",
    )


def _pixel_error(error: Exception) -> ImageError:
    """The `ImageError` for an exception of a frame's decoder."""
    text = str(error).lower()
    kind = type(error).__name__
    if isinstance(error, NotImplementedError) or "missing dependencies" in text:
        return ImageError(
            ErrorCode.UNSUPPORTED_TRANSFER_SYNTAX, Stage.DECODE, "no decoder for this encoding"
        )
    signs = ("less than", "truncated", "fewer", "not enough", "no frame", "insufficient")
    if any(sign in text for sign in signs):
        return ImageError(ErrorCode.TRUNCATED, Stage.DECODE, f"pixel data ends early ({kind})")
    return ImageError(
        ErrorCode.CORRUPT_IMAGE, Stage.DECODE, f"pixel data cannot be decoded ({kind})"
    )
