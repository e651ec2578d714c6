"""Which DICOM objects are not scored, and the facts that are read from headers."""

import gc
import io
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
)

from lungopacity.errors import REJECTING, ErrorCode, ImageError
from lungopacity.radiograph import DecodeLimits, decode_radiographs
from tests.films import dicom, encoded, grey_film, one_film
from tests.radiograph.dicom_files import (
    RAMP,
    code_of,
    compressed,
    in_syntax,
    saved,
    shipped,
    without,
)
from tests.real_data import DICOM_FOLDER, needs_real_data

DX_FOR_PROCESSING = pydicom.uid.DigitalXRayImageStorageForProcessing


def coded(value: str) -> Dataset:
    item = Dataset()
    item.CodeValue = value
    return item


# ------------------------------------------------------------ what is not scored


@pytest.mark.parametrize(
    ("elements", "code"),
    [
        ({"ViewPosition": "LL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LATERAL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LLD"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "RLAT"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LEFT LATERAL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LATEROLATERAL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LATERAL LL"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "LLDECUB"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "AP LLD"}, ErrorCode.LATERAL_VIEW),
        ({"ViewPosition": "AP LAT DECUB"}, ErrorCode.LATERAL_VIEW),
        ({"PatientOrientation": ["A", "F"]}, ErrorCode.LATERAL_VIEW),
        ({"PatientOrientation": ["F", "P"]}, ErrorCode.LATERAL_VIEW),
        ({"BodyPartExamined": "HAND"}, ErrorCode.WRONG_BODY_PART),
        ({"BodyPartExamined": "Left Knee"}, ErrorCode.WRONG_BODY_PART),
        ({"BodyPartExamined": "THORACIC SPINE"}, ErrorCode.WRONG_BODY_PART),
        ({"BodyPartExamined": "ABDOMENPELVIS"}, ErrorCode.WRONG_BODY_PART),
        ({"BodyPartExamined": "STERNUM"}, ErrorCode.WRONG_BODY_PART),
        ({"PresentationIntentType": "FOR PROCESSING"}, ErrorCode.FOR_PROCESSING),
        ({"SOPClassUID": DX_FOR_PROCESSING}, ErrorCode.FOR_PROCESSING),
        ({"Modality": "CT"}, ErrorCode.WRONG_MODALITY),
        ({"Modality": "MG"}, ErrorCode.WRONG_MODALITY),
        (
            {"Modality": "", "SOPClassUID": pydicom.uid.UltrasoundImageStorage},
            ErrorCode.WRONG_MODALITY,
        ),
    ],
)
def test_a_header_that_names_no_frontal_chest_film_rejects_it_unless_accepted(elements, code):
    data = dicom(RAMP, **elements)
    assert code_of(data) is code
    assert code in REJECTING
    assert one_film(data, accept=frozenset({code})).pixels.shape == RAMP.shape
    assert code_of(data) is code, "asking once is not asking for ever"


@pytest.mark.parametrize(
    ("code", "view"),
    [
        ("R-10214", "PA"),
        ("272479007", "PA"),
        ("R-10206", "AP"),
        ("399173006", "LL"),
        ("R-102CD", "LATERAL"),
        ("R-10224", "LATERAL"),  # medial-lateral
        ("R-10222", "LATERAL"),  # sagittal
        ("R-10218", "RAO"),
        ("399135007", "LAO"),
        ("399182000", "OBLIQUE"),
        ("R-10202", None),  # frontal, which says neither AP nor PA
    ],
)
def test_a_coded_view_is_recognised(code, view):
    film = one_film(
        dicom(RAMP, ViewCodeSequence=[coded(code)]), accept=frozenset({ErrorCode.LATERAL_VIEW})
    )
    assert film.view_position == view


def test_a_coded_view_that_is_not_frontal_is_rejected():
    for code in ("R-102CD", "399067008", "399356000"):
        assert code_of(dicom(RAMP, ViewCodeSequence=[coded(code)])) is ErrorCode.LATERAL_VIEW


@pytest.mark.parametrize(
    ("told", "view"),
    [("AP ERECT", "AP"), ("PA", "PA"), ("PA/LAT", None), ("AP PA", None), ("XTABLE", None)],
)
def test_a_view_is_recognised_among_other_words(told, view):
    with pydicom.config.disable_value_validation():
        assert one_film(dicom(RAMP, ViewPosition=told)).view_position == view


@pytest.mark.parametrize(
    "elements",
    [
        {"ViewPosition": "PA"},
        {"ViewPosition": "PA/LAT"},
        {"ViewPosition": "BILATERAL"},
        {"BodyPartExamined": "CHEST"},
        {"BodyPartExamined": "PORT CHEST"},
        {"BodyPartExamined": "THORAX"},
        {"BodyPartExamined": "SOMETHING ELSE"},
        {"Modality": "CR"},
        {"PresentationIntentType": "FOR PRESENTATION"},
        {"Modality": "OT", "SOPClassUID": pydicom.uid.SecondaryCaptureImageStorage},
        {"Modality": ""},
        {"Modality": "", "SOPClassUID": "1.3.6.1.4.1.5962.1"},  # of a vendor's own
        {"PatientOrientation": ["L", "F"]},
        {"PatientOrientation": ["F", "R"]},  # a frontal film that lies on its side
        {"PatientOrientation": "PA"},  # a view, where two directions belong
        {},
    ],
)
def test_a_film_is_scored_if_the_header_says_nothing_or_chest(elements):
    with pydicom.config.disable_value_validation():
        assert one_film(dicom(RAMP, **elements)).pixels.shape == RAMP.shape


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({}, None),
        ({"BodyPartExamined": "PORT CHEST"}, "CHEST"),
        ({"BodyPartExamined": "CHEST ABDOMEN"}, "CHEST"),
        ({"BodyPartExamined": "SOMETHING ELSE"}, None),
        ({"BodyPartExamined": "THORACOLUMBAR"}, "SPINE"),
        ({"BodyPartExamined": "UPPERARM"}, "UPPERARM"),
        ({"BodyPartExamined": "SI JOINT"}, "SIJOINT"),
        ({"AnatomicRegionSequence": [coded("51185008")]}, "CHEST"),
        ({"AnatomicRegionSequence": [coded("R-FAB55")]}, "CHEST"),  # and the abdomen
        ({"AnatomicRegionSequence": [coded("T-D8700")]}, "HAND"),
        ({"AnatomicRegionSequence": [coded("69536005")]}, "HEAD"),
        ({"AnatomicRegionSequence": [coded("T-11502")]}, "SPINE"),  # thoracic
        ({"AnatomicRegionSequence": [coded("80891009")]}, None),  # the heart, on chest films, too
        (
            {"BodyPartExamined": "RECHTS", "AnatomicRegionSequence": [coded("T-D8700")]},
            "HAND",
        ),
    ],
)
def test_the_body_part_is_read_from_the_header(elements, expected):
    accept = frozenset({ErrorCode.WRONG_BODY_PART})
    with pydicom.config.disable_value_validation():
        assert one_film(dicom(RAMP, **elements), accept=accept).body_part == expected


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
def test_objects_that_are_not_films_have_their_own_codes(name, code):
    with pytest.raises(ImageError) as caught:
        one_film(shipped(name))
    assert caught.value.code is code
    assert caught.value.facts["format"] == "dicom"
    assert code in REJECTING


