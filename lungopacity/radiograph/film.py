"""What one decoded radiograph is, and what decoding one may cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage

SYNTHETIC_MARK = "synthetic phantom"
"""Begins the comment of every file that the phantom archive writes (PNG text, JPEG COM, DICOM)."""


MAX_AGE_YEARS = 120
"""Above it an age is a mistake in the record, and taken as unknown."""


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost before it is refused."""

    max_megapixels: float = 100.0
    """Height times width. A 43 x 43 cm detector at 0.1 mm is 18 megapixels."""
    max_size_bytes: int = 512 * 1024 * 1024
    """Size of the encoded file."""

    def check_size(self, size_bytes: int) -> None:
        """Raises `ImageError` (`empty`, `too_large`) for a file that must not be decoded."""
        if size_bytes == 0:
            raise ImageError(ErrorCode.EMPTY, Stage.FETCH, "the file has no bytes")
        if size_bytes > self.max_size_bytes:
            raise ImageError(
                ErrorCode.TOO_LARGE,
                Stage.FETCH,
                f"{size_bytes} bytes, limit {self.max_size_bytes}",
            )

    def check_pixels(self, rows: int, columns: int) -> None:
        """Raises `ImageError` (`too_large`) before memory for the pixels is taken."""
        if rows * columns > self.max_megapixels * 1e6:
            raise ImageError(
                ErrorCode.TOO_LARGE,
                Stage.DECODE,
                f"{columns} x {rows} pixels, limit {self.max_megapixels:g} megapixels",
            )


@dataclass(frozen=True)
class Radiograph:
    """A decoded film. No field can name a patient."""

    pixels: npt.NDArray[np.uint8]
    """(height, width), dark = little attenuation (air), bright = much (bone): MONOCHROME2."""
    format: str
    """png, jpeg, dicom, …"""
    rows: int
    """Of the stored image; `pixels` may be smaller, see `decode_radiograph`."""
    columns: int
    photometric_interpretation: str | None = None
    """As the DICOM header says; for other formats the Pillow mode (L, I;16, RGB, …)."""
    view_position: str | None = None
    """PA, AP, LL, RL, … as the header says; None where it is silent."""
    patient_sex: str | None = None
    """M, F or O."""
    patient_age_years: int | None = None
    """90 for everyone older: above 89 an age identifies (HIPAA safe harbour)."""
    synthetic: bool = False
    """The file says that it is a phantom, drawn by a program."""
