"""Processes that are run to their end, and what they and all that they start use meanwhile."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean

import psutil

log = logging.getLogger(__name__)

_SAMPLE_S = 1.0
_GRACE_S = 5.0
"""Time that a process has to end by itself before it is killed."""


class FailedError(Exception):
    """A process did not do what it was started for; the message says why."""


@dataclass
class Taken:
    """Seconds, CPU, GPU and memory that a process and all that it starts used."""

    seconds: float = 0.0
    busy: float = 0.0
    """Share of the machine's CPU time."""
    memory_mib: float = 0.0
    """Largest private memory."""
    store_mib: float = 0.0
    """Largest growth of shared memory."""
    gpu: list[float] = field(default_factory=list)
    """Shares of the time in which a kernel ran, second by second; empty if they are not known."""


def run_watched(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    limit_s: float,
    log: Path,
    good: Sequence[int] = (0,),
) -> tuple[str, Taken]:
    """Run Python with these arguments, and return what it printed and what it used.

    `log`: where its standard error goes. `good`: its exit codes if it succeeds. Raises
    `FailedError`. If the wait is interrupted, the process and all that it has started are ended.
    """
    gpu_busy()  # imports torch, whose import must not count
    with log.open("wb") as errors:
        process = psutil.Popen(
            [sys.executable, *arguments],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            with _watched(process) as taken:
                printed, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            said = last_words(log)
            raise FailedError(
                f"did not end in {limit_s:g} s" + (f" (it said: {said})" if said else "")
            ) from error
        finally:
            if process.poll() is None:
                _end(process)
    if process.returncode not in good:
        raise FailedError(last_words(log) or f"ended with exit code {process.returncode}")
    return printed.decode(errors="replace"), taken


def last_words(log: Path) -> str:
    """The last line of a command's standard error, up to 100 characters; empty if it has none."""
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:100]


def _end(process: psutil.Popen) -> None:
    family = _family(process)
    process.terminate()
    with suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    family = list({*family, *_family(process)})
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=1)


@contextmanager
def _watched(process: psutil.Process) -> Iterator[Taken]:
    """Watch the process for the block."""
    taken, ended = Taken(), threading.Event()
    shared, cpu, began = _shared_bytes(), psutil.cpu_times(), time.monotonic()

    def look() -> None:
        while not ended.wait(_SAMPLE_S):
            memory = sum(map(_private_bytes, _family(process))) / 2**20
            taken.memory_mib = max(taken.memory_mib, memory)
            taken.store_mib = max(taken.store_mib, (_shared_bytes() - shared) / 2**20)
            busy = gpu_busy()
            if busy is not None:
                taken.gpu.append(busy)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        taken.seconds = time.monotonic() - began
        spent = [now - then for now, then in zip(psutil.cpu_times(), cpu, strict=True)]
        of = dict(zip(cpu._fields, spent, strict=True))
        taken.busy = 1 - (of["idle"] + of.get("iowait", 0.0)) / max(sum(spent), 1e-9)
        ended.set()
        thread.join()


def gpu_busy() -> float | None:
    """Share of the last moment in which a kernel ran, averaged over this machine's GPUs. None if
    there are none, or if it is not known: without nvidia-ml-py, or for a part of a GPU (MIG)."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        gpus = range(torch.cuda.device_count())
        return mean(torch.cuda.utilization(gpu) for gpu in gpus) / 100
    except ModuleNotFoundError:
        _warn_of_missing_nvml()
        return None
    except Exception:
        # Among others NVML's own errors, which cannot be named if it is not installed.
        return None


@cache
def _warn_of_missing_nvml() -> None:
    """Warns only once."""
    log.warning("cannot measure how busy the GPUs are; pip install nvidia-ml-py")


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _private_bytes(process: psutil.Process) -> int:
    # smaps would be exact, but takes the kernel so long that it slows down what is measured.
    try:
        used = process.memory_info()
    except psutil.Error:
        return 0
    return int(used.rss - getattr(used, "shared", 0))


def _shared_bytes() -> int:
    return shutil.disk_usage("/dev/shm").used if Path("/dev/shm").is_dir() else 0