@pytest.mark.parametrize(
    ("sop_class", "code"),
    [
        (pydicom.uid.GrayscaleSoftcopyPresentationStateStorage, ErrorCode.PRESENTATION_STATE),
        (pydicom.uid.KeyObjectSelectionDocumentStorage, ErrorCode.KEY_OBJECT_SELECTION),
        (pydicom.uid.ComprehensiveSRStorage, ErrorCode.STRUCTURED_REPORT),
    ],
)
def test_presentation_states_and_key_object_selections_have_their_own_codes(sop_class, code):
    assert code_of(without(dicom(RAMP, SOPClassUID=sop_class), "PixelData")) is code


def deflated_zeros(size_bytes: int) -> bytes:
    data = in_syntax(DeflatedExplicitVRLittleEndian)
    start = data.index(b"\x02\x00\x10\x00") + 8 + 22
    start = next(at for at in range(start, len(data)) if _inflates(data[at:]))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return data[:start] + packer.compress(bytes(size_bytes)) + packer.flush()


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
        # Only one of several frames would be scored, or a part of a film with wrong rows or bits.
        (dicom(np.vstack([RAMP] * 2), Rows=RAMP.shape[0]), ErrorCode.CORRUPT_IMAGE),
        (dicom(RAMP, BitsAllocated=8, BitsStored=8, HighBit=7), ErrorCode.CORRUPT_IMAGE),
        (compressed(JPEG2000Lossless)[:-300], ErrorCode.TRUNCATED),
        (dicom(RAMP, Rows=60_000, Columns=60_000), ErrorCode.TOO_LARGE),
    ],
)
def test_a_damaged_or_unsupported_object_has_its_code(data, code):
    assert code_of(data) is code


