"""Bytes to pixels. Training, evaluation and screening decode radiographs here, and only here."""

from lungopacity.radiograph.decode import decode_radiographs
from lungopacity.radiograph.dicom_header import ACCEPTABLE
from lungopacity.radiograph.film import (
    MAX_AGE_YEARS,
    SYNTHETIC_MARK,
    DecodeLimits,
    Radiograph,
    years_of,
)
from lungopacity.radiograph.preprocess import Preprocessing
from lungopacity.radiograph.quality import (
    OUT_OF_DISTRIBUTION,
    QUALITY_FLAGS,
    REJECTED_BY_DEFAULT,
    Quality,
    judge,
)

__all__ = [
    "ACCEPTABLE",
    "MAX_AGE_YEARS",
    "OUT_OF_DISTRIBUTION",
    "QUALITY_FLAGS",
    "REJECTED_BY_DEFAULT",
    "SYNTHETIC_MARK",
    "DecodeLimits",
    "Preprocessing",
    "Quality",
    "Radiograph",
    "decode_radiographs",
    "judge",
    "years_of",
]
