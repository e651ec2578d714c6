"""What elements of the header say of grey values: of which frame, and where they were emptied, left
out or misspelt."""

import numpy as np
import pytest
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiographs
from tests.films import dicom, one_film
from tests.radiograph.dicom_files import RAMP, changed, code_of, without


def group(macro: str, **elements) -> Dataset:
    """A functional group with one macro."""
    item, found = Dataset(), Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    setattr(found, macro, [item])
    return found


WINDOW = {"WindowCenter": 1000, "WindowWidth": 400}


ENTRIES = Dataset()
ENTRIES.LUTDescriptor, ENTRIES.LUTData = [4096, 0, 12], [each // 2 for each in range(4096)]
ENTRIES["LUTDescriptor"].VR = ENTRIES["LUTData"].VR = "US"


@pytest.mark.parametrize(
    "told", [{**WINDOW, "VOILUTFunction": "SIGMOID"}, {"VOILUTSequence": [ENTRIES]}], ids=list
)
def test_a_group_says_all_of_how_its_frame_is_shown(told):
    groups = {"SharedFunctionalGroupsSequence": [group("FrameVOILUTSequence", **told)]}
    found = one_film(dicom(RAMP, **groups, VOILUTFunction="LINEAR", **WINDOW)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP, **told)).pixels)


def test_shared_functional_groups_apply_to_each_frame():
    shared = group("FrameVOILUTSequence", **WINDOW)
    shared.PixelMeasuresSequence = group(
        "PixelMeasuresSequence", PixelSpacing=[0.2, 0.1]
    ).PixelMeasuresSequence
    found = one_film(dicom(RAMP, SharedFunctionalGroupsSequence=[shared])).pixels
    at_the_top = one_film(dicom(RAMP, **WINDOW, PixelSpacing=[0.2, 0.1])).pixels
    np.testing.assert_array_equal(found, at_the_top)


def test_each_frame_has_the_window_and_rescale_of_its_own_groups():
    frames = dicom(
        RAMP,
        NumberOfFrames=3,
        PixelData=np.stack([RAMP] * 3).tobytes(),
        **WINDOW,
        SharedFunctionalGroupsSequence=[
            group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=0)
        ],
        PerFrameFunctionalGroupsSequence=[
            group("FrameVOILUTSequence", WindowCenter=3000, WindowWidth=100),
            group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-100),
        ],
    )
    found = list(decode_radiographs(frames, limits=DecodeLimits()))
    for film, elements in zip(
        found,
        (
            {"WindowCenter": 3000, "WindowWidth": 100},
            {**WINDOW, "RescaleSlope": 2, "RescaleIntercept": -100},
            WINDOW,  # no group of its own
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(film.pixels, one_film(dicom(RAMP, **elements)).pixels)


EMPTY = [
    {"VOILUTSequence": []},
    {"VOILUTSequence": [Dataset()]},
    {"ModalityLUTSequence": []},
    {"RescaleSlope": None, "RescaleIntercept": None},
    {"RescaleSlope": "1", "RescaleIntercept": None},
    {"RescaleSlope": "0", "RescaleIntercept": "0"},
    {"RescaleIntercept": "0"},
    {"VOILUTFunction": ""},
    {"PixelPaddingValue": None},
    {"SharedFunctionalGroupsSequence": []},
    {"SharedFunctionalGroupsSequence": [Dataset()]},
    {
        "SharedFunctionalGroupsSequence": [
            group("FrameVOILUTSequence", WindowCenter=None, WindowWidth=None)
        ]
    },
]


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 3000}])
@pytest.mark.parametrize("elements", EMPTY, ids=str)
def test_an_empty_element_counts_as_absent(elements, window):
    film = (RAMP // 4).astype(np.uint16)
    np.testing.assert_array_equal(
        one_film(dicom(film, **window, **elements)).pixels, one_film(dicom(film, **window)).pixels
    )


def with_texts(**texts: str) -> bytes:
    """RAMP with these elements written as they are, even if their type does not allow the value."""

    def write(dataset):
        for keyword, text in texts.items():
            vr = dictionary_VR(keyword)
            dataset[keyword] = RawDataElement(
                Tag(keyword), vr, len(text), text.encode(), 0, False, True
            )

    return changed(dicom(RAMP), write)


def test_a_decimal_comma_is_understood():
    comma = {"WindowCenter": "2048,5", "WindowWidth": "1024,0 ", "RescaleSlope": "-1,0"}
    point = {keyword: text.replace(",", ".") for keyword, text in comma.items()}
    intercept = {"RescaleIntercept": "4095 "}
    found = one_film(with_texts(**comma, **intercept)).pixels
    np.testing.assert_array_equal(found, one_film(with_texts(**point, **intercept)).pixels)
    assert found[0, 0] == 255 > found[-1, -1] == 0


@pytest.mark.parametrize("keyword", ["WindowWidth", "RescaleSlope", "RescaleIntercept"])
def test_a_number_that_cannot_be_read_is_an_error(keyword):
    texts = {"WindowCenter": "2048", "WindowWidth": "1024"} | {keyword: "1.2.3 "}
    with pytest.raises(ImageError, match=f"the header's {keyword} is not a number"):
        one_film(with_texts(**texts))


@pytest.mark.parametrize("keyword", ["SamplesPerPixel", "PixelRepresentation"])
def test_an_element_with_a_usual_value_may_be_absent(keyword):
    found = one_film(without(dicom(RAMP), keyword)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


def test_a_missing_planar_configuration_is_not_guessed():
    rgb = dicom(RAMP, SamplesPerPixel=3, PhotometricInterpretation="RGB", PixelData=bytes(99999))
    with pytest.raises(ImageError, match="the header has no PlanarConfiguration"):
        one_film(rgb)


@pytest.mark.parametrize("keyword", ["PhotometricInterpretation", "BitsStored"])
def test_a_missing_element_that_cannot_be_guessed_is_named(keyword):
    with pytest.raises(ImageError, match=f"the header has no {keyword}") as caught:
        one_film(without(dicom(RAMP), keyword))
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


@pytest.mark.parametrize(
    "spelt", [" MONOCHROME1", "MONOCHROME1   ", "monochrome1 ", "Monochrome1 "]
)
def test_photometric_interpretation_is_recognised_in_every_spelling(spelt):
    window = {"WindowCenter": 2048, "WindowWidth": 2000}
    curved = dicom(
        RAMP, **window, VOILUTFunction="SIGMOID", PhotometricInterpretation="MONOCHROME1"
    )
    found = one_film(
        with_texts(
            PhotometricInterpretation=spelt,
            VOILUTFunction=" sigmoid",
            **{keyword: str(value) for keyword, value in window.items()},
        )
    )
    assert found.photometric_interpretation == "MONOCHROME1"
    np.testing.assert_array_equal(found.pixels, one_film(curved).pixels)
    assert found.pixels[0, 0] > found.pixels[-1, -1]


@pytest.mark.parametrize(
    ("spelt", "message"),
    [
        ("MONOCHROME 1", "the header's PhotometricInterpretation is not a term of the standard"),
        ("MONOCHROME1\\MONOCHROME1", "the header's PhotometricInterpretation is not a term"),
        ("HSV ", "the header's PhotometricInterpretation names no polarity"),
    ],
)
def test_an_unknown_photometric_interpretation_is_not_guessed(spelt, message):
    with pytest.raises(ImageError, match=message) as caught:
        one_film(with_texts(PhotometricInterpretation=spelt))
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


def test_empty_pixel_data_is_truncated():
    assert code_of(dicom(RAMP, PixelData=b"")) is ErrorCode.TRUNCATED
