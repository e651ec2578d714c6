"""How many cores keep one GPU fed, format by format, and what a million images cost.

This counts decoding and the forward pass alone, each at its measured best. Fetching, shrinking and
what lies between them need more cores; see docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lungopacity.benchmark.decode import DecodeSpeed
from lungopacity.benchmark.forward import ForwardSpeed


@dataclass(frozen=True)
class Feeding:
    """One format, and one precision of the forward pass."""

    format: str
    precision: str
    gpu_images_per_s: float
    """Rate of the forward pass, at its best batch size."""
    cores: float
    """Cores that decode as many images a second."""
    dollars: float
    """Cost of decoding and scoring a million images."""


def feeding(
    decoded: Sequence[DecodeSpeed],
    scored: Sequence[ForwardSpeed],
    core_hour: float,
    gpu_hour: float,
) -> list[Feeding]:
    """A row for each format that we decode and each precision. `scored`: speeds of one model on a
    GPU. `core_hour`, `gpu_hour`: prices in dollars."""
    best: dict[str, float] = {}
    for forward in scored:
        best[forward.precision] = max(best.get(forward.precision, 0.0), forward.images_per_s or 0.0)
    found = []
    for speed in decoded:
        if speed.way != "lungopacity":
            continue
        for precision, gpu_per_s in best.items():
            if gpu_per_s:
                cores = gpu_per_s / speed.images_per_s
                hours = 1e6 / gpu_per_s / 3600
                dollars = hours * (gpu_hour + cores * core_hour)
                found.append(Feeding(speed.format, precision, gpu_per_s, cores, dollars))
    return found


def table(rows: Sequence[Feeding]) -> str:
    """A line for each."""
    form = "{:<24}{:<10}{:>15}{:>13}{:>14}"
    titles = ("format", "precision", "GPU images/s", "cores a GPU", "$ a million")
    lines = [form.format(*titles)]
    for row in rows:
        rates = f"{row.gpu_images_per_s:.1f}", f"{row.cores:.1f}", f"{row.dollars:.2f}"
        lines.append(form.format(row.format, row.precision, *rates))
    return "\n".join(lines)
