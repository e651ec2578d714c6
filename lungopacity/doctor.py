"""What this machine has for the job, what is missing, and how to fix it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from lungopacity.errors import NOTICE, UserError, first_line
from lungopacity.runtime import (
    LONGEST_FOLDER,
    SHORTER_FOLDER,
    is_submission_address,
    own_cpus,
    ray_session,
)
from lungopacity.words import counted

MIN_TORCH = (2, 11)
"""As in pyproject.toml. Checked again because torch may have been installed separately."""
_MIN_FREE_BYTES = 5 << 30
_CONNECT_S = 5.0
_NVIDIA = ("/proc/driver/nvidia/version", "/dev/nvidia0")
_LIBRARIES = ("duckdb", "imagecodecs", "matplotlib", "obstore", "simplejpeg", "timm")
"""Those that no other check imports."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str
    """`ok`, `note` (works, with a limit) or `missing`."""
    what: str
    detail: str
    fix: str = ""
    """What to do about it."""


def diagnose(storage: str | None = None, results: str | None = None) -> list[Finding]:
    """Check everything that the job needs. `storage`: a URI that is also listed. `results`: a URI
    that is also written to; the test files are removed at once."""
    findings: list[Finding] = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _torch, _ncnn, _libraries, _ray, _decoders, _disk, _s3,
    ]  # fmt: skip
    for check in checks:
        name = check.__name__.strip("_")
        try:
            findings += check()
        except UserError as error:
            findings.append(_refused(name, error))
        except Exception as error:
            why = f"cannot be used: {first_line(error, with_type=True)}"
            findings.append(Finding("missing", name, why, "install requirements.lock again"))
    return [*findings, *diagnose_places(storage, results)]


def diagnose_places(storage: str | None = None, results: str | None = None) -> list[Finding]:
    """Only those checks of `diagnose` that concern the two URIs."""
    findings: list[Finding] = []
    if storage is not None:
        findings += _place(storage)
    if results is not None:
        findings += _results(results)
    return findings


def report(findings: list[Finding]) -> str:
    """The findings as aligned text; the line below a finding says how to fix it."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8}{finding.what:{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':8}{'':{width}}  → {finding.fix}")
    return "\n".join([*lines, NOTICE])


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "python", f"{version}, {counted(own_cpus(), 'CPU core')}")


def _torch() -> Iterator[Finding]:
    import torch
    import torchvision

    numbers = tuple(int(part) for part in torch.__version__.split(".")[:2])
    yield Finding(
        "ok" if numbers >= MIN_TORCH else "missing",
        "torch",
        f"{torch.__version__}, torchvision {torchvision.__version__}",
        "" if numbers >= MIN_TORCH else f"needs torch {'.'.join(map(str, MIN_TORCH))} or newer",
    )
    if not torch.cuda.is_available():
        there = any(map(os.path.exists, _NVIDIA))
        yield Finding(
            "note",
            "gpu",
            "none that torch can use: everything runs on the CPU",
            "there is an NVIDIA GPU: install driver 580 or newer" if there else "",
        )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding("ok", "gpu", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")


def _ncnn() -> Iterator[Finding]:
    import ncnn
    import pnnx

    runs = os.access(pnnx.EXEC_PATH, os.X_OK)
    yield Finding(
        "ok" if runs else "note",
        "ncnn",
        f"{ncnn.__version__}, runs networks on CPUs"
        + ("" if runs else "; pnnx cannot be run, so newly trained networks run in torch"),
        "" if runs else "install pnnx from requirements.lock",
    )


def _libraries() -> Iterator[Finding]:
    for name in _LIBRARIES:
        importlib.import_module(name)
    yield Finding("ok", "libraries", ", ".join(_LIBRARIES))


def _ray() -> Iterator[Finding]:
    import ray
    import ray.data
    import ray.train

    address = os.environ.get("RAY_ADDRESS")
    if address and is_submission_address(address):
        detail = f"RAY_ADDRESS is {address}, an address for submitting jobs"
        fix = "unset it, and give it to `ray job submit --address`"
        yield Finding("missing", "ray", detail, fix)
        return
    if not address or address == "local":
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or ""
        if len(folder.rstrip("/").encode()) > LONGEST_FOLDER:
            detail = f"its folder, {folder}, has a path that is too long for its sockets"
            yield Finding("missing", "ray", detail, SHORTER_FOLDER)
            return
        yield Finding("ok", "ray", f"{ray.__version__}, will run on this machine alone")
        return
    _check_answers(address)
    with ray_session():
        has = ray.cluster_resources()
    yield Finding(
        "ok",
        "ray",
        f"{ray.__version__}, joins {address} (RAY_ADDRESS) of {counted(has.get('CPU', 0), 'CPU')} "
        f"and {counted(has.get('GPU', 0), 'GPU')}",
    )


def _check_answers(address: str) -> None:
    """Raises `UserError` at once where Ray itself would wait for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.port is not None:
            socket.create_connection((parts.hostname or "", parts.port), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"nothing answers at {address} ({error}); check RAY_ADDRESS, or unset it to run on "
            "this machine alone"
        ) from error


