"""DICOM objects to radiographs: header, then frame by frame. See `dicom_grey` for the grey values.

No header value is quoted in an error: any text element can hold a name.
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
    codestreams_held,
    frames_held,
    header_of_frame,
    is_compressed,
    set_transfer_syntax,
    stored_values,
)
from lungopacity.radiograph.dicom_grey import grey_of, pixel_aspect_of, with_square_pixels
from lungopacity.radiograph.dicom_header import (
    check_kind,
    check_wanted,
    facts_of,
    is_image_class,
    photometric_of,
)
from lungopacity.radiograph.film import DecodeLimits, Radiograph, as_image_error
from lungopacity.radiograph.grey import stretch_to_uint8

# pydicom warns with the offending value in the text. Values may be names, so nothing is passed on.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_META_BYTES = 1024
"""Within which the file meta group names the transfer syntax."""
_MAX_READS = 1_000_000
"""pydicom takes two or three for an element, and about two microseconds for each."""
_PIXEL_STEP = 4096
"""Less than it takes at once of compressed pixels."""
_PIXEL_DATA = 0x7FE00010
_FEWER = "fewer pixels than declared"
_OTHER_COLOURS = {"YBR_PARTIAL_422", "YBR_PARTIAL_420", "HSV", "ARGB", "CMYK", "XYB"}
"""Most are retired. pydicom gives them as they are stored: hue, or Y, for red."""


def decode_dicom(
    data: bytes,
    limits: DecodeLimits,
    accept: Set[ErrorCode] = frozenset(),
    hmac_key: bytes | None = None,
) -> Iterator[Radiograph | ImageError]:
    """Each frame as a radiograph, or as the error that it alone met.

    `accept`: see `dicom_header.check_wanted`. Raises `ImageError` for an object without an image to
    score, or with a header that cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = _read(data, limits)
        facts: dict[str, object] = {"format": "dicom"}
        try:
            is_cut = _ends_inside_a_value(dataset)
            check_kind(dataset)
            facts = facts_of(dataset, hmac_key)
            _check_pixel_data(dataset, is_cut)
            check_wanted(dataset, facts, accept)
            declared, frames = _frames(dataset, limits)
        except ImageError as error:
            error.facts = facts
            raise
        except Exception as error:
            failed = as_image_error(error, _header_error)
            failed.facts = facts
            raise failed from error
        for index in range(min(declared, frames + 1)):
            own = facts if declared == 1 else {**facts, "frame": index}
            try:
                if index >= frames:
                    # Thousands may be declared that are not there: one row for them.
                    raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, _FEWER)
                yield _radiograph(dataset, index, own, limits)
            except Exception as error:
                failed = as_image_error(error, _pixel_error)
                failed.facts = own
                yield failed


def _read(data: bytes, limits: DecodeLimits) -> Any:
    import pydicom
    from pydicom.filereader import read_partial

    try:
        if _has_meta(data) and DeflatedExplicitVRLittleEndian.encode() in data[:_META_BYTES]:
            return _read_deflated(data, limits)
        dataset = pydicom.dcmread(_Bounded(data), force=True)
        # Of a file that ends inside an element pydicom gives nothing. If that is junk behind the
        # pixels, the film is still there; if it is the pixels, the header is.
        for last in (_PIXEL_DATA, _PIXEL_DATA - 1):
            if "PixelData" not in dataset:
                part = read_partial(_Bounded(data), partial(_is_behind, last), force=True)
                dataset = part if len(part) > len(dataset) else dataset
        # Values are parsed when they are asked for; this finds a damaged file here, not later.
        known = "SOPClassUID" in dataset or "Rows" in dataset or "PixelData" in dataset
    except ImageError:
        raise
    except Exception as error:
        raise as_image_error(error, _header_error) from error
    if not known and not _has_meta(data):
        raise ImageError(
            ErrorCode.NOT_AN_IMAGE, Stage.DECODE, "no signature of a known image format"
        )
    return dataset


def _is_behind(last: int, tag: int, vr: str | None, length: int) -> bool:
    return tag > last


class _Bounded(io.BytesIO):
    """A file in which pydicom cannot lose itself: of zeros it makes an element every 8 bytes."""

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
    """pydicom would inflate without a limit."""
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
    """Whether the file is cut inside its last element, which pydicom then gives as far as it goes.

    To be asked before any value is.
    """
    tags = list(dataset.keys())
    last: Any = dataset.get_item(tags[-1]) if tags else None
    length = getattr(last, "length", None)
    return isinstance(length, int) and 0 < length < 0xFFFFFFFF and len(last.value or b"") < length


def _check_pixel_data(dataset: Any, is_cut: bool) -> None:
    """Raises `ImageError` for an object without pixels: cut off, or of a kind that has none."""
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, "floating-point pixels")
    if dataset.get("PixelData"):
        return
    if is_cut or "Rows" in dataset or "SOPClassUID" not in dataset or is_image_class(dataset):
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the header of an image, and no pixels")
    raise ImageError(ErrorCode.NO_PIXELS, Stage.DECODE, "the object holds no pixel data")


