"""What the display shutter of a header hides."""

from __future__ import annotations

import numpy as np
import pytest

from lungopacity.archive.content import ReadSettings, content_rows
from lungopacity.errors import Status
from lungopacity.radiograph import Preprocessing
from tests.films import dicom, grey_film, one_film
from tests.radiograph.dicom_files import RAMP

HEIGHT, WIDTH = RAMP.shape
RECTANGLE = {
    "ShutterShape": "RECTANGULAR",
    "ShutterLeftVerticalEdge": 11,
    "ShutterRightVerticalEdge": 50,
    "ShutterUpperHorizontalEdge": 21,
    "ShutterLowerHorizontalEdge": 60,
}
CIRCLE = {
    "ShutterShape": "CIRCULAR",
    "CenterOfCircularShutter": [40, 30],
    "RadiusOfCircularShutter": 24,
}
POLYGON = {
    "ShutterShape": "POLYGONAL",
    "VerticesOfThePolygonalShutter": [1, 1, 80, 1, 80, 60],  # the lower left half
}
BOTH = RECTANGLE | CIRCLE | {"ShutterShape": ["RECTANGULAR", "CIRCULAR"]}
ROWS, COLUMNS = np.mgrid[1 : HEIGHT + 1, 1 : WIDTH + 1]
IN_RECTANGLE = (COLUMNS >= 11) & (COLUMNS <= 50) & (ROWS >= 21) & (ROWS <= 60)
IN_CIRCLE = (ROWS - 40) ** 2 + (COLUMNS - 30) ** 2 <= 24**2
FULL_WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("shutter", "inside"),
    [
        (RECTANGLE, IN_RECTANGLE),
        (CIRCLE, IN_CIRCLE),
        (BOTH, IN_RECTANGLE & IN_CIRCLE),
        (POLYGON, (COLUMNS - 1) * (HEIGHT - 1) <= (ROWS - 1) * (WIDTH - 1)),
    ],
    ids=["rectangle", "circle", "both", "polygon"],
)
def test_what_lies_outside_a_shutter_is_black(shutter, inside, photometric):
    told = {"PhotometricInterpretation": photometric, **FULL_WINDOW}
    whole = one_film(dicom(RAMP, **told)).pixels
    found = one_film(dicom(RAMP, **told, **shutter)).pixels
    differs = (found != np.where(inside, whole, 0)).mean()
    assert differs <= (0.02 if shutter is POLYGON else 0), "its slanted edge may be drawn otherwise"


@pytest.mark.parametrize("value", [65535, 5])
def test_padding_and_a_shutter_hide_together(value):
    """Also padding that 12 bits have no room for."""
    film = np.clip(RAMP, 1000, 2000)
    film[30:40] = value
    told = {"PhotometricInterpretation": "MONOCHROME1", **FULL_WINDOW, "PixelPaddingValue": value}
    found = one_film(dicom(film, **told, **RECTANGLE)).pixels
    shown = IN_RECTANGLE & (film != value)
    assert found[~shown].max() == 0
    assert found[shown].min() > 100


def test_what_lies_outside_a_shutter_does_not_affect_the_range():
    surround = np.where(IN_RECTANGLE, RAMP // 4 + 1000, 4095).astype(np.uint16)
    found = one_film(dicom(surround, **RECTANGLE)).pixels[IN_RECTANGLE]
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize(
    "shutter",
    [
        {"ShutterShape": "RECTANGULAR"},
        RECTANGLE | {"ShutterRightVerticalEdge": 5},
        RECTANGLE | {"ShutterLeftVerticalEdge": 500, "ShutterRightVerticalEdge": 600},
        CIRCLE | {"RadiusOfCircularShutter": None},
        CIRCLE | {"CenterOfCircularShutter": 40},
        CIRCLE | {"RadiusOfCircularShutter": 1000},
        POLYGON | {"VerticesOfThePolygonalShutter": [1, 1, 80, 1]},
        POLYGON | {"VerticesOfThePolygonalShutter": [1, 1, 80, 1, 80]},
        {"ShutterShape": "BITMAP"},
        {"ShutterShape": ""},
    ],
)
def test_a_shutter_that_makes_no_sense_is_ignored(shutter):
    found = one_film(dicom(RAMP, **FULL_WINDOW, **shutter)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP, **FULL_WINDOW)).pixels)


def test_a_film_with_a_wide_white_surround_outside_its_shutter_is_not_taken_for_inverted():
    film = np.full((300, 300), 4095, np.uint16)
    film[75:225, 75:225] = grey_film(height=150, width=150).astype(np.uint16) * 16
    edges = {"LeftVertical": 76, "RightVertical": 225, "UpperHorizontal": 76}
    edges["LowerHorizontal"] = 225
    shutter = {f"Shutter{name}Edge": place for name, place in edges.items()}
    data = dicom(film, **FULL_WINDOW, ShutterShape="RECTANGULAR", **shutter)
    (row,) = content_rows(data, ReadSettings(Preprocessing()))
    assert row["status"] == Status.OK
