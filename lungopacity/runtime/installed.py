"""Which versions are installed here, and whether a node has the driver's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
from functools import cache
from pathlib import Path

from lungopacity.errors import UserError

_PACKAGES = (
    "imagecodecs", "ncnn", "numpy", "pillow", "pyarrow", "pydicom", "pyjpegls", "pylibjpeg",
    "pylibjpeg-openjpeg", "python-gdcm", "ray", "simplejpeg", "timm", "torch", "torchvision",
)  # fmt: skip
"""Packages that read or score."""


def versions() -> dict[str, str]:
    """Versions of everything that can change a result, for the model folder and a run's record.
    Packages that are not installed are left out."""
    found = {
        "python": platform.python_version(),
        "lungopacity": _version("lungopacity") or "source",
    }
    return found | {name: version for name in _PACKAGES if (version := _version(name)) is not None}


@cache
def _version(package: str) -> str | None:
    """None if it is not installed: a submitted job may run from its uploaded working directory.
    Looked up once, because each look takes a millisecond, and history asks for every run."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def code_digest() -> str:
    """SHA-256 of this package's source files. The version number does not tell two commits
    apart."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def check_same_code(driver: str) -> None:
    """Raises `UserError` in a process of Ray whose node has another lungopacity than the driver:
    its scores would stand under the driver's version. `driver`: the driver's `code_digest`."""
    if code_digest() != driver:
        raise UserError(
            f"{socket.gethostname()}: this Ray node's lungopacity, in {Path(__file__).parents[1]}, "
            "is another version than the driver's, or was changed since the job started; install "
            "the same on every node, or submit the job with --working-dir"
        )
