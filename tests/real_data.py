"""The radiographs that never enter the repository; tests that need them skip without."""

from pathlib import Path

import pytest

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DICOM_FOLDER = _DATA / "dicom"
LUNG_FIELDS = _DATA / "lung-fields"


def needs_real_data(test):
    """Mark, and skip without the data."""
    skip = pytest.mark.skipif(
        not LUNG_FIELDS.is_dir(), reason="no real radiographs beside the checkout"
    )
    return pytest.mark.real_data(skip(test))
