"""Where the frames of compressed pixels begin and end."""

import io
from functools import partial
from struct import pack

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from lungopacity.errors import ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiographs
from tests.films import dicom, one_film
from tests.radiograph.dicom_files import EIGHT_BITS, RAMP, TWELVE_BITS, changed, of_codestreams

ENCODERS = {
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEG2000Lossless: partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k"),
}


def compressed(films: list[np.ndarray], syntax, offsets: list[int], fragments: int = 1) -> bytes:
    """Each film as a frame in so many fragments, after this offset table."""
    frames = [ENCODERS[syntax](np.ascontiguousarray(film)) for film in films]
    data = of_codestreams(frames, syntax, RAMP.shape, NumberOfFrames=len(films), **TWELVE_BITS)
    table = np.array(offsets, "<u4").tobytes()

    def with_table(dataset):
        without = encapsulate(frames, fragments, has_bot=False)
        dataset["PixelData"].value = without[:4] + pack("<I", len(table)) + table + without[8:]

    return changed(data, with_table)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("offsets", [[0, 0, 0], [0, 4, 8], [0], [0, 0, 0, 0]])
def test_a_wrong_offset_table_costs_no_frame_that_has_a_fragment_of_its_own(syntax, offsets):
    films = [RAMP, RAMP[::-1], RAMP // 2]
    found = list(decode_radiographs(compressed(films, syntax, offsets), limits=DecodeLimits()))
    assert [film.frame for film in found] == [0, 1, 2]
    for film, stored in zip(found, films, strict=True):
        np.testing.assert_array_equal(film.pixels, one_film(dicom(stored)).pixels)


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("offsets", [[0, 100, 200], [77], [0]])
def test_a_wrong_offset_table_does_not_cut_a_single_frame(syntax, offsets):
    found = one_film(compressed([RAMP], syntax, offsets, fragments=3)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


def test_pixels_are_encapsulated_or_not_as_their_transfer_syntax_says():
    """A program that changed only the transfer syntax: three codestreams have enough bytes for one
    frame of noise."""
    films = np.random.default_rng(0).integers(0, 4096, (3, *RAMP.shape)).astype(np.uint16)
    coded = compressed(list(films), JPEGLSLossless, [])
    for data, other in ((coded, ExplicitVRLittleEndian), (dicom(films[0]), RLELossless)):
        name = pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID
        mistaken = data.replace(name.encode(), other.ljust(len(name), "\0").encode())
        with pytest.raises(ImageError, match="encapsulated, against their transfer syntax"):
            list(decode_radiographs(mistaken, limits=DecodeLimits()))


def test_native_pixels_may_begin_like_an_item():
    film = np.array([[254, 255, 0], [224, 9, 200], [7, 7, 7]], np.uint8)
    data = dicom(film, **EIGHT_BITS, PixelData=film.tobytes() + b"\0")
    np.testing.assert_array_equal(one_film(data).pixels, film)
    words = np.stack([RAMP] * 2)
    words[0, 0, :2] = 0xFFFE, 0xE000
    elements = {"BitsStored": 16, "HighBit": 15, "NumberOfFrames": 2, "PixelData": words.tobytes()}
    _, second = decode_radiographs(dicom(RAMP, **elements), limits=DecodeLimits())
    np.testing.assert_array_equal(second.pixels, one_film(dicom(RAMP)).pixels)
