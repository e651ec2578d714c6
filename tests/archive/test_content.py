"""The content columns of the rows of one file."""

import numpy as np
import pytest
from PIL import Image

from lungopacity.archive import content
from lungopacity.archive.content import ReadSettings, content_rows, rules_from
from lungopacity.errors import UserError
from lungopacity.radiograph import Preprocessing
from tests.films import dicom, encoded, grey_film, one_film
from tests.radiograph.dicom_files import RAMP

CROPPING = ReadSettings(Preprocessing(image_size=96, crop_borders=True))


def framed(side: int) -> bytes:
    """A film of 800 x 800 in the middle of a black square, as JPEG."""
    square = np.zeros((side, side), np.uint8)
    start = (side - 800) // 2
    square[start : start + 800, start : start + 800] = grey_film(1, 800, 800) // 2 + 100
    return encoded(square, "JPEG", quality=95)


@pytest.fixture
def scales(monkeypatch):
    """The value of `at_least` each time the file was decoded."""
    asked = []

    def decode(data, *, at_least, **options):
        asked.append(at_least)
        return decode_radiographs(data, at_least=at_least, **options)

    decode_radiographs = content.decode_radiographs
    monkeypatch.setattr(content, "decode_radiographs", decode)
    return asked


@pytest.mark.parametrize("side", [1700, 2500, 3000])
def test_a_jpeg_of_a_small_film_in_a_wide_border_is_decoded_at_full_size(side, scales):
    data = framed(side)
    (row,) = content_rows(data, CROPPING)
    whole = one_film(data).pixels
    preprocessing = CROPPING.preprocessing
    expected = preprocessing.square(whole)
    assert row["pixels"] == expected.tobytes()
    assert row["shown_edges"] == list(preprocessing.edges(whole))
    assert scales == [192, None]


@pytest.mark.parametrize("side", [800, 1000, 1500])
def test_other_jpegs_are_decoded_once_at_a_scale(side, scales):
    (row,) = content_rows(framed(side), CROPPING)
    assert row["status"] == "ok"
    assert scales == [192]


def test_a_png_of_a_small_film_is_decoded_once(scales):
    square = np.zeros((1000, 1000), np.uint8)
    square[300:700, 300:700] = grey_film(1, 400, 400) // 2 + 100
    assert len(list(content_rows(encoded(square), CROPPING))) == 1
    assert scales == [192]


ANY_QUALITY = ReadSettings(Preprocessing(image_size=96), reject_quality=frozenset())
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("data", "edges"),
    [
        pytest.param(encoded(grey_film(0, 800, 600), "JPEG"), [0, 0, 600, 800], id="scaled"),
        pytest.param(encoded(grey_film(), exif=TURNED), [0, 0, 120, 100], id="turned"),
        # Its square pixels are wider than high, as if it were turned.
        pytest.param(dicom(RAMP, PixelAspectRatio=[1, 2]), [0, 0, 60, 80], id="oblong pixels"),
    ],
)
def test_edges_are_told_in_stored_pixels(data, edges):
    (row,) = content_rows(data, ANY_QUALITY)
    assert row["shown_edges"] == edges


def test_a_large_film_is_not_too_small_for_being_decoded_small():
    (row,) = content_rows(
        encoded(grey_film(0, 560, 420), "JPEG"), ReadSettings(Preprocessing(image_size=64))
    )
    assert row["status"] == "ok"


@pytest.mark.parametrize("shape", [(90, 300), (300, 90)])
def test_either_side_of_the_stored_film_may_be_too_small(shape):
    (row,) = content_rows(encoded(grey_film(1, *shape)), ANY_QUALITY)
    assert row["quality_too_small"]
    assert row["quality_odd_aspect"]


def test_without_a_model_out_of_distribution_cannot_be_rejected():
    with pytest.raises(UserError, match="'out_of_distribution' is none of blank, child, colour, "):
        rules_from((), ["blank", "out_of_distribution"])


@pytest.mark.parametrize(
    ("age", "is_child"), [("017Y", True), ("018Y", False), ("005D", True), ("", False)]
)
def test_a_child_is_flagged_and_rejected_only_on_request(age, is_child):
    data = dicom(grey_film(), PatientAge=age)
    (row,) = content_rows(data, ReadSettings(Preprocessing(image_size=96)))
    assert (row["status"], row["quality_child"]) == ("ok", is_child)
    (row,) = content_rows(
        data, ReadSettings(Preprocessing(image_size=96), reject_quality=frozenset({"child"}))
    )
    assert row.get("error_message") == ("child" if is_child else None)
    assert row["patient_age_years"] == (int(age[:3]) // (1 if "Y" in age else 365) if age else None)
