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
_LATERAL = re.compile(r"(L|R|LT|RT|X|XT|LATERO)?LAT(ERALE?)?(L|R|LT|RT)?")
"""LLAT, RTLAT, LATERALE, …, but not words such as BILATERAL."""
_DECUBITUS = re.compile(r"(L|R|LL|RL|LT|RT)?DECUB\w*")


def _by_code(lines: str) -> dict[str, str]:
    """The term of each code. Each line has a term, and its codes in SNOMED-RT, which older objects
    have, and in SNOMED CT."""
    rows = map(str.split, lines.strip().splitlines())
    return {code: term for term, *codes in rows for code in codes}


# View Code Sequence, PS3.16 CID 4010. DX objects must have it, even if empty; they may lack View
# Position.
_VIEW_CODES = _by_code("""
    AP R-10206 399348003
    PA R-10214 R-40888 272479007
    LL R-10236 399173006
    RL R-10232 399198007
    LATERAL R-102CD 399067008 R-10228 399352003 R-10224 399260004 R-10222 G-A145 30730003
    LAO R-10220 399135007
    RAO R-10218 R-40985 399356000
    LPO R-10212 399006002
    RPO R-10210 399038007
    OBLIQUE R-102C1 399182000 R-10208 399312000 R-10216 399059000 R-10204 399160007
    OBLIQUE R-10234 399236003 R-10238 399184004 R-40783 260427002 R-40782 260426006
""")
_CHEST = re.compile(r"CHEST|THORA|TORAX|TÓRAX|LUNG|\bCXR\b|BRUSTKORB|POUMON|PECHO")
# Anatomic Region Sequence, PS3.16 CID 4031, with the terms of Annex L. DX objects must have it,
# even if empty; they may lack Body Part Examined.
_REGION_CODES = _by_code("""
    CHEST T-D3000 51185008 816094009 T-28000 39607008 T-280A0 86598002 R-FAB52 417437006
    CHEST R-FAB53 416152001 R-FAB54 416319003 R-FAB55 416550000 R-FAB56 416775004
    SPINE T-D04FF 421060004 T-11501 122494005 T-11502 122495006 T-11503 122496007
    SPINE T-D00F7 297171002 1217257000 T-D00F8 297172009 1217256009 T-11AD0 54735007
    SPINE T-D00F9 297173004 1217253001
    ABDOMEN T-D4000 113345001 818981001
    ABDOMENPELVIS R-FAB57 416949008 818982008
    ACJOINT T-15420 85856004
    ANKLE T-15750 70258002
    CALCANEUS T-12770 80144004
    CLAVICLE T-12310 51299004
    COCCYX T-11BF0 64688005
    ELBOW T-15430 16953009
    EXTREMITY T-D0300 66019005
    FEMUR T-12710 71341001
    FIBULA T-12750 87342007
    FINGER T-D8800 7569003
    FOOT T-D9700 56459004
    FOREARM T-D8500 14975008
    HAND T-D8700 85562004
    HEAD T-D1100 69536005 T-11196 91397008 T-22000 2095001
    HEADNECK T-D1000 774007
    HIP T-15710 24136001 T-D2500 29836001
    HUMERUS T-12410 85050009
    ILIUM T-12340 22356005
    JAW T-D1213 661005
    KNEE T-D9200 72696002
    LOWERLEG T-D9400 30021000
    LOWERLIMB T-D9000 61685007
    MANDIBLE T-11180 91609006
    MASTOID T-11133 59066005
    MAXILLA T-11170 70925003
    NECK T-D1600 45048000
    NOSE T-11149 74386004
    ORBIT T-D14AE 363654007
    PATELLA T-12730 64234005
    PELVIS T-D6000 12921003 816092008
    PELVISLOWEXTREMT R-FAB58 416631005 1231522001
    PHANTOM 113681 R-FE0C7 706342009
    RIB T-11300 113197003
    SCAPULA T-12280 79601000
    SCJOINT T-15610 7844006
    SELLA T-D1460 42575006
    SESAMOID T-12980 58742003
    SHOULDER T-D2220 16982005
    SIJOINT T-15680 39723000
    SKULL T-11100 89546000
    STERNUM T-11210 56873002
    THIGH T-D9100 68367000
    THUMB T-D8810 76505004
    TMJ T-15290 53620006
    TOE T-D9800 29707007
    UPPERARM T-D8200 40983000
    UPPERLIMB T-D8000 53120007
    WHOLEBODY T-D0010 38266002
    WRIST T-15460 74670003
    ZYGOMA T-11166 13881006
""")
# These and further terms of Annex L, as far as radiography rooms meet them. A term outside this
# list counts as none: hospitals write their own words here, and sometimes names.
_OTHER_BODY_PARTS = (
    frozenset(_REGION_CODES.values())
    | frozenset(
        """ARM BLADDER BREAST BUTTOCK CALF CAROTID CEREBELLUM COLON CSPINE CTSPINE EAR EYE FACE
        IAC KIDNEY LARYNX LEG LIVER LSPINE LSSPINE NASOPHARYNX PANCREAS RADIUS RADIUSULNA SACRUM
        SCALP SSPINE STOMACH TARSUS TESTIS TIBIA TIBIAFIBULA TLSPINE TONGUE TSPINE ULNA
        WHOLESPINE""".split()
    )
) - {"CHEST"}

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
    # "HAND LT" and "Left-Hand" are a hand, too.
    words = (*re.split(r"[^A-Z]+", text), re.sub(r"[^A-Z]", "", text))
    named = next((word for word in words if word in _OTHER_BODY_PARTS), None)
    return named or _REGION_CODES.get(_sequence_code(dataset, "AnatomicRegionSequence"))


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
