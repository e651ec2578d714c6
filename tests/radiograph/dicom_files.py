"""Makes DICOM films for the tests."""

from __future__ import annotations

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits
from tests.films import dicom, one_film

RAMP = np.linspace(0, 4095, 4800).round().reshape(80, 60).astype(np.uint16)
"""A wedge of 12 bits, (80, 60) uint16."""


def code_of(data: bytes, limits: DecodeLimits | None = None) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        one_film(data, limits)
    return caught.value.code


def changed(data: bytes, change) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    change(dataset)
    return saved(dataset)


def saved(dataset: Dataset, **options) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, force_encoding=bool(options), **options)
    return buffer.getvalue()


def without(data: bytes, keyword: str) -> bytes:
    return changed(data, lambda dataset: delattr(dataset, keyword))


def compressed(syntax) -> bytes:
    return changed(dicom(RAMP), lambda dataset: dataset.compress(syntax))


TWELVE_BITS = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11}
EIGHT_BITS = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}


def of_codestreams(
    frames: list[bytes], syntax, shape: tuple[int, int], has_offsets: bool = True, **elements
) -> bytes:
    """An object with these compressed frames, of 8 bits unless `elements` say otherwise."""

    def encapsulated(dataset):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate(frames, has_bot=has_offsets)
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True

    return changed(dicom(np.zeros(shape, np.uint16), **(EIGHT_BITS | elements)), encapsulated)


def coded(syntax) -> bytes:
    """RAMP in an encoding that pydicom cannot write, or not with every Python."""
    if syntax in (HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K):
        frame = imagecodecs.htj2k_encode(RAMP, reversible=True)
    elif syntax == JPEGLSLossless:
        frame = imagecodecs.jpegls_encode(RAMP)
    elif syntax == JPEGExtended12Bit:
        frame = imagecodecs.jpeg8_encode(RAMP, level=100, bitspersample=12)
    else:
        first_order = 1 if syntax == JPEGLosslessSV1 else 4
        frame = imagecodecs.jpeg8_encode(
            RAMP, lossless=True, predictor=first_order, bitspersample=12
        )
    return of_codestreams([frame], syntax, RAMP.shape, **TWELVE_BITS)


def without_preamble(data: bytes) -> bytes:
    return data[132:]


def without_meta(syntax) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    dataset.file_meta = FileMetaDataset()
    little, implicit = syntax.is_little_endian, syntax.is_implicit_VR
    return saved(dataset, implicit_vr=implicit, little_endian=little)


def in_syntax(syntax) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = RAMP.astype(">u2").tobytes()
    return saved(dataset, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)


def shipped(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path).read_bytes()
