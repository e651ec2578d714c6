"""One frame of a DICOM object: its header, transfer syntax and codec, and checks before it is
decoded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import DecodeLimits
from lungopacity.radiograph.jpeg import (
    END_OF_IMAGE,
    JpegHeader,
    decode_grey_jpeg,
    read_header,
    scans_of,
)
from lungopacity.radiograph.jpeg2000 import has_endless_box, is_cut_jpeg_2000

_JPEG_LOSSLESS = (JPEGLossless, JPEGLosslessSV1)
_JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
# HTJ2K has tiles like JPEG 2000 (T.814).
_JPEG_2000 = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
LOSSY = {JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K}
"""Transfer syntaxes whose codestream may have a larger precision than Bits Stored."""
_OF_ONE_SAMPLE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "")
_SIGNATURE_BYTES = 4
"""Start of image and the marker after it (T.81, T.87, T.800); in RLE, the number of segments
(PS3.5 G.5)."""
_ITEM = b"\xfe\xff\x00\xe0"
"""The tag of an item. The first one of compressed pixels is the offset table (PS3.5 A.4)."""
_OF_MACROS = {
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
}
"""Macros of functional groups about the pixels of a frame (PS3.3 C.7.6.16.2.1, .9 and .10)."""


def set_transfer_syntax(dataset: Any) -> None:
    """Fill in a missing transfer syntax: the encoding that pydicom found, by default Implicit VR
    Little Endian (PS3.5 10.1)."""
    from pydicom.dataset import FileMetaDataset

    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" in dataset.file_meta:
        return
    implicit, little = getattr(dataset, "original_encoding", (True, True))
    explicit = ExplicitVRBigEndian if little is False else ExplicitVRLittleEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def is_compressed(dataset: Any) -> bool:
    """Whether the pixels are compressed. Raises `ImageError` (`unsupported_transfer_syntax`) for a
    transfer syntax that pydicom does not know."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax:
        raise ImageError(
            ErrorCode.UNSUPPORTED_TRANSFER_SYNTAX,
            Stage.DECODE,
            "a transfer syntax that is private or new",
        )
    return bool(syntax.is_compressed)


def check_encapsulation(dataset: Any, native_bytes: int) -> None:
    """Raises `ImageError` (`corrupt_image`) if the pixels are encapsulated (PS3.5 A.4), and the
    transfer syntax is one of pixels that are not, or the reverse. Codestreams of several frames
    would be taken for the pixels of one.

    native_bytes: size of all declared frames, if they are not compressed.
    """
    pixels = dataset["PixelData"]
    is_encapsulated = pixels.is_undefined_length or pixels.value.startswith(_ITEM)
    has_native_size = len(pixels.value) in (native_bytes, native_bytes + 1)  # of an even length
    if not pixels.is_undefined_length and has_native_size and not is_compressed(dataset):
        is_encapsulated = False  # the first pixels look like the tag by chance
    if is_encapsulated != is_compressed(dataset):
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            f"pixels that are {'' if is_encapsulated else 'not '}encapsulated, against their "
            "transfer syntax",
        )


class AmendedHeader:
    """The header of an object, with other values for some of its elements."""

    def __init__(self, dataset: Any, amended: Mapping[str, Any]) -> None:
        self._dataset, self._amended = dataset, amended

    def get(self, keyword: str) -> Any:
        if keyword in self._amended:
            return self._amended[keyword]
        return self._dataset.get(keyword)

    def __getattr__(self, name: str) -> Any:
        return self._amended[name] if name in self._amended else getattr(self._dataset, name)


def header_of_frame(dataset: Any, index: int) -> Any:
    """The header for this frame. Values of the frame's functional groups come first, then those of
    the groups that all frames share, then the object's own."""
    from pydicom.sequence import Sequence

    own: dict[str, Any] = {}
    places = {"SharedFunctionalGroupsSequence": 0, "PerFrameFunctionalGroupsSequence": index}
    for keyword, place in places.items():
        groups = dataset.get(keyword)
        if not isinstance(groups, Sequence) or place >= len(groups):
            continue
        for macro, keywords in _OF_MACROS.items():
            items = groups[place].get(macro)
            values = {each: items[0].get(each) for each in keywords} if items else {}
            if any(values.values()):
                own |= values
    return AmendedHeader(dataset, own) if own else dataset


def frames_held(dataset: Any, declared: int) -> int:
    """How many of the declared frames the compressed pixel data can hold: each frame has at least
    one fragment, and an entry in the offset table, if there is one (PS3.5 A.4)."""
    offsets, begins = _fragments(dataset)
    return min(declared, len(begins), offsets or declared)


def codestreams_held(dataset: Any) -> int:
    """How many fragments of the compressed pixel data begin a codestream. Those begin like the
    first fragment; fragments that continue a frame do not."""
    _, begins = _fragments(dataset)
    return begins.count(begins[0]) if begins else 0


def forget_offsets(dataset: Any, frames: int) -> None:
    """Empty the offset table of compressed pixel data where frames are told apart without it: a
    single frame, or a fragment for each. Some writers fill it with zeros, or with the offsets of
    all fragments, and pydicom believes it."""
    data: bytes = dataset.PixelData
    table_bytes = int.from_bytes(data[4:8], "little")
    if not data.startswith(_ITEM) or not table_bytes:
        return
    _, begins = _fragments(dataset)
    if frames == 1 or len(begins) == frames == begins.count(begins[0]):
        dataset["PixelData"].value = _ITEM + bytes(4) + data[8 + table_bytes :]


