"""The standard's grey pipeline, from stored values to grey pixels."""

import numpy as np
import pytest

from tests.films import dicom, one_film
from tests.radiograph.dicom_files import EIGHT_BITS, RAMP, changed


def test_monochrome1_is_inverted_to_monochrome2():
    plain = one_film(dicom(RAMP))
    inverted = one_film(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted.pixels, 255 - plain.pixels)
    assert inverted.photometric_interpretation == "MONOCHROME1"


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["IDENTITY", "INVERSE"])
def test_presentation_lut_shape_is_not_a_second_inversion(photometric, shape):
    """Nor does it override PhotometricInterpretation, to which the standard ties it in an image."""
    told_once = one_film(dicom(RAMP, PhotometricInterpretation=photometric))
    told_twice = one_film(
        dicom(RAMP, PhotometricInterpretation=photometric, PresentationLUTShape=shape)
    )
    np.testing.assert_array_equal(told_once.pixels, told_twice.pixels)


def test_a_window_decides_what_is_black_and_white():
    pixels = one_film(dicom(RAMP, WindowCenter=2048, WindowWidth=1024)).pixels
    assert pixels[RAMP < 1500].max() == 0
    assert pixels[RAMP > 2600].min() == 255
    middle = pixels[np.abs(RAMP.astype(int) - 2048) < 8]
    assert np.all(np.abs(middle.astype(int) - 128) <= 3)


