import io
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from lungopacity.errors import REJECTING, ErrorCode, ImageError
from lungopacity.radiograph import ACCEPTABLE, DecodeLimits, decode_radiographs
from tests.films import dicom, one_film
from tests.real_data import DICOM_FOLDER, needs_real_data

RAMP = np.linspace(0, 4095, 4800).round().reshape(80, 60).astype(np.uint16)


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


# ------------------------------------------------------------ the grey pipeline


def test_monochrome1_is_inverted_to_monochrome2():
    plain = one_film(dicom(RAMP))
    inverted = one_film(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted.pixels, 255 - plain.pixels)
    assert inverted.photometric_interpretation == "MONOCHROME1"


def test_presentation_lut_shape_inverse_of_a_dx_object_is_no_second_inversion():
    told_once = one_film(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    told_twice = one_film(
        dicom(RAMP, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
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
    """A line of text, one in seventy pixels, as systems burn it in: above all that film shows."""
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


def test_what_is_a_little_above_the_rest_is_not_clipped():
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
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, written down again."""
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


@pytest.mark.parametrize("window", [(2048, 0), (2048, -5), ("", "")])
def test_a_window_of_no_width_is_none(window):
    centre, width = window
    np.testing.assert_array_equal(
        one_film(dicom(RAMP, WindowCenter=centre, WindowWidth=width)).pixels,
        one_film(dicom(RAMP)).pixels,
    )


def test_of_several_windows_the_first_is_taken():
    both = one_film(dicom(RAMP, WindowCenter=[1000, 3000], WindowWidth=[500, 500])).pixels
    first = one_film(dicom(RAMP, WindowCenter=1000, WindowWidth=500)).pixels
    np.testing.assert_array_equal(both, first)


def lut_item(entries, first: int = 0) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, 16]
    item.LUTData = list(map(int, entries))
    item["LUTDescriptor"].VR = "US"
    item["LUTData"].VR = "US"
    return item


def test_a_voi_lut_goes_before_a_window_and_its_entries_are_black_to_white():
    entries = np.linspace(500, 60_000, 4096) ** 0.9
    pixels = one_film(
        dicom(RAMP, VOILUTSequence=[lut_item(entries)], WindowCenter=10, WindowWidth=5)
    ).pixels
    scaled = (entries.astype(int) - int(entries[0])) / (int(entries[-1]) - int(entries[0]))
    assert np.abs(pixels - 255 * scaled[RAMP]).max() <= 0.51


def test_of_a_falling_rescale_low_values_stay_black_under_a_window():
    """PS3.3 C.11.2.1.2: what lies below the window is black, however it came to lie there."""
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


@pytest.mark.parametrize("form", ["US", "OW", "8 bits, OW", "8 bits, packed", "8 bits"])
def test_a_voi_lut_means_the_same_however_its_entries_are_written(form):
    """PS3.3 C.11.2.1.1: 8 bits may lie one or two to a word."""
    bits = 8 if form.startswith("8") else 16
    entries = (np.linspace(0, 1, 4096) ** 2 * (2**bits - 1)).round().astype(np.uint16)
    item = lut_item(entries)
    item.LUTDescriptor = [4096, 0, bits]
    if "OW" in form:
        del item.LUTData
        item.add_new("LUTData", "OW", entries.astype("u1" if bits == 8 else "<u2").tobytes())
    elif form.endswith("packed"):
        item.LUTData = entries.astype(np.uint8).view("<u2").tolist()
    film = (RAMP // 2).astype(np.uint16)  # uses half of the table
    found = one_film(dicom(film, VOILUTSequence=[item])).pixels
    expected = 255 * (entries / entries.max())[film]
    assert np.abs(found - expected).max() <= 0.51


def test_a_lut_may_begin_below_zero_and_be_read_as_if_it_did_not():
    """It is written unsigned where the pixels are, also if a rescale made them negative."""
    item = lut_item(np.arange(4096) * 16, first=2**16 - 1024)
    shifted = {"RescaleSlope": 1, "RescaleIntercept": -1024, "VOILUTSequence": [item]}
    np.testing.assert_array_equal(
        one_film(dicom(RAMP, **shifted)).pixels, one_film(dicom(RAMP)).pixels
    )


EMPTY = [
    {"VOILUTSequence": []},
    {"VOILUTSequence": [Dataset()]},
    {"ModalityLUTSequence": []},
    {"RescaleSlope": None, "RescaleIntercept": None},
    {"RescaleSlope": "1", "RescaleIntercept": None},
    {"RescaleIntercept": "0"},
    {"VOILUTFunction": ""},
    {"PixelPaddingValue": None},
]


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 3000}])
@pytest.mark.parametrize("elements", EMPTY, ids=str)
def test_an_element_that_was_emptied_says_nothing(elements, window):
    film = (RAMP // 4).astype(np.uint16)
    np.testing.assert_array_equal(
        one_film(dicom(film, **window, **elements)).pixels, one_film(dicom(film, **window)).pixels
    )


@pytest.mark.parametrize("keyword", ["SamplesPerPixel", "PixelRepresentation"])
def test_what_goes_without_saying_may_be_left_out(keyword):
    found = one_film(without(dicom(RAMP), keyword)).pixels
    np.testing.assert_array_equal(found, one_film(dicom(RAMP)).pixels)


@pytest.mark.parametrize("keyword", ["PhotometricInterpretation", "BitsStored"])
def test_what_only_the_header_can_say_is_named_where_it_does_not(keyword):
    with pytest.raises(ImageError, match=f"the header does not say {keyword}") as caught:
        one_film(without(dicom(RAMP), keyword))
    assert caught.value.code is ErrorCode.CORRUPT_IMAGE


def test_pixel_data_of_no_bytes_end_early():
    assert code_of(dicom(RAMP, PixelData=b"")) is ErrorCode.TRUNCATED


def test_values_in_the_upper_bits_are_refused():
    """ACR-NEMA allowed it; the lowest bits alone would be a picture, and a wrong one."""
    assert code_of(dicom(RAMP << 4, HighBit=15)) is ErrorCode.UNSUPPORTED
    mistaken = one_film(dicom(RAMP, HighBit=15)).pixels
    np.testing.assert_array_equal(mistaken, one_film(dicom(RAMP)).pixels)


def test_a_modality_lut_is_applied():
    falling = np.arange(4095, -1, -1)
    item = lut_item(falling)
    item.ModalityLUTType = "US"
    np.testing.assert_array_equal(
        one_film(dicom(RAMP, ModalityLUTSequence=[item])).pixels, 255 - one_film(dicom(RAMP)).pixels
    )


def test_signed_values_are_read_as_signed():
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    pixels = one_film(dicom(signed.view(np.uint16) & 0x0FFF, PixelRepresentation=1)).pixels
    np.testing.assert_array_equal(pixels, one_film(dicom(RAMP)).pixels)


def test_bits_above_bits_stored_are_no_image():
    overlay = RAMP.copy()
    overlay[::3] |= 0x8000
    np.testing.assert_array_equal(one_film(dicom(overlay)).pixels, one_film(dicom(RAMP)).pixels)


def test_padding_is_black_and_stretches_nothing():
    padded = np.clip(RAMP, 1000, 3000)
    inner = one_film(dicom(padded)).pixels
    padded[:5] = 0
    found = one_film(dicom(padded, PixelPaddingValue=0)).pixels
    assert found[:5].max() == 0
    np.testing.assert_array_equal(found[6:], inner[6:])


def test_padding_of_a_monochrome1_film_is_black_too():
    padded = RAMP.copy()
    padded[:5] = 0
    found = one_film(dicom(padded, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"))
    assert found.pixels[:5].max() == 0
    assert found.pixels[6].min() > 150


def test_a_padding_range_is_padding():
    padded = np.clip(RAMP, 1000, 3000)
    padded[:3], padded[3:5] = 10, 20
    found = one_film(dicom(padded, PixelPaddingValue=10, PixelPaddingRangeLimit=20)).pixels
    assert found[:5].max() == 0
    assert found[6:].max() == 255


@pytest.mark.parametrize(
    ("element", "shape"),
    [
        ({"PixelAspectRatio": [2, 1]}, (80, 30)),
        ({"PixelAspectRatio": [1, 2]}, (40, 60)),
        ({"PixelSpacing": [0.1, 0.2]}, (40, 60)),
        ({"ImagerPixelSpacing": [0.143, 0.143]}, RAMP.shape),
        ({"PixelAspectRatio": [1, 1]}, RAMP.shape),
        ({"PixelAspectRatio": [0, 7]}, RAMP.shape),
    ],
)
def test_pixels_are_made_square(element, shape):
    found = one_film(dicom(RAMP, **element))
    assert found.pixels.shape == shape
    assert (found.rows, found.columns) == RAMP.shape


def test_eight_bits_without_a_window_are_taken_as_other_formats_have_them():
    film = np.clip(RAMP // 16, 30, 200).astype(np.uint16)

    def eight_bits(dataset):
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit = 7
        dataset.PixelData = film.astype(np.uint8).tobytes()
        dataset["PixelData"].VR = "OB"

    np.testing.assert_array_equal(one_film(changed(dicom(film), eight_bits)).pixels, film)


# ------------------------------------------------------------ encodings of the same


def compressed(syntax) -> bytes:
    return changed(dicom(RAMP), lambda dataset: dataset.compress(syntax))


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


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(compressed(RLELossless), id="rle"),
        pytest.param(compressed(JPEGLSLossless), id="jpeg-ls"),
        pytest.param(compressed(JPEG2000Lossless), id="jpeg-2000"),
        pytest.param(in_syntax(ImplicitVRLittleEndian), id="implicit"),
        pytest.param(in_syntax(ExplicitVRBigEndian), id="big-endian"),
        pytest.param(in_syntax(DeflatedExplicitVRLittleEndian), id="deflated"),
        pytest.param(without_preamble(dicom(RAMP)), id="no-preamble"),
        pytest.param(without_meta(ImplicitVRLittleEndian), id="no-meta"),
    ],
)
def test_every_encoding_of_a_film_gives_the_same_pixels(data):
    np.testing.assert_array_equal(one_film(data).pixels, one_film(dicom(RAMP)).pixels)


def shipped(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str)
    return Path(path).read_bytes()


LOSSY_12_BIT = ("JPEG-lossy.dcm", "JPGExtended.dcm")


@pytest.mark.parametrize(
    "name",
    """693_J2KI.dcm CT_small.dcm J2K_pixelrep_mismatch.dcm JPEG2000.dcm JPEGLSNearLossless_08.dcm
    JPEGLSNearLossless_16.dcm MR_small.dcm MR_small_RLE.dcm MR_small_bigendian.dcm
    MR_small_expb.dcm MR_small_implicit.dcm MR_small_jp2klossless.dcm MR_small_jpeg_ls_lossless.dcm
    MR_small_padded.dcm examples_overlay.dcm image_dfl.dcm liver_1frame.dcm
    rtdose_1frame.dcm rtdose_rle_1frame.dcm""".split(),
)
def test_pydicoms_own_grey_files_give_what_pydicoms_own_functions_give(name):
    data = shipped(name)
    dataset = pydicom.dcmread(io.BytesIO(data))
    seen = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    seen = seen.astype(np.float64)
    found = one_film(data, accept=ACCEPTABLE).pixels
    assert found.shape == seen.shape
    # Whatever is called black and white, each step of grey is the same share of the whole.
    order = np.argsort(seen, axis=None)
    assert np.all(np.diff(found.ravel()[order].astype(int)) >= 0)
    inside = (found > 0) & (found < 255)  # values far from the rest are clipped
    if inside.mean() > 0.1 and np.ptp(seen[inside]):
        spread = np.polyfit(seen[inside], found[inside], 1)
        assert np.abs(np.polyval(spread, seen) - found)[inside].max() <= 2


@pytest.mark.parametrize("name", LOSSY_12_BIT)
def test_jpeg_extended_of_12_bits_is_read(name):
    # Two values that pydicom's own tests state for this image, in a window of its range, 0 to 264.
    window = {"WindowCenter": 132.5, "WindowWidth": 265}
    film = one_film(
        changed(
            shipped(name), lambda dataset: [setattr(dataset, *item) for item in window.items()]
        ),
        accept=ACCEPTABLE,
    )
    assert film.pixels.shape == (1024, 256)
    assert film.pixels[420, 140] == round(244 * 255 / 264)
    assert film.pixels[230, 120] == round(95 * 255 / 264)


@pytest.mark.parametrize(
    "name",
    """SC_rgb_dcmtk_+eb+cr.dcm SC_rgb_gdcm_KY.dcm SC_rgb_jls_lossy_line.dcm SC_rgb_jpeg.dcm
    SC_rgb_jpeg_dcmtk.dcm SC_rgb_jpeg_gdcm.dcm SC_rgb_rle.dcm SC_rgb_rle_16bit.dcm
    SC_ybr_full_422_uncompressed.dcm""".split(),
)
def test_colour_captures_become_their_luminance(name):
    data = shipped(name)
    rgb = pydicom.dcmread(io.BytesIO(data)).pixel_array
    rgb = (rgb >> 8 * (rgb.dtype.itemsize - 1)).astype(np.uint8)
    found = one_film(data, accept=ACCEPTABLE)
    np.testing.assert_array_equal(found.pixels, np.asarray(Image.fromarray(rgb).convert("L")))


def test_a_palette_is_looked_up():
    found = one_film(shipped("examples_palette.dcm"), accept=ACCEPTABLE)
    assert found.pixels.shape == (350, 800)
    assert found.coloured_fraction > 0.1


# ------------------------------------------------------------ frames


def test_every_frame_is_a_radiograph_of_its_own():
    frames = np.stack([RAMP, RAMP[::-1], RAMP // 2])
    data = dicom(RAMP, NumberOfFrames=3, PixelData=frames.astype("<u2").tobytes())
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    assert [film.frame for film in found] == [0, 1, 2]
    for film, frame in zip(found, frames, strict=True):
        np.testing.assert_array_equal(film.pixels, one_film(dicom(frame)).pixels)


def test_a_single_frame_has_no_number():
    assert one_film(dicom(RAMP, NumberOfFrames=1)).frame is None


def test_frames_that_are_declared_and_not_there_are_one_error():
    data = dicom(RAMP, NumberOfFrames=1000, PixelData=np.stack([RAMP] * 3).tobytes())
    found = list(decode_radiographs(data, limits=DecodeLimits()))
    assert [isinstance(film, ImageError) for film in found] == [False, False, False, True]
    assert found[-1].code is ErrorCode.TRUNCATED
    assert found[-1].facts["frame"] == 3


def test_compressed_frames_are_read_one_by_one():
    data = shipped("examples_ybr_color.dcm")
    found = list(decode_radiographs(data, limits=DecodeLimits(), accept=ACCEPTABLE))
    assert [film.frame for film in found] == list(range(30))


def test_too_many_frames_are_refused():
    data = dicom(RAMP, NumberOfFrames=9)
    assert code_of(data, DecodeLimits(max_frames=8)) is ErrorCode.TOO_LARGE


# ------------------------------------------------------------ what is not scored


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"ViewPosition": "LL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LATERAL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LLD"}, ErrorCode.LATERAL_VIEW),
        ({"PatientOrientation": ["A", "F"]}, ErrorCode.LATERAL_VIEW),
        ({"BodyPartExamined": "HAND"}, ErrorCode.WRONG_BODY_PART),
        ({"BodyPartExamined": "Left Knee"}, ErrorCode.WRONG_BODY_PART),
        ({"BodyPartExamined": "THORACIC SPINE"}, ErrorCode.WRONG_BODY_PART),
        ({"Modality": "CT"}, ErrorCode.WRONG_MODALITY),
        ({"Modality": "MG"}, ErrorCode.WRONG_MODALITY),
        (
            {"Modality": "", "SOPClassUID": pydicom.uid.UltrasoundImageStorage},
            ErrorCode.WRONG_MODALITY,
        ),
    ],
)
def test_what_the_header_calls_no_frontal_chest_film_is_rejected_until_it_is_asked_for(
    elements, code
):
    data = dicom(RAMP, **elements)
    assert code_of(data) is code
    assert code in REJECTING
    assert one_film(data, accept=frozenset({code})).pixels.shape == RAMP.shape
    assert code_of(data) is code, "asking once is not asking for ever"


def test_a_coded_view_is_understood():
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = "399173006", "SCT"
    assert code_of(dicom(RAMP, ViewCodeSequence=[item])) is ErrorCode.LATERAL_VIEW
    item.CodeValue = "R-10214"
    assert one_film(dicom(RAMP, ViewCodeSequence=[item])).view_position == "PA"


@pytest.mark.parametrize(
    "elements",
    [
        {"ViewPosition": "PA"},
        {"BodyPartExamined": "CHEST"},
        {"BodyPartExamined": "PORT CHEST"},
        {"BodyPartExamined": "THORAX"},
        {"BodyPartExamined": "SOMETHING ELSE"},
        {"Modality": "CR"},
        {"Modality": "OT", "SOPClassUID": pydicom.uid.SecondaryCaptureImageStorage},
        {"Modality": ""},
        {"PatientOrientation": ["L", "F"]},
        {"PatientOrientation": "PA"},  # a view, where two directions belong
        {},
    ],
)
def test_where_the_header_is_silent_or_says_chest_it_is_scored(elements):
    assert one_film(dicom(RAMP, **elements)).pixels.shape == RAMP.shape


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("test-SR.dcm", ErrorCode.STRUCTURED_REPORT),
        ("DICOMDIR", ErrorCode.DICOMDIR),
        ("rtplan.dcm", ErrorCode.NO_PIXELS),
        ("waveform_ecg.dcm", ErrorCode.NO_PIXELS),
        ("MR_truncated.dcm", ErrorCode.WRONG_MODALITY),
    ],
)
def test_objects_that_are_no_films_have_codes_of_their_own(name, code):
    assert code_of(shipped(name)) is code
    assert code in REJECTING


@pytest.mark.parametrize(
    ("sop_class", "code"),
    [
        (pydicom.uid.GrayscaleSoftcopyPresentationStateStorage, ErrorCode.PRESENTATION_STATE),
        (pydicom.uid.KeyObjectSelectionDocumentStorage, ErrorCode.KEY_OBJECT_SELECTION),
        (pydicom.uid.ComprehensiveSRStorage, ErrorCode.STRUCTURED_REPORT),
    ],
)
def test_presentation_states_and_selections_are_told_apart(sop_class, code):
    assert code_of(without(dicom(RAMP, SOPClassUID=sop_class), "PixelData")) is code


def deflated_bomb() -> bytes:
    data = in_syntax(DeflatedExplicitVRLittleEndian)
    start = data.index(b"\x02\x00\x10\x00") + 8 + 22
    start = next(at for at in range(start, len(data)) if _inflates(data[at:]))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return data[:start] + packer.compress(bytes(200 << 20)) + packer.flush()


def _inflates(data: bytes) -> bool:
    try:
        return zlib.decompressobj(-15).decompress(data, 64)[:1] == b"\x08"
    except zlib.error:
        return False


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (without(dicom(RAMP), "PixelData"), ErrorCode.TRUNCATED),
        (dicom(RAMP, SamplesPerPixel=4), ErrorCode.UNSUPPORTED),
        (dicom(RAMP, PhotometricInterpretation="SOMETHING"), ErrorCode.CORRUPT_IMAGE),
        (without(dicom(RAMP), "PhotometricInterpretation"), ErrorCode.CORRUPT_IMAGE),
        (without(dicom(RAMP), "Rows"), ErrorCode.CORRUPT_IMAGE),
        (dicom(RAMP, Rows=0), ErrorCode.CORRUPT_IMAGE),
        (dicom(RAMP, PixelData=bytes(100)), ErrorCode.TRUNCATED),
        (dicom(RAMP)[:-500], ErrorCode.TRUNCATED),
        (compressed(JPEG2000Lossless)[:-300], ErrorCode.TRUNCATED),
        (dicom(RAMP, Rows=60_000, Columns=60_000), ErrorCode.TOO_LARGE),
    ],
)
def test_what_cannot_be_scored_has_its_code(data, code):
    assert code_of(data) is code


def test_a_deflated_bomb_is_not_inflated():
    limits = DecodeLimits(max_size_bytes=1 << 20)
    assert code_of(deflated_bomb(), limits) is ErrorCode.DECOMPRESSION_BOMB


def test_an_unknown_transfer_syntax_has_its_code():
    def private(dataset):
        dataset.file_meta.TransferSyntaxUID = "1.2.3.4.5"

    dataset = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    private(dataset)
    data = saved(dataset, implicit_vr=False, little_endian=True)
    assert code_of(data) is ErrorCode.UNSUPPORTED_TRANSFER_SYNTAX
    mpeg = dicom(RAMP).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.")
    assert code_of(mpeg) in (ErrorCode.UNSUPPORTED_TRANSFER_SYNTAX, ErrorCode.CORRUPT_IMAGE)


def test_a_codestream_larger_than_its_header_says_is_refused_before_it_is_decoded():
    data = bytearray(compressed(JPEG2000Lossless))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = (60_000).to_bytes(4, "big") * 2
    assert code_of(bytes(data)) is ErrorCode.TOO_LARGE


# ------------------------------------------------------------ header and facts


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
        assert one_film(dicom(RAMP, PatientAge=age)).patient_age_years == years


@pytest.mark.parametrize("keyword", ["ViewPosition", "PatientSex", "BodyPartExamined", "Modality"])
def test_text_never_comes_out_of_a_coded_field(keyword):
    with pydicom.config.disable_value_validation():
        found = one_film(dicom(RAMP, **{keyword: "DOE JOHN"}))
    assert "DOE" not in repr(found.facts())


def test_identifiers_come_out_as_hmac_under_the_users_key_or_not_at_all():
    data = dicom(RAMP, PatientID="4711", StudyInstanceUID="1.2.3")
    assert one_film(data).patient_hmac is None
    found = one_film(data, hmac_key=b"key")
    # printf 4711 | openssl dgst -sha256 -hmac key
    assert found.patient_hmac == "3f64db98781294e86878d407d31f2fc7980f63c78b5db280ab55bc8a6f34f88f"
    assert found.patient_hmac != one_film(data, hmac_key=b"other").patient_hmac
    assert found.study_hmac not in (None, found.patient_hmac)


def test_no_error_message_quotes_the_header():
    data = dicom(RAMP, PatientName="Secret^Name", PhotometricInterpretation="SECRET^NAME")
    with pytest.raises(ImageError) as caught:
        one_film(data)
    assert "secret" not in (str(caught.value) + repr(caught.value.facts)).lower()


# ------------------------------------------------------------ real films


@needs_real_data
@pytest.mark.parametrize("path", sorted(DICOM_FOLDER.glob("*.dcm")), ids=lambda path: path.name)
def test_every_real_file_decodes(path: Path):
    found = one_film(path.read_bytes())
    assert found.pixels.shape == (found.rows, found.columns)
    assert found.pixels.std() > 20


@needs_real_data
def test_a_compressed_copy_of_a_film_gives_the_same_pixels():
    plain, packed = (
        one_film((DICOM_FOLDER / name).read_bytes()) for name in ("RG1_UNCR.dcm", "RG1_J2KR.dcm")
    )
    np.testing.assert_array_equal(plain.pixels, packed.pixels)


@needs_real_data
def test_one_film_declared_both_polarities_gives_inverse_pixels():
    name = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"
    plain = one_film((DICOM_FOLDER / name).read_bytes()).pixels
    fake = one_film((DICOM_FOLDER / "Fake_MONOHR1.dcm").read_bytes()).pixels
    np.testing.assert_array_equal(fake, 255 - plain)
