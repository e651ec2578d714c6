"""Reads facts from a DICOM header, reduced to terms that cannot name anyone.

Any text element can hold a name, even a coded one. So a value leaves this module only if it is one
of the standard's own terms, a number or a hash. PS3.3, PS3.5 and PS3.16 are parts of the DICOM
standard.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Set
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import MAX_AGE_YEARS, is_synthetic, years_of

ACCEPTABLE = frozenset(
    {
        ErrorCode.WRONG_MODALITY,
        ErrorCode.WRONG_BODY_PART,
        ErrorCode.FOR_PROCESSING,
        ErrorCode.LATERAL_VIEW,
    }
)
"""Codes that a user may have decoded and scored instead of rejected."""

# PS3.3 C.7.3.1.1.1. Projection radiography, or a modality that could be: secondary captures carry
# OT; DR and SC are not terms of the standard, but common.
_RADIOGRAPHY = frozenset("CR DX RG OT DR SC".split())
_OTHER_MODALITIES = frozenset(
    """ANN AR ASMT AU BDUS BI BMD CFM CT CTPROTOCOL DG DMS DOC ECG EEG EMG EOG EPS ES FID GM HC
    HD IO IOL IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS
    PA PLAN POS PR PT PX REG RESP RF RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN
    RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC""".split()
)
_PHOTOMETRIC = frozenset(
    """MONOCHROME1 MONOCHROME2 RGB YBR_FULL YBR_FULL_422 YBR_PARTIAL_420 YBR_PARTIAL_422 YBR_ICT
    YBR_RCT XYB HSV ARGB CMYK""".split()
) | {"PALETTE COLOR"}

# Views of PS3.3 C.8.7.1 (CR) and C.8.11.5 (DX), and others that consoles write.
_FRONTAL_VIEWS = frozenset(("AP", "PA"))
_LATERAL_VIEWS = frozenset("LL RL LATERAL LAT XTL".split())
_DECUBITUS_AND_OBLIQUE = frozenset(
    "LLD RLD DECUBITUS LLO RLO LAO RAO LPO RPO OBL OBLIQUE SWIMMERS".split()
)
_OTHER_VIEWS = _LATERAL_VIEWS | _DECUBITUS_AND_OBLIQUE
_LATERAL = re.compile(r"(L|R|LT|RT|X|XT)?LAT(ERALE?)?(L|R|LT|RT)?")
"""LLAT, RTLAT, LATERALE, …, but not words such as BILATERAL."""
_DECUBITUS = re.compile(r"DECUB\w*")
# View Code Sequence, CID 4010: SNOMED-RT ids in older objects, SNOMED CT in newer ones.
_VIEW_CODES = {
    **{"R-10206": "AP", "399348003": "AP", "R-10214": "PA", "272479007": "PA"},
    **{"R-10236": "LL", "399173006": "LL", "R-10232": "RL", "399198007": "RL"},
    **{"R-10228": "LATERAL", "399067008": "LATERAL", "R-10224": "LLO", "R-10222": "RLO"},
}
_CHEST = re.compile(r"CHEST|THORA|TORAX|TÓRAX|LUNG|\bCXR\b|BRUSTKORB|POUMON|PECHO")
# PS3.16 Annex L, as far as radiography rooms meet them. A term outside this list counts as none:
# hospitals write their own words here, and sometimes names.
_OTHER_BODY_PARTS = frozenset(
    """ABDOMEN ANKLE ARM BREAST BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CLAVICLE COCCYX COLON
    CSPINE CTSPINE EAR ELBOW EXTREMITY EYE FACE FEMUR FINGER FOOT FOREARM HAND HEAD HIP
    HUMERUS JAW KIDNEY KNEE LEG LIVER LSPINE LSSPINE MAXILLA MANDIBLE NASOPHARYNX NECK NOSE
    ORBIT PANCREAS PATELLA PELVIS PHANTOM RADIUS RADIUSULNA SACRUM SCALP SCAPULA SHOULDER
    SKULL SPINE SSPINE STOMACH TARSUS TESTIS THIGH THUMB TIBIA TIBIAFIBULA TLSPINE TOE TONGUE
    TSPINE ULNA WHOLEBODY WHOLESPINE WRIST ZYGOMA""".split()
)

_BY_SOP_CLASS = {
    "1.2.840.10008.1.3.10": (ErrorCode.DICOMDIR, "the directory of a DICOM medium"),
    "1.2.840.10008.5.1.4.1.1.88.59": (ErrorCode.KEY_OBJECT_SELECTION, "a key object selection"),
}
_BY_SOP_CLASS_FAMILY = {
    "1.2.840.10008.5.1.4.1.1.88.": (ErrorCode.STRUCTURED_REPORT, "a structured report"),
    "1.2.840.10008.5.1.4.1.1.11.": (ErrorCode.PRESENTATION_STATE, "a presentation state"),
}
_DX_FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
_INTENTS = frozenset(("FOR PRESENTATION", "FOR PROCESSING"))
# CR, DX and secondary capture storage (PS3.6 Annex A), for headers without a modality.
_RADIOGRAPHY_CLASSES = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(1|1\.1(\.1)?|7(\.\d)?)")


def facts_of(dataset: Any, hmac_key: bytes | None) -> dict[str, object]:
    """The columns of a row that come from the header, by name."""
    return {
        "format": "dicom",
        "rows": _positive(dataset, "Rows"),
        "columns": _positive(dataset, "Columns"),
        "photometric_interpretation": photometric_of(dataset),
        "modality": _term(dataset, "Modality", _RADIOGRAPHY | _OTHER_MODALITIES),
        "body_part": _body_part(dataset),
        "view_position": _view_position(dataset),
        "patient_sex": _term(dataset, "PatientSex", frozenset("MFO")),
        "patient_age_years": _age_years(dataset),
        "patient_hmac": _hmac(hmac_key, _text(dataset, "PatientID")),
        "study_hmac": _hmac(hmac_key, _text(dataset, "StudyInstanceUID")),
        "synthetic": is_synthetic(_text(dataset, "ImageComments")),
    }


def photometric_of(dataset: Any) -> str | None:
    """PhotometricInterpretation as a term of the standard; None if it is none. Spaces around it
    mean nothing (PS3.5 6.2), and some programs write lower case."""
    return _term(dataset, "PhotometricInterpretation", _PHOTOMETRIC)


def check_kind(dataset: Any) -> None:
    """Raises `ImageError` for a DICOM object that is not an image, by its SOP class."""
    sop_class = _text(dataset, "SOPClassUID") or str(
        getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID") or ""
    )
    if "DirectoryRecordSequence" in dataset:
        sop_class = "1.2.840.10008.1.3.10"
    found = _BY_SOP_CLASS.get(sop_class)
    for family, kind in _BY_SOP_CLASS_FAMILY.items():
        if found is None and sop_class.startswith(family):
            found = kind
    if found is not None:
        raise ImageError(found[0], Stage.DECODE, f"{found[1]}, not an image")


def is_image_class(dataset: Any) -> bool:
    """Whether objects of this SOP class have pixels."""
    from pydicom.uid import UID

    return "Image Storage" in UID(_text(dataset, "SOPClassUID")).name


def check_wanted(dataset: Any, facts: dict[str, object], accept: Set[ErrorCode]) -> None:
    """Raises `ImageError` (`wrong_modality`, `wrong_body_part`, `for_processing`, `lateral_view`)
    if the header names something else than a frontal chest film for display. Does not raise if the
    header says nothing.

    `facts`: of `facts_of`. `accept`: those of the codes that the user wants scored all the same.
    """
    modality, sop_class = facts["modality"], _text(dataset, "SOPClassUID")
    other_class = (
        modality is None
        and sop_class.startswith("1.2.840.10008.")
        and not _RADIOGRAPHY_CLASSES.fullmatch(sop_class)
    )
    if modality in _OTHER_MODALITIES or other_class:
        _refuse(ErrorCode.WRONG_MODALITY, "not projection radiography", accept)
    if facts["body_part"] not in (None, "CHEST"):
        _refuse(ErrorCode.WRONG_BODY_PART, "not the chest", accept)
    # PS3.3 C.8.11.3: another object of the same exposure is the film.
    intent = _term(dataset, "PresentationIntentType", _INTENTS)
    if intent == "FOR PROCESSING" or (intent is None and sop_class == _DX_FOR_PROCESSING):
        _refuse(ErrorCode.FOR_PROCESSING, "raw values that are not for display", accept)
    if facts["view_position"] in _OTHER_VIEWS:
        _refuse(ErrorCode.LATERAL_VIEW, "not a frontal view", accept)


def _refuse(code: ErrorCode, what: str, accept: Set[ErrorCode]) -> None:
    if code not in accept:
        raise ImageError(code, Stage.DECODE, f"{what}, says the header")


def _text(dataset: Any, keyword: str) -> str:
    try:
        return str(dataset.get(keyword) or "").strip()
    except Exception:
        # pydicom parses a value when it is read, and refuses some. They count as absent.
        return ""


def _term(dataset: Any, keyword: str, terms: Set[str]) -> str | None:
    value = _text(dataset, keyword).upper()
    return value if value in terms else None


def _positive(dataset: Any, keyword: str) -> int | None:
    try:
        value = dataset.get(keyword)
    except Exception:
        return None
    return value if isinstance(value, int) and 0 < value < 2**31 else None


def _body_part(dataset: Any) -> str | None:
    text = _text(dataset, "BodyPartExamined").upper()
    if "SPINE" in text or "THORACOL" in text:
        return "SPINE"  # a thoracic spine is not a chest
    if _CHEST.search(text):
        return "CHEST"
    if text:
        # "HAND LT" and "Left-Hand" are a hand, too.
        words = [word for word in re.split(r"[^A-Z]+", text) if word in _OTHER_BODY_PARTS]
        joined = re.sub(r"[^A-Z]", "", text)
        return words[0] if words else joined if joined in _OTHER_BODY_PARTS else None
    # Anatomic Region Sequence, CID 4031: thorax, chest, lung. Others are not mapped.
    codes = {"T-D3000", "51185008", "816094009", "T-28000", "39607008"}
    return "CHEST" if _sequence_code(dataset, "AnatomicRegionSequence") in codes else None


def _view_position(dataset: Any) -> str | None:
    worded = _view_in_words(_text(dataset, "ViewPosition").upper())
    if worded is not None:
        return worded
    coded = _VIEW_CODES.get(_sequence_code(dataset, "ViewCodeSequence"))
    if coded is not None:
        return coded
    # Patient Orientation (PS3.3 C.7.6.1.1.1): if rows or columns run to the front or back of the
    # patient, the view is from the side. Left and right do not tell AP from PA.
    try:
        directions = dataset.get("PatientOrientation")
        # A single text instead of two values is ambiguous: PA may be a view.
        found = [] if isinstance(directions, str) else [str(each).upper() for each in directions]
    except Exception:
        return None
    return "LATERAL" if any(each[:1] in ("A", "P") for each in found) else None


def _view_in_words(text: str) -> str | None:
    """The view that words such as `AP ERECT` or `LEFT LATERAL` name. None if they name none, or
    both a frontal and a lateral one: `PA/LAT` is what was ordered, not which of them this is."""
    views = [view for word in re.split(r"[^A-Z]+", text) if (view := _view_of_word(word))]
    for view in views:
        if view in _DECUBITUS_AND_OBLIQUE:
            return view  # even with a frontal one, as in `AP LLD`
    is_one = len(set(views)) == 1 or (views and not _FRONTAL_VIEWS & set(views))
    return views[0] if is_one else None


def _view_of_word(word: str) -> str | None:
    if word in _FRONTAL_VIEWS | _OTHER_VIEWS:
        return word
    if _DECUBITUS.fullmatch(word):
        return "DECUBITUS"
    return "LATERAL" if _LATERAL.fullmatch(word) else None


def _sequence_code(dataset: Any, keyword: str) -> str:
    try:
        return str(dataset.get(keyword)[0].get("CodeValue") or "")
    except Exception:
        return ""


def _age_years(dataset: Any) -> int | None:
    years = years_of(_text(dataset, "PatientAge"))
    return min(90, years) if years is not None and years <= MAX_AGE_YEARS else None


def _hmac(key: bytes | None, value: str) -> str | None:
    if key is None or not value:
        return None
    return hmac.new(key, value.encode(), hashlib.sha256).hexdigest()