def test_a_window_that_clips_nothing_is_not_undone_by_stretching():
    narrow = (RAMP // 4 + 1024).astype(np.uint16)  # 1024 … 2047 of 0 … 4095
    pixels = one_film(dicom(narrow, WindowCenter=2048, WindowWidth=4096)).pixels
    assert 60 <= pixels.min() <= 68
    assert 123 <= pixels.max() <= 131


def with_text(film: np.ndarray, value: int) -> np.ndarray:
    """A film with a burnt-in line of text, one in seventy pixels, above all other values."""
    film = film.copy()
    film[:4, :17] = value
    return film


@pytest.mark.parametrize("falls", [False, True])
def test_text_above_the_range_of_the_film_does_not_blacken_it(falls):
    film = RAMP // 8 + 500
    if falls:
        text, elements = with_text(film, 0), {"RescaleSlope": -1, "RescaleIntercept": 4095}
    else:
        text, elements = with_text(film, 4095), {}
    found = one_film(dicom(text, **elements)).pixels
    alone = one_film(dicom(film, **elements)).pixels
    assert np.abs(found.astype(int) - alone)[4:].max() <= 0.03 * 255
    assert found[:4, :17].min() == 255


def test_dead_pixels_below_the_range_of_the_film_do_not_brighten_it():
    film = RAMP // 8 + 3500
    found = one_film(dicom(with_text(film, 0))).pixels
    assert np.abs(found.astype(int) - one_film(dicom(film)).pixels)[4:].max() <= 0.03 * 255
    assert found[:4, :17].max() == 0


def test_a_film_of_nearly_one_value_keeps_the_rest():
    film = np.where(RAMP > 4050, RAMP, 100)
    assert one_film(dicom(film.astype(np.uint16))).pixels[RAMP > 4050].min() > 240


def test_values_a_little_above_the_rest_are_not_clipped():
    film = np.clip(RAMP, 0, 3000)
    film[-2:, -20:] = 4095
    found = one_film(dicom(film)).pixels
    assert found[RAMP == 1024].max() == round(1024 / 4095 * 255)


def test_rescale_comes_before_the_window():
    pixels = one_film(
        dicom(RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3096, WindowWidth=2048)
    ).pixels
    assert pixels[RAMP < 1500].max() == 0
    assert pixels[RAMP > 2600].min() == 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_the_named_window_function_is_the_standards_formula(function):
    """An independent implementation of PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    centre, width, top = 1800.0, 900.0, 4095.0
    x = RAMP.astype(np.float64)
    if function == "LINEAR":
        share = (x - (centre - 0.5)) / (width - 1) + 0.5
    elif function == "LINEAR_EXACT":
        share = (x - centre) / width + 0.5
    else:
        share = 1 / (1 + np.exp(-4 * (x - centre) / width))
    expected = np.clip(share, 0, 1) * top / top * 255
    pixels = one_film(
        dicom(RAMP, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function)
    ).pixels
    assert np.abs(pixels - expected).max() <= 0.51


@pytest.mark.parametrize("centre", [2048, 2048.5])
def test_a_window_of_width_1_is_a_step(centre):
    """PS3.3 C.11.2.1.2: black up to centre - 0.5, white above."""
    found = one_film(dicom(RAMP, WindowCenter=centre, WindowWidth=1)).pixels
    np.testing.assert_array_equal(found, np.where(centre - 0.5 < RAMP, 255, 0))


def test_a_linear_exact_window_may_be_narrower_than_1():
    """For values that a rescale maps to 0 … 1."""
    shares = {"RescaleSlope": 2.0**-12, "RescaleIntercept": 0, "VOILUTFunction": "LINEAR_EXACT"}
    found = one_film(dicom(RAMP, **shares, WindowCenter=0.5, WindowWidth=0.25)).pixels
    assert np.abs(found - 255 * np.clip((RAMP / 4096 - 0.375) / 0.25, 0, 1)).max() <= 0.51


@pytest.mark.parametrize(
    "window", [(2048, 0), (2048, -5), (2048, 0.5), ("", ""), ("nan", 400), (2048, "nan")]
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_a_window_of_zero_width_is_ignored(window):
    centre, width = window
    np.testing.assert_array_equal(
        one_film(dicom(RAMP, WindowCenter=centre, WindowWidth=width)).pixels,
        one_film(dicom(RAMP)).pixels,
    )


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_12_bit_window_left_in_an_8_bit_copy_is_ignored(photometric):
    film = (RAMP // 16).astype(np.uint8)
    elements = {**EIGHT_BITS, "PixelData": film.tobytes(), "PhotometricInterpretation": photometric}
    left = {"WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_array_equal(
        one_film(dicom(film, **elements, **left)).pixels, one_film(dicom(film, **elements)).pixels
    )


def test_the_first_of_several_windows_is_used():
    both = one_film(dicom(RAMP, WindowCenter=[1000, 3000], WindowWidth=[500, 500])).pixels
    first = one_film(dicom(RAMP, WindowCenter=1000, WindowWidth=500)).pixels
    np.testing.assert_array_equal(both, first)
    none_first = dicom(RAMP, WindowCenter=[3000, 1000], WindowWidth=[0, 500])
    np.testing.assert_array_equal(one_film(none_first).pixels, first)


def test_values_below_a_window_are_black_even_with_a_falling_rescale():
    """PS3.3 C.11.2.1.2: values below the window are black, however they were computed."""
    falling = {"RescaleSlope": -1, "RescaleIntercept": 4095}
    rising = one_film(dicom(4095 - RAMP)).pixels
    np.testing.assert_array_equal(one_film(dicom(RAMP, **falling)).pixels, rising)
    for function in ("LINEAR", "LINEAR_EXACT"):
        whole = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": function}
        found = one_film(dicom(RAMP, **falling, **whole)).pixels
        assert np.abs(found.astype(int) - rising).max() <= 1
    narrow = one_film(dicom(RAMP, **falling, WindowCenter=1000, WindowWidth=500)).pixels
    assert narrow[RAMP > 3400].max() == 0
    assert narrow[RAMP < 2800].min() == 255
    curved = {"WindowCenter": 2048, "WindowWidth": 2000, "VOILUTFunction": "SIGMOID"}
    found = one_film(dicom(RAMP, **falling, **curved)).pixels
    assert found[0, 0] > 240 > 15 > found[-1, -1]


def test_signed_values_are_read_as_signed():
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    pixels = one_film(dicom(signed.view(np.uint16) & 0x0FFF, PixelRepresentation=1)).pixels
    np.testing.assert_array_equal(pixels, one_film(dicom(RAMP)).pixels)


def test_padding_is_black_and_does_not_affect_the_range():
    padded = np.clip(RAMP, 1000, 3000)
    inner = one_film(dicom(padded)).pixels
    padded[:5] = 0
    found = one_film(dicom(padded, PixelPaddingValue=0)).pixels
    assert found[:5].max() == 0
    np.testing.assert_array_equal(found[6:], inner[6:])


@pytest.mark.parametrize(
    ("signed", "bits", "vr", "value"),
    [
        (True, 12, "US", 63536),
        (True, 12, "US", 2096),
        (True, 12, "SS", -2000),
        (True, 16, "US", 63536),
        (False, 16, "SS", -2000),
        (False, 16, "US", 63536),
    ],
)
def test_padding_is_found_if_it_was_written_with_the_other_signedness(signed, bits, vr, value):
    stored = np.clip(RAMP, 300, 2000).astype(np.int32)
    stored[:5] = -2000

    def padded(dataset):
        dataset.add_new("PixelPaddingValue", vr, value)

    for kept in (2**bits - 1, 0xFFFF):  # without and with the extension of the sign
        words = {"PixelRepresentation": int(signed), "BitsStored": bits, "HighBit": bits - 1}
        data = changed(dicom((stored & kept).astype(np.uint16), **words), padded)
        found = one_film(data).pixels
        inner = one_film(dicom(np.clip(RAMP, 300, 2000))).pixels[6:]
        np.testing.assert_array_equal(found[6:], inner)
        assert found[:5].max() == 0


def test_padding_of_the_highest_signed_value_is_black():
    stored = np.clip(RAMP.astype(np.int16) - 2048, -1000, 1000)
    inner = one_film(dicom(stored.view(np.uint16) & 0x0FFF, PixelRepresentation=1)).pixels
    stored[:5] = 2047

    def padded(dataset):
        dataset.add_new("PixelPaddingValue", "SS", 2047)

    data = dicom(stored.view(np.uint16) & 0x0FFF, PixelRepresentation=1)
    found = one_film(changed(data, padded)).pixels
    assert found[:5].max() == 0
    np.testing.assert_array_equal(found[6:], inner[6:])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_film_of_padding_only_is_black(photometric):
    elements = {"PixelPaddingValue": 7, "PhotometricInterpretation": photometric}
    assert not one_film(dicom(np.full_like(RAMP, 7), **elements)).pixels.any()


def test_a_padding_value_that_no_pixel_can_have_is_ignored():
    found = one_film(dicom(RAMP, PixelPaddingValue=63536)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


def test_padding_of_a_monochrome1_film_is_black_too():
    padded = RAMP.copy()
    padded[:5] = 0
    found = one_film(dicom(padded, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"))
    assert found.pixels[:5].max() == 0
    assert found.pixels[6].min() > 150


@pytest.mark.parametrize(("value", "limit"), [(10, 20), (20, 10)])
def test_a_padding_range_is_padding(value, limit):
    padded = np.clip(RAMP, 1000, 3000)
    padded[:3], padded[3:5] = 10, 20
    found = one_film(dicom(padded, PixelPaddingValue=value, PixelPaddingRangeLimit=limit)).pixels
    assert found[:5].max() == 0
    assert found[6:].max() == 255


@pytest.mark.parametrize(
    ("element", "shape"),
    [
        ({"PixelAspectRatio": [2, 1]}, (80, 30)),
        ({"PixelAspectRatio": [1, 2]}, (40, 60)),
        ({"PixelSpacing": [0.1, 0.2]}, (40, 60)),
        ({"NominalScannedPixelSpacing": [0.2, 0.1]}, (80, 30)),
        ({"ImagerPixelSpacing": [0.143, 0.143]}, RAMP.shape),
        ({"PixelAspectRatio": [1, 1]}, RAMP.shape),
        ({"PixelSpacing": [0.1, 0.105]}, (76, 60)),
        ({"PixelAspectRatio": [0, 7]}, RAMP.shape),
        # The spacing says more: many write this ratio in any case.
        ({"PixelAspectRatio": [1, 1], "PixelSpacing": [0.2, 0.1]}, (80, 30)),
    ],
)
def test_pixels_are_made_square(element, shape):
    found = one_film(dicom(RAMP, **element))
    assert found.pixels.shape == shape
    assert (found.rows, found.columns) == RAMP.shape


def test_8_bits_without_a_window_are_not_stretched():
    film = np.clip(RAMP // 16, 30, 200).astype(np.uint16)

    def eight_bits(dataset):
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit = 7
        dataset.PixelData = film.astype(np.uint8).tobytes()
        dataset["PixelData"].VR = "OB"

    np.testing.assert_array_equal(one_film(changed(dicom(film), eight_bits)).pixels, film)


def test_8_bits_with_a_falling_rescale_are_inverted():
    film = (RAMP // 16).astype(np.uint8)
    told = {**EIGHT_BITS, "PixelData": film.tobytes(), "RescaleSlope": -2, "RescaleIntercept": 9}
    np.testing.assert_array_equal(one_film(dicom(film, **told)).pixels, 255 - film)


def test_a_window_in_which_no_value_is_brighter_than_a_third_is_kept():
    found = one_film(dicom(RAMP, WindowCenter=4915, WindowWidth=4096)).pixels
    assert found.max() == round(0.3 * 255)
