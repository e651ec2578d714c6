"""DICOM to grey pixels by the pipeline of PS3.4 N.2: Modality LUT, VOI LUT, Presentation LUT.

No header value is quoted in an error: any text element can hold a name.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import MAX_AGE_YEARS, SYNTHETIC_MARK, DecodeLimits, Radiograph
from lungopacity.radiograph.grey import stretch_to_uint8

# pydicom warns with the offending value in the text. Values may be names, so nothing is passed on.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


def decode_dicom(data: bytes, limits: DecodeLimits) -> Radiograph:
    """Decode one single-frame grey DICOM image to MONOCHROME2 polarity.

    Raises `ImageError` for anything else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = _read(data)
        rows, columns = _shape(dataset)
        limits.check_pixels(rows, columns)
        try:
            pixels = _presentation_values(dataset)
            return Radiograph(
                pixels=pixels,
                format="dicom",
                rows=rows,
                columns=columns,
                photometric_interpretation=_code(dataset, "PhotometricInterpretation"),
                view_position=_code(dataset, "ViewPosition"),
                patient_sex=_sex(dataset),
                patient_age_years=_age_years(dataset),
                synthetic=str(dataset.get("ImageComments") or "")
                .lower()
                .startswith(SYNTHETIC_MARK),
            )
        except ImageError:
            raise
        except NotImplementedError as error:
            raise ImageError(
                ErrorCode.UNSUPPORTED, Stage.DECODE, "no decoder for this transfer syntax"
            ) from error
        except Exception as error:
            short = "less than" in str(error) or "truncated" in str(error).lower()
            raise ImageError(
                ErrorCode.TRUNCATED if short else ErrorCode.CORRUPT_IMAGE,
                Stage.DECODE,
                f"pixel data cannot be decoded ({type(error).__name__})",
            ) from error


def _read(data: bytes) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(io.BytesIO(data), force=True)
    except Exception as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE,
            Stage.DECODE,
            f"DICOM header cannot be read ({type(error).__name__})",
        ) from error


def _shape(dataset: Any) -> tuple[int, int]:
    if "PixelData" not in dataset:
        raise ImageError(ErrorCode.NO_PIXELS, Stage.DECODE, "the object holds no pixel data")
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames = int(dataset.get("NumberOfFrames") or 1)
        samples = int(dataset.get("SamplesPerPixel") or 1)
    except Exception as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "rows, columns, frames or samples unreadable"
        ) from error
    if frames > 1:
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, f"{frames} frames in one object")
    if samples != 1:
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, f"{samples} samples a pixel")
    return rows, columns


def _presentation_values(dataset: Any) -> npt.NDArray[np.uint8]:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    if not hasattr(dataset.file_meta, "TransferSyntaxUID"):
        # PS3.5 10.1: Implicit VR Little Endian is the default where nothing is said.
        from pydicom.uid import ImplicitVRLittleEndian

        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    stored = dataset.pixel_array
    if "PhotometricInterpretation" not in dataset:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the header does not say the polarity"
        )
    photometric = str(dataset.PhotometricInterpretation)
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(ErrorCode.UNSUPPORTED, Stage.DECODE, "not a grey image")
    modality = apply_modality_lut(stored, dataset)
    windowed = np.asarray(apply_voi_lut(modality, dataset, index=0), dtype=np.float64)
    grey = stretch_to_uint8(windowed, *_window_range(dataset))
    # MONOCHROME1 shows its smallest value as white (PS3.3 C.7.6.3.1.2).
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _window_range(dataset: Any) -> tuple[float | None, float | None]:
    """The range that `apply_voi_lut` maps a window onto: that of the modality values' type.

    Taking the result's own minimum and maximum instead would undo a window that clips nothing.
    Without a window the image's own range stands in (None, None).
    """
    if "VOILUTSequence" in dataset or "WindowWidth" not in dataset:
        return None, None
    bits = int(dataset.BitsStored)
    low, high = (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if int(dataset.get("PixelRepresentation") or 0)
        else (0, 2**bits - 1)
    )
    if "ModalityLUTSequence" in dataset:
        return None, None
    slope = float(dataset.get("RescaleSlope") or 1)
    intercept = float(dataset.get("RescaleIntercept") or 0)
    ends = (low * slope + intercept, high * slope + intercept)
    return min(ends), max(ends)


def _code(dataset: Any, keyword: str) -> str | None:
    """A coded value. Anything that is not a short code is dropped: it could be free text."""
    value = str(dataset.get(keyword) or "").strip().upper()
    return value if re.fullmatch(r"[A-Z0-9_ ]{1,16}", value) else None


def _sex(dataset: Any) -> str | None:
    value = _code(dataset, "PatientSex")
    return value if value in ("M", "F", "O") else None


def _age_years(dataset: Any) -> int | None:
    # Age String, PS3.5 6.2: three digits and D, W, M or Y. Public sets (RSNA) write bare years.
    match = re.fullmatch(r"(\d{1,3})([DWMY]?)", str(dataset.get("PatientAge") or "").strip())
    if not match:
        return None
    years_per_unit = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0, "": 1.0}[match[2]]
    years = int(int(match[1]) * years_per_unit)
    return min(90, years) if years <= MAX_AGE_YEARS else None
