"""Which versions are installed here, and whether a node has the driver's."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
from functools import cache
from pathlib import Path

from lungopacity.errors import UserError


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
