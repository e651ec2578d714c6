"""The figures of `benchmark screen` for each way, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lungopacity.benchmark import bare_loop


@dataclass(frozen=True)
class ScreenSpeed:
    """One way to score all images."""

    way: str
    on: str = ""
    """How many cores and GPUs the way has."""
    images: int = 0
    """How many got a score: a way may lose some. 0: the way has no figures."""
    images_per_s: float = 0.0
    """Of the whole job, from the start of its process to its end; median over the repeats."""
    spread: float = 0.0
    """Half the range of `images_per_s` over the repeats, as a share of the median."""
    steady_per_s: float | None = None
    """Without the first and the last tenth of the images; median. None if there were too few."""
    steady_spread: float | None = None
    """As `spread`, for `steady_per_s`."""
    cpu_busy: float | None = None
    """Share of the machine's CPU time, including a storage server on the same machine. None if the
    way runs on several machines."""
    gpu_busy: float | None = None
    """Share of the time in which a kernel ran; None if it cannot be measured."""
    memory_mib: float | None = None
    """Largest private memory of all the way's processes together; None if it joined a running Ray
    cluster, whose processes are not its own."""
    store_mib: float | None = None
    """Largest growth of shared memory, which holds Ray's object store; None as `memory_mib`."""
    bytes_moved: float | None = None
    """Bytes through Ray's object store for each image; None without Ray."""
    differs: float | None = None
    """Largest difference of a film's probability from the bare loop's."""
    note: str = ""
    """Why the way did not run, or not as often as it should have."""


def table(speeds: Sequence[ScreenSpeed]) -> str:
    """A line for each way; ratios are to the bare loop, if that ran on as many cores and GPUs.
    Notes stand below."""
    bare = next(
        (speed for speed in speeds if speed.way == bare_loop.WHOLE and speed.images),
        ScreenSpeed(""),
    )
    titles = (
        "way", "images", "images/s", "spread", "/ bare", "steady", "spread", "/ bare", "CPU", "GPU",
        "MiB", "store MiB", "bytes moved", "differs",
    )  # fmt: skip
    form = "{:<16}{:>8}{:>10}{:>8}{:>8}{:>9}{:>8}{:>8}{:>6}{:>6}{:>8}{:>11}{:>13}{:>9}"
    lines = [f"{form.format(*titles)}  on"]
    for speed in speeds:
        if not speed.images:
            continue
        alike = speed.on == bare.on
        cells = (
            f"{speed.images_per_s:.1f}",
            f"{speed.spread:.0%}",
            _ratio(speed.images_per_s, bare.images_per_s if alike else None),
            _cell(speed.steady_per_s, ".1f"),
            _cell(speed.steady_spread, ".0%"),
            _ratio(speed.steady_per_s, bare.steady_per_s if alike else None),
            _cell(speed.cpu_busy, ".0%"),
            _cell(speed.gpu_busy, ".0%"),
            _cell(speed.memory_mib, ".0f"),
            _cell(speed.store_mib, ".0f"),
            _cell(speed.bytes_moved, ".0f"),
            _cell(speed.differs, ".1g"),
        )
        lines.append(f"{form.format(speed.way, speed.images, *cells)}  {speed.on}")
    lines += [f"{speed.way:<16}{speed.note}" for speed in speeds if speed.note]
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(rate: float | None, bare: float | None) -> str:
    return f"{rate / bare:.2f}" if rate is not None and bare else ""