def _frames(dataset: Any, limits: DecodeLimits) -> tuple[int, int]:
    """How many images the object declares, and how many of them its pixel data can hold.

    Raises `ImageError` where there is none to decode.
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
    if is_compressed(dataset):
        if codestreams_held(dataset) > frames:
            # Of several films those behind the declared ones would be passed over.
            raise ImageError(
                ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "more compressed frames than are declared"
            )
        if frames > 1:
            pixels = frames * int(dataset.Rows) * int(dataset.Columns)
            limits.check_unpacked(pixels, len(dataset.PixelData))
        whole = frames_held(dataset, frames) if frames > 1 else 1
        if 0 < whole < frames:
            dataset.NumberOfFrames = whole  # or pydicom joins fragments that are a frame each
        return frames, whole
    subsampled = dataset.get("PhotometricInterpretation") == "YBR_FULL_422"
    if subsampled and int(dataset.Columns) % 2:
        # Two columns share their blue and red: the last one's would be read across the rows.
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "YBR_FULL_422 in an odd number of columns"
        )
    bits = int(dataset.Rows) * int(dataset.Columns) * (2 if subsampled else samples) * allocated
    whole = len(dataset.PixelData) * 8 // bits
    if whole >= 2 * frames:
        # Rows, bits or frames are told wrongly, and a part would pass for the whole film.
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "at least twice the pixels that are declared"
        )
    if 0 < whole < frames:
        dataset.NumberOfFrames = whole  # or pydicom decodes none of them
    return frames, whole


def _complete(dataset: Any) -> None:
    """What pydicom asks for and some objects leave out, where there is no doubt about it.

    Raises `ImageError` where there is.
    """
    for keyword, usual in (("SamplesPerPixel", 1), ("PixelRepresentation", 0)):
        if dataset.get(keyword) is None:
            setattr(dataset, keyword, usual)
    if is_compressed(dataset) and dataset.get("PlanarConfiguration") is None:
        dataset.PlanarConfiguration = 0  # the codestream has its own
    colours = ("PlanarConfiguration",) if int(dataset.SamplesPerPixel) == 3 else ()
    for keyword in ("BitsStored", "PhotometricInterpretation", *colours):
        if dataset.get(keyword) in (None, ""):
            raise ImageError(
                ErrorCode.CORRUPT_IMAGE, Stage.DECODE, f"the header does not say {keyword}"
            )
    photometric = photometric_of(dataset)
    if photometric is None:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            "the header's PhotometricInterpretation is no term of the standard",
        )
    dataset.PhotometricInterpretation = photometric  # pydicom knows it in no other spelling
    if int(dataset.SamplesPerPixel) == 3 and photometric in _OTHER_COLOURS:
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, f"colours in {photometric}")
    if _in_upper_bits(dataset):
        # Of the lowest bits alone a picture would come, and a wrong one.
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, "values in the upper bits (HighBit) of a pixel"
        )


def _in_upper_bits(dataset: Any) -> bool:
    """Whether High Bit says so, as ACR-NEMA allowed, and the pixels do, too."""
    high, stored = dataset.get("HighBit"), int(dataset.BitsStored)
    if not isinstance(high, int) or high < stored or is_compressed(dataset):
        return False
    little = dataset.file_meta.TransferSyntaxUID.is_little_endian
    data = dataset.PixelData[: len(dataset.PixelData) // 2 * 2]
    words = np.frombuffer(data, "<u2" if little else ">u2")
    return int(dataset.BitsAllocated) == 16 and bool((words >> stored).any())


def _radiograph(
    dataset: Any, index: int, facts: dict[str, object], limits: DecodeLimits
) -> Radiograph:
    stored = stored_values(dataset, index, limits)
    header = header_of_frame(dataset, index)
    coloured = 0.0
    if stored.ndim == 3:
        if stored.dtype == np.uint16 and int(dataset.BitsStored) > 8:
            # As of other formats: their upper 8 bits are next to nothing of a film of 12.
            rgb, grey = stretch_to_uint8(stored), stretch_to_uint8(deep_luminance(stored))
        else:
            rgb = stored if stored.dtype == np.uint8 else _to_8_bits(stored, dataset)
            grey = luminance(rgb)
        coloured = coloured_fraction(rgb)
    elif str(dataset.get("PhotometricInterpretation") or "") == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        rgb = apply_color_lut(stored, dataset)[..., :3]
        rgb = (rgb >> (8 * rgb.dtype.itemsize - 8)).astype(np.uint8)
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
    """What an error of pydicom says, which parses a value when it is asked for."""
    return ImageError(
        ErrorCode.CORRUPT_IMAGE,
        Stage.DECODE,
        f"DICOM header cannot be read ({type(error).__name__})",
    )


def _pixel_error(error: Exception) -> ImageError:
    """What an error of a frame's decoder says."""
    told = str(error).lower()
    kind = type(error).__name__
    if isinstance(error, NotImplementedError) or "missing dependencies" in told:
        return ImageError(
            ErrorCode.UNSUPPORTED_TRANSFER_SYNTAX, Stage.DECODE, "no decoder for this encoding"
        )
    signs = ("less than", "truncated", "fewer", "not enough", "no frame", "insufficient")
    if any(sign in told for sign in signs):
        return ImageError(ErrorCode.TRUNCATED, Stage.DECODE, f"pixel data ends early ({kind})")
    return ImageError(
        ErrorCode.CORRUPT_IMAGE, Stage.DECODE, f"pixel data cannot be decoded ({kind})"
    )