def _decoders() -> Iterator[Finding]:
    from PIL import features
    from pydicom.pixels import get_decoder
    from pydicom.uid import (
        JPEG2000,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        HTJ2KLossless,
        JPEG2000Lossless,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        RLELossless,
    )

    formats = {"png": "zlib", "jpeg": "jpg", "jpeg 2000": "jpg_2000", "tiff": "libtiff"}
    for name, feature in formats.items():
        has = features.check(feature)
        yield Finding(
            "ok" if has else "missing",
            name,
            "Pillow" if has else "Pillow was built without it",
            "" if has else "install Pillow from requirements.lock",
        )
    syntaxes = (
        ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit,
        JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless,
        JPEG2000, HTJ2KLossless,
    )  # fmt: skip
    lacking = [uid.name for uid in syntaxes if not _has_decoder(get_decoder, uid)]
    yield Finding(
        "missing" if lacking else "ok",
        "dicom",
        f"no decoder for {', '.join(lacking)}"
        if lacking
        else f"pydicom {importlib.metadata.version('pydicom')}, {len(syntaxes)} transfer syntaxes",
        "install python-gdcm and pylibjpeg-openjpeg from requirements.lock" if lacking else "",
    )


def _has_decoder(get_decoder: Callable[[object], object], uid: object) -> bool:
    try:
        return bool(getattr(get_decoder(uid), "is_available", True))
    except NotImplementedError:
        return uid.is_transfer_syntax and not uid.is_encapsulated  # type: ignore[attr-defined]


def _disk() -> Iterator[Finding]:
    for what, folder, fix in (
        (
            "temporary files",
            tempfile.gettempdir(),
            "shards are read and Ray spills here; give it 5 GiB or more, or set TMPDIR to another "
            "folder",
        ),
        ("object store", "/dev/shm", "Ray keeps films in progress here; give it 5 GiB or more"),
    ):
        if not os.path.isdir(folder):
            continue
        free = shutil.disk_usage(folder).free
        enough = free >= _MIN_FREE_BYTES
        yield Finding(
            "ok" if enough else "note",
            what,
            f"{free / 2**30:.0f} GiB free in {folder}",
            "" if enough else fix,
        )


def _s3() -> Iterator[Finding]:
    from lungopacity.storage.s3_clients import aws_session, s3_client

    credentials = aws_session().get_credentials()
    endpoint = s3_client().meta.endpoint_url
    if credentials is None:
        yield Finding(
            "note",
            "s3",
            "no credentials: only local paths can be used",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
        return
    yield Finding("ok", "s3", f"credentials from {credentials.method}, {endpoint}")


def _refused(what: str, error: UserError) -> Finding:
    detail, _, fix = str(error).rpartition("; ")
    return Finding("missing", what, detail or str(error), fix if detail else "")


def _place(uri: str) -> Iterator[Finding]:
    from lungopacity.archive.inventory import list_archive

    try:
        list_archive(uri)  # as screening does; it looks for the first object at once
    except UserError as error:
        yield _refused("storage", error)
    else:
        yield Finding("ok", "storage", f"{uri} can be listed")


def _results(uri: str) -> Iterator[Finding]:
    from lungopacity.storage import open_store
    from lungopacity.storage.probe import check_conditions, check_writable

    try:
        check_writable(uri)
        check_conditions(uri)
        new = next(iter(open_store(uri).list()), None) is None
    except UserError as error:
        yield _refused("results", error)
    else:
        # An empty place may be a typo in the URI.
        detail = f"{uri} can be written to" + (", and is empty" if new else "")
        yield Finding("ok", "results", detail)
