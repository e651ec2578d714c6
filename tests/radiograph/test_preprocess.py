import numpy as np
import pytest

from lungopacity.radiograph import Preprocessing
from tests.films import grey_film


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (200, 100), (64, 64), (1, 500)])
def test_any_shape_becomes_a_centred_square(shape):
    film = np.full(shape, 200, np.uint8)
    square = Preprocessing(image_size=64).square(film)
    assert square.shape == (64, 64)
    assert square.dtype == np.uint8
    rows, columns = np.nonzero(square)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    scale = 64 / max(shape)
    assert (height, width) == tuple(max(1, round(side * scale)) for side in shape)
    assert abs((rows.min() + rows.max()) - 63) <= 1
    assert abs((columns.min() + columns.max()) - 63) <= 1


def test_the_right_size_passes_untouched():
    film = grey_film(height=64, width=64)
    np.testing.assert_array_equal(Preprocessing(image_size=64).square(film), film)


def test_shrinking_averages_instead_of_picking():
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    square = Preprocessing(image_size=32).square(stripes)
    assert abs(square.mean() - 127.5) < 2
    assert square.std() < 20


@pytest.mark.parametrize("wrong", [{"image_size": 8}, {"image_size": 4096}, {"std": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preprocessing(**wrong)


@pytest.mark.parametrize("shape", [(64, 41), (40, 64), (64, 64), (1, 64), (63, 64)])
def test_unpad_takes_the_film_out_of_the_square(shape):
    preprocessing = Preprocessing(image_size=64)
    content = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    found = preprocessing.unpad(preprocessing.pad(content), *shape)
    np.testing.assert_array_equal(found, content)


def bordered(content: np.ndarray, border: int) -> np.ndarray:
    return np.pad(content, border)


@pytest.mark.parametrize("size", [64, 48])
def test_borders_are_cropped_if_the_settings_say_so(size):
    content = grey_film(height=160, width=120).clip(30, None)
    film = bordered(content, 70)
    film[5:7, 40:42] = 255  # a speck
    cut = Preprocessing(image_size=size, crop_borders=True)
    np.testing.assert_array_equal(cut.crop(film), content)
    np.testing.assert_array_equal(cut.square(film), cut.square(content))
    assert Preprocessing(image_size=size).crop(film) is film


def test_the_borders_of_a_large_film_are_found_to_a_few_pixels():
    content = np.full((1500, 1200), 120, np.uint8)
    cropped = Preprocessing(crop_borders=True).crop(bordered(content, 333))
    assert all(
        0 <= cut - kept <= 16 for cut, kept in zip(cropped.shape, content.shape, strict=True)
    )
    assert (cropped > 0).mean() > 0.98


@pytest.mark.parametrize(
    "film",
    [
        np.zeros((90, 70), np.uint8),
        bordered(grey_film(height=9, width=9), 60),
        bordered(np.full((120, 700), 200, np.uint8), 40),  # less high than a quarter of the width
        np.pad(np.full((400, 2), 200, np.uint8), ((0, 0), (300, 300))),  # no row is bright enough
    ],
)
def test_a_film_that_is_all_border_is_not_cropped(film):
    assert Preprocessing(crop_borders=True).crop(film).shape == film.shape


def test_a_dark_film_is_not_cropped_to_a_line_of_text():
    dark = (grey_film(height=400, width=400) // 16).astype(np.uint8)
    dark[10:22, 20:180] = 255
    assert min(Preprocessing(crop_borders=True).crop(dark).shape) > 340


def test_only_the_borders_of_an_underexposed_film_are_cropped():
    content = (grey_film(height=160, width=120).clip(60, None) // 8).astype(np.uint8)
    left, top, right, bottom = Preprocessing(crop_borders=True).edges(bordered(content, 70))
    assert (right - left, bottom - top) == (120, 160)


def test_a_film_is_decoded_large_enough_to_be_cropped():
    assert Preprocessing(image_size=100, crop_borders=True).at_least == 200
    assert Preprocessing(image_size=100).at_least == 100


def test_edges_are_those_of_the_cropped_film():
    content = grey_film(height=100, width=80).clip(30, None)
    film = np.pad(content, ((40, 30), (20, 10)))
    assert Preprocessing(crop_borders=True).edges(film) == (20, 40, 100, 140)
    assert Preprocessing().edges(film) == (0, 0, 110, 170)
    # Of a large film every second pixel is looked at, and the last lies beyond its edge.
    large = np.full((1099, 1101), 120, np.uint8)
    assert Preprocessing(crop_borders=True).edges(large) == (0, 0, 1101, 1099)


def test_the_dark_parts_of_a_bright_film_are_not_cropped():
    content = np.full((160, 120), 30, np.uint8)
    content[20:140, 10:110] = 250
    np.testing.assert_array_equal(
        Preprocessing(crop_borders=True).crop(bordered(content, 70)), content
    )


def test_a_speck_is_measured_by_the_side_that_it_lies_along():
    content = np.full((300, 800), 200, np.uint8)
    film = bordered(content, 30)
    film[3, 40:46] = 255
    np.testing.assert_array_equal(Preprocessing(crop_borders=True).crop(film), content)