def _fragments(dataset: Any) -> tuple[int, list[bytes]]:
    """The number of entries in the offset table of compressed pixel data, and the first bytes of
    each fragment."""
    from pydicom.encaps import generate_fragments, parse_basic_offsets

    buffer = io.BytesIO(dataset.PixelData)
    offsets = len(parse_basic_offsets(buffer))
    begins: list[bytes] = []
    with contextlib.suppress(ValueError):  # fragments after damage cannot be found
        begins.extend(fragment[:_SIGNATURE_BYTES] for fragment in generate_fragments(buffer))
    return offsets, begins


def stored_values(dataset: Any, index: int, limits: DecodeLimits) -> npt.NDArray[Any]:
    """One frame as its decoder gives it, (height, width) or (height, width, 3).

    Raises `ImageError`, and whatever decoders raise.
    """
    from pydicom.pixels import pixel_array

    frames = int(dataset.get("NumberOfFrames") or 1)
    options: dict[str, int] = {}
    if is_compressed(dataset):
        from pydicom.encaps import get_frame

        frame = get_frame(dataset.PixelData, index, number_of_frames=frames)
        header = read_header(frame)
        _check_frame(frame, header, dataset, limits)
        if header is not None and header.colours is not None:
            # Some encoders convert RGB to luma and chroma, and leave RGB in the header. With chroma
            # for green and blue, a film would lose most of its contrast.
            dataset.PhotometricInterpretation = header.colours
        if header is not None and _is_plain_jpeg(dataset, header):
            grey = decode_grey_jpeg(frame, header)
            if grey is not None:
                return grey
        if header is not None and dataset.file_meta.TransferSyntaxUID in _JPEG_LOSSLESS:
            # GDCM would clear the bits above Bits Stored, and ends the process at 7 of 8.
            options["bits_stored"] = header.bits
    if dataset.file_meta.TransferSyntaxUID == JPEGExtended12Bit:
        from lungopacity.radiograph.dicom_jpeg12 import register

        register()
    # `without_unused_bits` looks at the bits that pydicom would clear.
    keeps_all = str(dataset.get("PhotometricInterpretation") or "").startswith(
        ("MONOCHROME", "RGB")
    )
    high, kept = dataset.get("HighBit"), int(dataset.BitsStored)
    may_be_shifted = isinstance(high, int) and high >= kept
    # Without an index pydicom would decode all frames.
    array: npt.NDArray[Any] = pixel_array(
        dataset,
        index=index if frames > 1 else 0,
        correct_unused_bits=not keeps_all and not may_be_shifted,
        **options,
    )
    if may_be_shifted and dataset.file_meta.TransferSyntaxUID not in LOSSY:
        _check_not_shifted(array, kept)
    return array


def _check_not_shifted(stored: npt.NDArray[Any], kept: int) -> None:
    """Raises `ImageError` for values in the upper bits of 16, as ACR-NEMA allowed, where High Bit
    says so: the lowest `kept` bits would give a picture, but a wrong one."""
    if stored.dtype.itemsize != 2:
        return
    spare = 16 - kept
    # Shifting up and down again gives a negative value of the lower bits back as it is.
    differs = stored != np.right_shift(np.left_shift(stored, spare), spare)
    if (differs & (stored.view(np.uint16) >> kept > 0)).any():
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, "values in the upper bits (HighBit) of a pixel"
        )


def _check_frame(
    frame: bytes, header: JpegHeader | None, dataset: Any, limits: DecodeLimits
) -> None:
    """Raises `ImageError` for a coded frame that would make decoders hang, kill the process, or
    fill lost pixels with grey."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if header is not None:
        # Decoders trust the size in the codestream, and allocate memory for it.
        limits.check_pixels(header.rows, header.columns)
        limits.check_scans(scans_of(frame))
    # pyjpegls searches for the end of a JPEG-LS for ever.
    endless = syntax in _JPEG_LS and END_OF_IMAGE not in frame
    if endless or (syntax in _JPEG_2000 and is_cut_jpeg_2000(frame)):
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the frame ends before its pixels do")
    if has_endless_box(frame):
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "a JPEG 2000 with a box of zero length"
        )
    if header is None:
        return
    if _contradicts(dataset, header):
        # GDCM would end the process. It and others would take samples of red, green and blue, or
        # the lower bits of grey, for pixels.
        raise ImageError(ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the frame contradicts the header")
    if syntax == JPEGBaseline8Bit and header.components > 1:
        # Only for its errors: other decoders silently fill lost pixels with grey.
        decode_grey_jpeg(frame, header, at_least=1)


def _contradicts(dataset: Any, header: JpegHeader) -> bool:
    one_sample = int(dataset.get("SamplesPerPixel") or 1) == 1
    one_by_name = str(dataset.get("PhotometricInterpretation") or "") in _OF_ONE_SAMPLE
    return (
        (header.rows, header.columns) != (dataset.Rows, dataset.Columns)
        or not header.bits <= int(dataset.BitsAllocated) <= 16
        or not one_sample == one_by_name == (header.components == 1)
    )


def _is_plain_jpeg(dataset: Any, header: JpegHeader) -> bool:
    """Whether libjpeg-turbo can decode the frame: to the same pixels, four times as fast as GDCM,
    which pydicom would try first."""
    return (
        dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
        and header.components == 1
        and dataset.BitsAllocated == 8
        and not dataset.get("PixelRepresentation")
    )
