"""Where, when and with which versions figures were measured, without which none can be compared."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lungopacity.benchmark.place import gpus_here
from lungopacity.errors import NOTICE
from lungopacity.runtime import versions
from lungopacity.words import counted


@dataclass(frozen=True)
class Conditions:
    """Conditions on this machine. The figures themselves say what a Ray cluster had."""

    command: str
    measured_at: str
    """When the last figure was measured, in UTC."""
    cpu: str
    """Model of the CPU."""
    cores: int
    gpus: tuple[str, ...]
    """Names of the GPUs that torch can use."""
    versions: dict[str, str]
    compiled: bool = True
    """Whether installed packages are compiled to bytecode. If not, each process compiles what it
    imports, and takes three times as long to start."""
    notice: str = NOTICE

    @staticmethod
    def found(command: str) -> Conditions:
        """Call this when everything is measured, because it imports torch."""
        import torch

        installed = versions()
        with suppress(importlib.metadata.PackageNotFoundError):
            installed["daft"] = importlib.metadata.version("daft")
        return Conditions(
            command,
            datetime.now(UTC).isoformat(timespec="seconds"),
            _cpu(),
            len(os.sched_getaffinity(0)),
            tuple(torch.cuda.get_device_name(gpu) for gpu in range(gpus_here())),
            installed,
            _is_compiled("pandas"),
        )

    def heading(self) -> str:
        """The lines above a table."""
        machine = [self.cpu, counted(self.cores, "core"), *(self.gpus or ["no GPU"])]
        lines = [
            self.command,
            f"{self.measured_at}, {', '.join(machine)}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        ]
        if not self.compiled:
            lines.append(
                "packages are not compiled to bytecode here, so each process starts slowly; run "
                "`python -m compileall` on their folder first"
            )
        return "\n".join([*lines, self.notice])


def _is_compiled(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return True
    return Path(importlib.util.cache_from_source(spec.origin)).exists()


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()
