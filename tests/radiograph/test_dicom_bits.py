"""Values that need more bits than Bits Stored: overlays, padding, or a header that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.films import dicom, grey_film, one_film
from tests.radiograph.dicom_files import RAMP, changed

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


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("lowest", [0, -3000])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 6000, "WindowWidth": 9000}])
def test_too_few_bits_stored_do_not_wrap_bright_values_around(photometric, lowest, window):
    stored = unsigned(FILM + lowest)
    elements = {
        "PhotometricInterpretation": photometric, "PixelRepresentation": int(lowest < 0), **window,
    }  # fmt: skip
    expected = one_film(dicom(stored, **SIXTEEN_BITS, **elements)).pixels
    assert expected.std() > 20
    for too_few in (8, 10, 12):
        bits = {"BitsStored": too_few, "HighBit": too_few - 1}
        np.testing.assert_array_equal(one_film(dicom(stored, **bits, **elements)).pixels, expected)


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
