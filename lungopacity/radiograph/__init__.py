"""Bytes to pixels. Training, evaluation and screening all read radiographs here, and only here."""

from lungopacity.radiograph.decode import decode_radiograph
from lungopacity.radiograph.film import MAX_AGE_YEARS, SYNTHETIC_MARK, DecodeLimits, Radiograph
from lungopacity.radiograph.preprocess import Preprocessing

__all__ = [
    "MAX_AGE_YEARS",
    "SYNTHETIC_MARK",
    "DecodeLimits",
    "Preprocessing",
    "Radiograph",
    "decode_radiograph",
]
