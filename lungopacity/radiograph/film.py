"""A decoded radiograph, and the limits on decoding one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage

SYNTHETIC_MARK = "synthetic phantom"
"""The comment of every file of the phantom archive begins with this (PNG text, JPEG COM, DICOM)."""


_MAX_PIXELS_PER_BYTE = 200
"""The ratio that containers may have, too. JPEG of good quality has four to ten."""

MAX_AGE_YEARS = 120
"""An age above this is a mistake in the record, and is treated as unknown."""


def years_of(age: str) -> int | None:
    """Whole years from a DICOM Age String (PS3.5 6.2: three digits and D, W, M or Y), or from bare
    years, as in public data sets (RSNA). None for anything else."""
    match = re.fullmatch(r"(\d{1,3})([DWMY]?)", age.strip())
    if not match:
        return None
    years_per_unit = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0, "": 1.0}[match[2]]
    return int(int(match[1]) * years_per_unit)


def is_synthetic(comment: object) -> bool:
    """Whether the comment of a file, as text or bytes, marks it as a phantom."""
    if isinstance(comment, bytes):
        comment = comment.decode("ascii", "replace")
    return isinstance(comment, str) and comment.lower().startswith(SYNTHETIC_MARK)


@dataclass(frozen=True)
class DecodeLimits:
    """Limits for one file. An image beyond them is refused."""

    max_megapixels: float = 100.0
    """Height times width. A 43 x 43 cm detector at 0.1 mm is 18 megapixels."""
    max_size_bytes: int = 512 * 1024 * 1024
    """Size of the encoded file, and of a deflated DICOM file once it is inflated."""
    max_frames: int = 4096
    """Images in one file. A minute of fluoroscopy at 30 frames a second has 1,800."""
    max_scans: int = 100
    """Passes of a JPEG over its pixels: each takes time, but hardly a byte. Progressive JPEGs have
    about ten."""
    max_seconds: float = 8.0
    """CPU time for one image in the decoder's process, which is killed after that. The slowest
    images of a real size, noise of 18 megapixels in JPEG 2000, take 3.3 s."""
    max_memory_bytes: int = 2 * 1024 * 1024 * 1024
    """Memory of the decoder's process."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not getattr(self, limit.name) > 0:
                raise ValueError(f"{limit.name} must be above 0, not {getattr(self, limit.name)}")

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
        """Raises `ImageError` (`too_large`, `corrupt_image`). To be called before memory for the
        pixels is allocated."""
        if rows < 1 or columns < 1:
            raise ImageError(ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "no rows or no columns")
        if rows * columns > self.max_megapixels * 1e6:
            raise ImageError(
                ErrorCode.TOO_LARGE,
                Stage.DECODE,
                f"{columns} x {rows} pixels, limit {self.max_megapixels:g} megapixels",
            )

    def check_frames(self, frames: int) -> None:
        """Raises `ImageError` (`too_large`) for a file with too many images."""
        if frames > self.max_frames:
            raise ImageError(
                ErrorCode.TOO_LARGE, Stage.DECODE, f"{frames} frames, limit {self.max_frames}"
            )

    def check_unpacked(self, pixels: int, size_bytes: int) -> None:
        """Raises `ImageError` (`decompression_bomb`) if the images of one file have more pixels
        together than real ones would have in `size_bytes`. For a single image use `check_pixels`.
        """
        if pixels > self.max_megapixels * 1e6 + _MAX_PIXELS_PER_BYTE * size_bytes:
            raise ImageError(
                ErrorCode.DECOMPRESSION_BOMB,
                Stage.DECODE,
                f"{pixels} pixels in {size_bytes} bytes of frames",
            )

    def check_scans(self, scans: int) -> None:
        """Raises `ImageError` (`decompression_bomb`) for a JPEG that would take hours to decode."""
        if scans > self.max_scans:
            raise ImageError(
                ErrorCode.DECOMPRESSION_BOMB, Stage.DECODE, f"{scans} scans, limit {self.max_scans}"
            )


def as_image_error(
    error: Exception,
    otherwise: Callable[[Exception], ImageError],
    facts: Mapping[str, object] | None = None,
) -> ImageError:
    """The `ImageError` for a film whose decoding raised `error`. `otherwise`: translates the errors
    of a decoder. `facts`: columns of its row, which replace those that `error` has."""
    if isinstance(error, ImageError):
        found = error
    elif isinstance(error, MemoryError):
        found = ImageError(ErrorCode.TOO_LARGE, Stage.DECODE, "needs more memory than allowed")
    else:
        found = otherwise(error)
    if facts is not None:
        found.facts = dict(facts)
    return found


def error_of_part(
    error: Exception, otherwise: Callable[[Exception], ImageError], facts: Mapping[str, object]
) -> ImageError:
    """`as_image_error` for the error of one frame or page, which is yielded instead of raised. It
    has no traceback: its frames would keep the file and, since Python 3.13, the caller that has the
    error."""
    found = as_image_error(error, otherwise, facts)
    found.__traceback__ = found.__cause__ = found.__context__ = None
    return found


def sides(rows: int, columns: int) -> dict[str, int]:
    """Those of the two that a row can hold: positive, and at most 31 bits."""
    both = {"rows": rows, "columns": columns}
    return {name: side for name, side in both.items() if 0 < side < 2**31}


@dataclass(frozen=True)
class Radiograph:
    """A decoded film. No field can name a patient."""

    pixels: npt.NDArray[np.uint8]
    """(height, width), MONOCHROME2: little attenuation (air) is dark, much (bone) is bright."""
    format: str
    """png, jpeg, dicom, …"""
    rows: int
    """Of the stored image, as is `columns`; `pixels` may be smaller, see `decode_radiographs`."""
    columns: int
    frame: int | None = None
    """Index among the images of the file, from 0; None if the file holds a single one."""
    photometric_interpretation: str | None = None
    """Of the DICOM header; for other formats the Pillow mode (L, I;16, RGB, …)."""
    modality: str | None = None
    """A defined term of PS3.3 C.7.3.1.1.1, such as CR or DX; None if the header gives none."""
    body_part: str | None = None
    """CHEST, or a defined term for another part; None if the header gives none, or is unclear."""
    view_position: str | None = None
    """PA, AP, LL, RL, …; None if the header gives none."""
    patient_sex: str | None = None
    """M, F or O."""
    patient_age_years: int | None = None
    """90 for everyone who is older: an age above 89 identifies a person (HIPAA safe harbour)."""
    patient_hmac: str | None = None
    """HMAC-SHA-256 of the patient's id, in hex; None without a key."""
    study_hmac: str | None = None
    """The same for the Study Instance UID."""
    synthetic: bool = False
    """The file says that it is a phantom, drawn by a program."""
    coloured_fraction: float = field(default=0.0, compare=False)
    """Share of pixels that are clearly coloured, 0 … 1."""

    def facts(self) -> Mapping[str, object]:
        """Every field except the pixels, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)[1:]}
