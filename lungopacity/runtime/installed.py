"""Which versions are installed here."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Versions of everything that can change a result, for the model folder and a run's record."""
    found = {"python": platform.python_version()}
    for name in ("lungopacity", "ray", "torch", "ncnn", "numpy", "pillow", "pydicom", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A submitted job may run from its uploaded working directory without being installed.
            found[name] = "source"
    return found
