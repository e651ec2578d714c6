"""The real radiographs, which never enter the repository. Without them, tests that need them are
skipped."""

from pathlib import Path

import pytest

_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DICOM_FOLDER = _DATA / "dicom"
LUNG_FIELDS = _DATA / "lung-fields"


def needs_real_data(test):
    """Mark the test, and skip it without the data."""
    skip = pytest.mark.skipif(
        not LUNG_FIELDS.is_dir(), reason="no real radiographs beside the checkout"
    )
    return pytest.mark.real_data(skip(test))
