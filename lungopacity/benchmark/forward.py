"""Images a second of the forward pass alone, by batch size and precision, on a GPU or on all cores.

The films are already in the device's memory, so reading and copying are not measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from lungopacity.benchmark.inputs import fresh_model
from lungopacity.errors import UserError
from lungopacity.models import TrainedModel, check_network, load_model
from lungopacity.models.scorer import PRECISIONS, Scorer
from lungopacity.progress import Progress
from lungopacity.runtime import KEEP_FREED_MEMORY, alone, environment

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 8, 32, 64, 128, 256)
_LEAST_SECONDS = 0.2
"""A repeat runs batches until this time has passed."""


@dataclass(frozen=True)
class ForwardSpeed:
    """One network, precision and batch size."""

    network: str
    """Its name, or the URI of a model folder."""
    device: str
    """The GPU's name, or the number of CPU threads."""
    precision: str
    """bfloat16: by autocast."""
    batch_size: int
    images_per_s: float | None
    """Median over the repeats; None if the device does not have enough memory."""


def forward_speeds(
    networks: Sequence[str],
    *,
    use_gpu: bool,
    precisions: Sequence[str] = PRECISIONS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = 5,
) -> list[ForwardSpeed]:
    """Measure each network in a process of its own. Raises `UserError` for a wrong argument."""
    for name in networks:
        check_network(name)
    wrong = sorted(set(precisions) - set(PRECISIONS))
    if wrong:
        raise UserError(f"--precision: '{wrong[0]}' is none of {', '.join(PRECISIONS)}")
    if min(batch_sizes, default=0) < 1 or repeats < 1:
        raise UserError("--batch-sizes and --repeats must be at least 1")
    speeds: list[ForwardSpeed] = []
    with Progress("Forward passes", total=len(networks), unit="networks") as progress:
        for name in networks:
            with environment({} if use_gpu else KEEP_FREED_MEMORY):
                found = alone(
                    _measured, fresh_model, name, use_gpu, precisions, sorted(batch_sizes), repeats
                )
            speeds += found
            best = max(speed.images_per_s or 0.0 for speed in found)
            # Logged at once, because a run that is cut short prints no table.
            log.info("%s: %.1f images/s at best", name, best)
            progress.advance(1)
    return speeds


def speeds_on_gpu(model: str, repeats: int = 5) -> list[ForwardSpeed]:
    """Measure the model folder at this URI in every precision and batch size. Raises `UserError`
    if it cannot be read."""
    return alone(_measured, load_model, model, True, PRECISIONS, BATCH_SIZES, repeats)


def _measured(
    model_of: Callable[[str], TrainedModel],
    name: str,
    use_gpu: bool,
    precisions: Sequence[str],
    batch_sizes: Sequence[int],
    repeats: int,
) -> list[ForwardSpeed]:
    import torch

    model = model_of(name)
    device = torch.device("cuda" if use_gpu else "cpu")
    size = model.spec.preprocessing.image_size
    films_NHW = torch.randint(0, 256, (max(batch_sizes), size, size), dtype=torch.uint8)

    def seconds_a_batch(scorer: Scorer, batch_NHW: torch.Tensor) -> float:
        began, batches = time.perf_counter(), 0
        while time.perf_counter() - began < _LEAST_SECONDS:
            scorer.forward(batch_NHW)
            batches += 1
            if use_gpu:
                torch.cuda.synchronize()
        return (time.perf_counter() - began) / batches

    speeds = []
    for precision in precisions:
        scorer = Scorer(model, use_gpu=use_gpu, precision=precision)
        on = torch.cuda.get_device_name() if use_gpu else f"{scorer.threads} CPU threads"
        for batch_size in batch_sizes:
            rate = None
            try:
                batch_NHW = films_NHW[:batch_size].to(device)
                seconds_a_batch(scorer, batch_NHW)  # untimed, because kernels are chosen here
                taken = [seconds_a_batch(scorer, batch_NHW) for _ in range(repeats)]
                rate = batch_size / median(taken)
            except torch.OutOfMemoryError:
                pass
            speeds.append(ForwardSpeed(name, on, precision, batch_size, rate))
    return speeds


def table(speeds: Sequence[ForwardSpeed]) -> str:
    """A line for each; a star marks the best of a network and precision."""
    form = "{:<26}{:<10}{:>7}{:>12} {:<2}{}"
    lines = [form.format("network", "precision", "batch", "images/s", "", "on")]
    best: dict[tuple[str, str], float] = {}
    for speed in speeds:
        key = speed.network, speed.precision
        best[key] = max(best.get(key, 0.0), speed.images_per_s or 0.0)
    for speed in speeds:
        rate = speed.images_per_s
        lines.append(
            form.format(
                speed.network,
                speed.precision,
                speed.batch_size,
                "no memory" if rate is None else f"{rate:.1f}",
                "*" if rate == best[speed.network, speed.precision] else "",
                speed.device,
            )
        )
    return "\n".join(lines)
