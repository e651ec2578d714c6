"""Values that need more bits than Bits Stored: overlays, padding, or a header that is wrong."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from lungopacity.errors import ErrorCode
from tests.films import dicom, encoded, grey_film, one_film
from tests.radiograph.dicom_files import RAMP, TWELVE_BITS, changed, code_of, of_codestreams

FILM = grey_film(1, 300, 250).astype(np.int32) * 48
"""Values of 14 bits."""
SIXTEEN_BITS = {"BitsStored": 16, "HighBit": 15}


def unsigned(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32).astype(np.uint16)


@pytest.mark.parametrize("every", [3, 250])
@pytest.mark.parametrize("bits", [0x1000, 0x8000, 0xF000])
def test_overlays_above_bits_stored_are_ignored(every, bits):
    for film in (RAMP, unsigned(FILM // 4)):
        overlay = film.copy()
        overlay[::every] |= bits
        overlay[:, ::every] |= bits
        np.testing.assert_array_equal(one_film(dicom(overlay)).pixels, one_film(dicom(film)).pixels)


def test_an_overlay_above_24_bits_is_ignored():
    film = RAMP.astype("<u4") << 12
    overlay = film.copy()
    overlay[::3] |= 0x8000_0000
    words = {"BitsAllocated": 32, "BitsStored": 24, "HighBit": 23}
    found = one_film(dicom(RAMP, **words, PixelData=overlay.tobytes())).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("lowest", [0, -3000, -12240])
@pytest.mark.parametrize("has_window", [False, True])
def test_too_few_bits_stored_do_not_wrap_bright_values_around(photometric, lowest, has_window):
    stored = unsigned(FILM + lowest)
    window = {"WindowCenter": 6000 + lowest, "WindowWidth": 9000} if has_window else {}
    elements = {
        "PhotometricInterpretation": photometric, "PixelRepresentation": int(lowest < 0), **window,
    }  # fmt: skip
    expected = one_film(dicom(stored, **SIXTEEN_BITS, **elements)).pixels
    assert expected.std() > 20
    for too_few in (8, 10, 12):
        bits = {"BitsStored": too_few, "HighBit": too_few - 1}
        np.testing.assert_array_equal(one_film(dicom(stored, **bits, **elements)).pixels, expected)


def test_too_few_bits_stored_of_a_frame_with_functional_groups_do_not_wrap_them_either():
    window = Dataset()
    window.WindowCenter, window.WindowWidth = 6000, 9000
    groups = Dataset()
    groups.FrameVOILUTSequence = [window]
    found = one_film(dicom(unsigned(FILM), SharedFunctionalGroupsSequence=[groups])).pixels
    at_the_top = one_film(dicom(unsigned(FILM), WindowCenter=6000, WindowWidth=9000)).pixels
    np.testing.assert_array_equal(found, at_the_top)


@pytest.mark.parametrize("syntax", [JPEGLSNearLossless, JPEG2000])
def test_signed_values_of_a_lossy_codec_need_not_extend_their_sign(syntax):
    """In the words of 16 bits that were coded, -1 is 4095: not a value above 2047."""
    stored = unsigned(RAMP.astype(int) - 2048) & 0xFFF
    frame = (
        imagecodecs.jpegls_encode(stored, level=1)
        if syntax == JPEGLSNearLossless
        else imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, codecformat="j2k")
    )
    elements = TWELVE_BITS | {"PixelRepresentation": 1}
    found = one_film(of_codestreams([frame], syntax, stored.shape, **elements)).pixels
    assert np.abs(found.astype(int) - one_film(dicom(RAMP)).pixels).max() <= 1


@pytest.mark.parametrize("lowest", [-2048, 0])
def test_values_that_a_lossy_codec_carried_out_of_the_signed_range_are_clipped(lowest):
    stored = np.maximum(RAMP.astype(int) - 2048, lowest)
    beyond = np.where(stored < -1900, stored - 200, np.where(stored > 1900, stored + 200, stored))
    frame = imagecodecs.jpegls_encode(unsigned(beyond))
    elements = TWELVE_BITS | {"PixelRepresentation": 1, "WindowCenter": 0, "WindowWidth": 4096}
    found = one_film(of_codestreams([frame], JPEGLSNearLossless, RAMP.shape, **elements)).pixels
    expected = np.clip(beyond, -2048, 2047) / 4095 * 255 + 127.5
    assert np.abs(found - expected).max() <= 1


def test_signed_values_may_alternate_between_the_ends_of_their_range():
    """Whether or not the sign is extended, however rough that is."""
    stored = np.where(np.indices(RAMP.shape).sum(axis=0) % 2, 2047, -2048)
    for cells in (unsigned(stored), unsigned(stored) & 0xFFF):
        found = one_film(dicom(cells, PixelRepresentation=1)).pixels
        np.testing.assert_array_equal(found, np.where(stored > 0, 255, 0))


@pytest.mark.parametrize(
    ("signed", "vr", "value"),
    [(False, "US", 65535), (False, "US", 32768), (False, "SS", -2), (True, "SS", -32768)],
)
def test_padding_that_bits_stored_have_no_room_for_is_black(signed, vr, value):
    film = np.clip(RAMP, 300, 2000).astype(np.int32)
    film[:5] = value
    data = dicom(unsigned(film), PixelRepresentation=int(signed))

    def padded(dataset):
        dataset.add_new("PixelPaddingValue", vr, value)

    found = one_film(changed(data, padded)).pixels
    assert found[:5].max() == 0
    np.testing.assert_array_equal(found[6:], one_film(dicom(np.clip(RAMP, 300, 2000))).pixels[6:])


def test_a_film_of_one_row_has_bits_too():
    row = np.full((1, 40), 7, np.uint16)
    row[0, ::2] |= 0x4000
    assert one_film(dicom(row)).pixels.shape == (1, 40)


def test_bits_of_colours_are_treated_in_the_same_way():
    def colour(film: np.ndarray, bits: int) -> np.ndarray:
        def coloured(dataset):
            dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
            dataset.PhotometricInterpretation = "RGB"
            dataset.BitsStored, dataset.HighBit = bits, bits - 1
            dataset.PixelData = np.repeat(film[..., None], 3, axis=2).astype("<u2").tobytes()

        return one_film(changed(dicom(unsigned(film)), coloured)).pixels

    expected = colour(FILM, 16)
    assert expected.std() > 20
    for too_few in (8, 10, 12):
        np.testing.assert_array_equal(colour(FILM, too_few), expected)
    overlay = FILM // 4
    expected = colour(overlay, 12)
    overlay = overlay.copy()
    overlay[::3] |= 0x8000
    np.testing.assert_array_equal(colour(overlay, 12), expected)


def encodings(stored: np.ndarray, **elements: object) -> list[bytes]:
    """These values uncompressed and in encodings that keep all 16 bits."""
    plain = dicom(stored, **elements)
    lossless = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=16)
    coded = {JPEGLosslessSV1: lossless, JPEGLSLossless: imagecodecs.jpegls_encode(stored)}
    all_16 = {**TWELVE_BITS, **elements}
    return [
        plain,
        changed(plain, lambda dataset: dataset.compress(RLELossless)),
        *(of_codestreams([coded[syntax]], syntax, stored.shape, **all_16) for syntax in coded),
    ]


@pytest.mark.parametrize("is_signed", [False, True])
def test_values_in_the_upper_bits_are_refused(is_signed):
    """ACR-NEMA allowed them; the lowest bits would give a picture, but a wrong one."""
    stored = unsigned(RAMP.astype(int) - 2048 if is_signed else RAMP)
    elements = {"HighBit": 15, "PixelRepresentation": int(is_signed)}
    for data in encodings(stored << 4, **elements):
        assert code_of(data) is ErrorCode.UNSUPPORTED
    for mistaken in (*encodings(stored, **elements), dicom(stored & 0xFFF, **elements)):
        np.testing.assert_array_equal(one_film(mistaken).pixels, one_film(dicom(RAMP)).pixels)


def test_too_few_bits_stored_do_not_wrap_bright_values_of_any_encoding():
    stored = unsigned(FILM)
    expected = one_film(dicom(stored, **SIXTEEN_BITS)).pixels
    for data in encodings(stored):
        np.testing.assert_array_equal(one_film(data).pixels, expected)


def test_a_lossless_jpeg_of_7_of_8_bits_does_not_end_the_process():
    film = (RAMP // 32).astype(np.uint8)
    frame = imagecodecs.jpeg8_encode(film, lossless=True, predictor=1)
    seven = {"BitsStored": 7, "HighBit": 6}
    found = one_film(of_codestreams([frame], JPEGLosslessSV1, film.shape, **seven)).pixels
    assert np.abs(found - film * (255 / 127)).max() <= 0.51


def test_pixels_of_no_bits_are_corrupt():
    film = (RAMP // 16).astype(np.uint8)
    for frame, syntax in (
        (encoded(film, "JPEG", quality=98), JPEGBaseline8Bit),
        (imagecodecs.jpegls_encode(film), JPEGLSLossless),
    ):
        data = of_codestreams([frame], syntax, film.shape, BitsStored=0)
        assert code_of(data) is ErrorCode.CORRUPT_IMAGE