@pytest.mark.parametrize("junk", [b"\xff" * 50, bytes(50), b"\x1a" * 128, b"\r\n"])
def test_junk_after_the_pixels_does_not_cost_the_film(junk):
    for film in (dicom(RAMP), compressed(JPEG2000Lossless)):
        found = one_film(film + junk)
        np.testing.assert_array_equal(found.pixels, one_film(film).pixels)


def test_a_deflated_bomb_is_not_inflated():
    limits = DecodeLimits(max_size_bytes=1 << 20)
    assert code_of(deflated_zeros(200 << 20), limits) is ErrorCode.DECOMPRESSION_BOMB


def test_a_dicom_object_with_an_unreadable_header_has_its_format_and_other_bytes_have_none():
    junk = b"\x08\x00\x00\x00" + bytes(200)
    facts = {}
    for data in (deflated_zeros(200 << 20), junk):
        with pytest.raises(ImageError) as caught:
            list(decode_radiographs(data, limits=DecodeLimits(max_size_bytes=1 << 20)))
        facts[caught.value.code] = caught.value.facts
    assert facts == {
        ErrorCode.DECOMPRESSION_BOMB: {"format": "dicom"},
        ErrorCode.NOT_AN_IMAGE: {},
    }


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(deflated_zeros(1 << 20), id="deflated zeros"),
        pytest.param(dicom(RAMP, PhotometricInterpretation="SOMETHING"), id="header"),
        pytest.param(dicom(RAMP)[:-500], id="pixels"),
        pytest.param(encoded(grey_film())[:-50], id="png"),
        pytest.param(encoded(grey_film(), "JPEG")[:-50], id="jpeg"),
    ],
)
def test_a_file_that_cannot_be_decoded_stays_in_no_cycle_of_references(data):
    """Else it takes memory from the next files until the garbage collector runs."""

    def tried() -> ErrorCode:
        try:
            (found,) = decode_radiographs(data, limits=DecodeLimits())
        except ImageError as error:
            return error.code
        return found.code

    tried()  # pydicom keeps something of its first file
    gc.collect()
    gc.disable()
    try:
        references = sys.getrefcount(data)
        assert tried() in (ErrorCode.CORRUPT_IMAGE, ErrorCode.TRUNCATED)
        assert sys.getrefcount(data) == references
    finally:
        gc.enable()


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
        ("011M", 0),
        ("024M", 2),
        ("104W", 1),
        ("105W", 2),
        ("365D", 0),
        ("366D", 1),
        ("095Y", 90),
        ("155Y", None),
        ("", None),
        ("JOHN", None),
    ],
)
def test_ages_are_whole_years_and_all_above_89_are_90(age, years):
    with pydicom.config.disable_value_validation():
        assert one_film(dicom(RAMP, PatientAge=age)).patient_age_years == years


@pytest.mark.parametrize("keyword", ["ViewPosition", "PatientSex", "BodyPartExamined", "Modality"])
def test_free_text_in_a_coded_element_is_never_returned(keyword):
    with pydicom.config.disable_value_validation():
        found = one_film(dicom(RAMP, **{keyword: "DOE JOHN"}))
    assert "DOE" not in repr(found.facts())


def test_identifiers_are_returned_only_as_hmacs_with_the_users_key():
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
