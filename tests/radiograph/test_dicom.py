import io
from pathlib import Path

import numpy as np
import pydicom
import pytest

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiograph
from tests.films import dicom
from tests.real_data import DICOM_FOLDER, needs_real_data

RAMP = np.linspace(0, 4095, 1200).round().reshape(40, 30).astype(np.uint16)


def decoded(data: bytes):
    return decode_radiograph(data, limits=DecodeLimits())


def test_monochrome1_is_inverted_to_monochrome2():
    plain = decoded(dicom(RAMP))
    inverted = decoded(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted.pixels, 255 - plain.pixels)
    assert inverted.photometric_interpretation == "MONOCHROME1"


def test_a_window_decides_what_is_black_and_white():
    pixels = decoded(dicom(RAMP, WindowCenter=2048, WindowWidth=1024)).pixels
    assert pixels[RAMP < 1500].max() == 0
    assert pixels[RAMP > 2600].min() == 255
    middle = pixels[np.abs(RAMP.astype(int) - 2048) < 8]
    assert np.all(np.abs(middle.astype(int) - 128) <= 3)


def test_a_window_that_clips_nothing_is_not_undone_by_stretching():
    narrow = (RAMP // 4 + 1024).astype(np.uint16)  # 1024 … 2047 of 0 … 4095
    pixels = decoded(dicom(narrow, WindowCenter=2048, WindowWidth=4096)).pixels
    assert 60 <= pixels.min() <= 68
    assert 123 <= pixels.max() <= 131


def test_rescale_comes_before_the_window():
    pixels = decoded(
        dicom(RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3096, WindowWidth=2048)
    ).pixels
    assert pixels[RAMP < 1500].max() == 0
    assert pixels[RAMP > 2600].min() == 255


@pytest.mark.parametrize(
    ("age", "years"),
    [
        ("045Y", 45),
        ("62", 62),
        ("018M", 1),
        ("003D", 0),
        ("095Y", 90),
        ("155Y", None),
        ("", None),
        ("JOHN", None),
    ],
)
def test_ages_are_years_and_those_above_89_one_group(age, years):
    with pydicom.config.disable_value_validation():
        assert decoded(dicom(RAMP, PatientAge=age)).patient_age_years == years


def test_free_text_never_comes_out_of_a_coded_field():
    with pydicom.config.disable_value_validation():
        found = decoded(dicom(RAMP, ViewPosition="Doe, John; born 1950", PatientSex="John"))
    assert found.view_position is None
    assert found.patient_sex is None


def without(data: bytes, keyword: str) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    delattr(dataset, keyword)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (without(dicom(RAMP), "PixelData"), ErrorCode.NO_PIXELS),
        (dicom(RAMP, NumberOfFrames=2), ErrorCode.UNSUPPORTED),
        (dicom(RAMP, SamplesPerPixel=3), ErrorCode.UNSUPPORTED),
        (dicom(RAMP, PhotometricInterpretation="PALETTE COLOR"), ErrorCode.UNSUPPORTED),
        (without(dicom(RAMP), "PhotometricInterpretation"), ErrorCode.CORRUPT_IMAGE),
        (without(dicom(RAMP), "Rows"), ErrorCode.CORRUPT_IMAGE),
        (dicom(RAMP, PixelData=bytes(100)), ErrorCode.TRUNCATED),
        (dicom(RAMP, Rows=60_000, Columns=60_000), ErrorCode.TOO_LARGE),
    ],
)
def test_what_cannot_be_scored_has_its_code(data, code):
    with pytest.raises(ImageError) as caught:
        decoded(data)
    assert caught.value.code is code


def test_no_error_message_quotes_the_header():
    data = dicom(RAMP, PatientName="Secret^Name", PhotometricInterpretation="SECRET^NAME")
    with pytest.raises(ImageError) as caught:
        decoded(data)
    assert "secret" not in str(caught.value).lower()


@needs_real_data
@pytest.mark.parametrize("path", sorted(DICOM_FOLDER.glob("*.dcm")), ids=lambda path: path.name)
def test_every_real_file_decodes(path: Path):
    found = decoded(path.read_bytes())
    assert found.pixels.shape == (found.rows, found.columns)
    assert found.pixels.std() > 20


@needs_real_data
def test_a_compressed_copy_of_a_film_gives_the_same_pixels():
    plain, packed = (
        decoded((DICOM_FOLDER / name).read_bytes()) for name in ("RG1_UNCR.dcm", "RG1_J2KR.dcm")
    )
    np.testing.assert_array_equal(plain.pixels, packed.pixels)


@needs_real_data
def test_one_film_declared_both_polarities_gives_inverse_pixels():
    name = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"
    plain = decoded((DICOM_FOLDER / name).read_bytes()).pixels
    fake = decoded((DICOM_FOLDER / "Fake_MONOHR1.dcm").read_bytes()).pixels
    np.testing.assert_array_equal(fake, 255 - plain)
