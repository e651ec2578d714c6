"""The forward pass on one core of a CPU, network by network: compiled, and in torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from lungopacity.benchmark.inputs import fresh_model
from lungopacity.errors import UserError
from lungopacity.models import check_network
from lungopacity.models.compiled import CompileError, compile_network, to_bytes
from lungopacity.progress import Progress
from lungopacity.runtime import KEEP_FREED_MEMORY, alone, environment


@dataclass(frozen=True)
class ScoreSpeed:
    """One network at the size of its recipe, with fresh weights."""

    network: str
    image_size: int
    """Side of its input, pixels."""
    torch_ms: float
    """Milliseconds a film, in batches; median over the repeats."""
    compiled_ms: float | None
    """The same for the compiled network; None if ncnn cannot run it."""
    differs: float | None
    """The largest difference of a probability between the two."""


def score_speeds(networks: Sequence[str], films: int = 64, repeats: int = 5) -> list[ScoreSpeed]:
    """Score the same films of noise in turns, on one thread, in a process for each network.

    `films`: how many, in one batch. Raises `UserError` for an unknown network.
    """
    if films < 1 or repeats < 1:
        raise UserError("--count and --repeats must be at least 1")
    for name in networks:
        check_network(name)
    speeds = []
    with Progress("Scoring", total=len(networks), unit="networks") as progress:
        for name in networks:
            # As in screening's workers, what torch frees is kept for the next film.
            with environment(KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": "1"}):
                speeds.append(alone(_measured, name, films, repeats))
            progress.advance(1)
    return speeds


def _measured(name: str, films: int, repeats: int) -> ScoreSpeed:
    from lungopacity.models.scorer import Scorer

    model = fresh_model(name)
    size = model.spec.preprocessing.image_size
    pixels_NHW = np.random.default_rng(0).integers(0, 256, (films, size, size), dtype=np.uint8)
    ways = [Scorer(model, threads=1)]
    try:
        compiled = replace(model, compiled=to_bytes([compile_network(model)]))
        ways.append(Scorer(compiled, threads=1))
    except CompileError:
        pass
    seconds: list[list[float]] = [[] for _ in ways]
    # Once untimed, to allocate memory and choose kernels.
    p = [scorer.probabilities(scorer.logits(pixels_NHW, films)) for scorer in ways]
    for _ in range(repeats):
        for scorer, taken in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            scorer.logits(pixels_NHW, films)
            taken.append(time.perf_counter() - began)
    torch_ms, *compiled_ms = (1000 * median(taken) / films for taken in seconds)
    return ScoreSpeed(
        name,
        size,
        torch_ms,
        compiled_ms[0] if compiled_ms else None,
        float(np.abs(p[0] - p[1]).max()) if compiled_ms else None,
    )


def table(speeds: Sequence[ScoreSpeed]) -> str:
    """A line for each network."""
    form = "{:<26}{:>6}{:>12}{:>14}{:>8}{:>10}"
    lines = [form.format("network", "px", "torch, ms", "compiled, ms", "ratio", "differs")]
    for speed in speeds:
        compiled = ("–", "", "")
        if speed.compiled_ms is not None:
            ratio = speed.torch_ms / speed.compiled_ms
            compiled = (f"{speed.compiled_ms:.2f}", f"{ratio:.2f}", f"{speed.differs:.0e}")
        lines.append(
            form.format(speed.network, speed.image_size, f"{speed.torch_ms:.2f}", *compiled)
        )
    return "\n".join(lines)
