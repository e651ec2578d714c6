"""Training by Ray Train beside the same loop without it: what does the framework cost?

The films are decoded once, for all. Each way trains a few epochs in processes of its own.
"""

from __future__ import annotations

import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lungopacity.errors import UserError
from lungopacity.models import build_network
from lungopacity.progress import Progress
from lungopacity.runtime import KEEP_FREED_MEMORY, ray_session, resolve_gpu
from lungopacity.training.fit import films_of, first_tensors, fit
from lungopacity.training.loop import Films, Worker, learn
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.task import DEFAULT_CLASSES, training_task

BARE = "bare loop"


@dataclass(frozen=True)
class TrainSpeed:
    """One way to train."""

    way: str
    epochs: int
    """That were timed; the first of each repeat is not."""
    images_per_s: float
    """Training films an epoch, over its seconds from report to report: validation and checkpoint
    included. Median."""
    spread: float
    """Half the range between the quartiles, as a share of the median."""
    step_images_per_s: float
    """The same of the steps alone. Median."""


def train_speeds(
    images: Sequence[str],
    labels: str,
    *,
    model: str = "classical-cnn",
    image_size: int | None = None,
    workers: Sequence[int] = (1, 2),
    epochs: int = 4,
    repeats: int = 2,
) -> list[TrainSpeed]:
    """Train without Ray and with so many workers, in turns.

    images, labels, model, image_size: as of `train`. Raises `UserError`.
    """
    if epochs < 2 or repeats < 1 or min(workers, default=0) < 1:
        raise UserError("--epochs must be at least 2, --repeats and --workers at least 1")
    task = training_task(
        images,
        labels,
        model=model,
        classes=DEFAULT_CLASSES,
        positive_class=None,
        image_size=image_size,
        options={"epochs": epochs},
        words={},
        accept=(),
        reject_quality=None,
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    with ray_session():
        settings = replace(task.settings, use_gpu=resolve_gpu(None))
        data = task.load()
        films = films_of(data)
        with Progress("Training", total=repeats * (1 + len(workers)), unit="runs") as progress:
            for _ in range(repeats):
                rows.setdefault(BARE, []).extend(_bare(films, settings)[1:])
                progress.advance(1)
                for number in workers:
                    with tempfile.TemporaryDirectory(prefix="lungopacity-") as folder:
                        chosen = replace(settings, workers=number)
                        history = fit(data, chosen, f"{folder}/model").history
                    rows.setdefault(f"Ray Train, {number}", []).extend(history[1:])
                    progress.advance(1)
    return [_speed(way, found, len(films.train)) for way, found in rows.items()]


def table(speeds: Sequence[TrainSpeed]) -> str:
    """A line for each way."""
    bare = speeds[0]
    lines = [f"{'way':<16}{'epochs':>8}{'images/s':>10}{'spread':>8}{'/ bare':>8}{'steps':>9}"]
    lines += [
        f"{speed.way:<16}{speed.epochs:>8}{speed.images_per_s:>10.1f}{speed.spread:>8.0%}"
        f"{speed.images_per_s / bare.images_per_s:>8.2f}{speed.step_images_per_s:>9.1f}"
        for speed in speeds
    ]
    return "\n".join(lines)


def _speed(way: str, rows: list[dict[str, Any]], images: int) -> TrainSpeed:
    rates = sorted(images / row["seconds"] for row in rows)
    median = statistics.median(rates)
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (median,) * 3
    return TrainSpeed(
        way=way,
        epochs=len(rows),
        images_per_s=median,
        spread=(high - low) / 2 / median,
        step_images_per_s=statistics.median(row["images_per_s"] for row in rows),
    )


def _bare(films: Films, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The history of the loop in a process of its own."""
    network = build_network(settings.model, films.classes, settings.model_settings)
    first, _ = first_tensors(network, settings)
    with tempfile.TemporaryDirectory(prefix="lungopacity-") as name:
        given, told = Path(name) / "given", Path(name) / "told"
        given.write_bytes(pickle.dumps((films, settings, first)))
        done = subprocess.run(
            [sys.executable, "-m", "lungopacity.benchmark.train", str(given), str(told)],
            env=os.environ | ({} if settings.use_gpu else KEEP_FREED_MEMORY),
            check=False,
        )
        if done.returncode:
            raise UserError(f"the loop without Ray ended with {done.returncode}; see above")
        history: list[dict[str, Any]] = pickle.loads(told.read_bytes())
    return history


def _learn_alone(given: str, told: str) -> None:
    import torch

    films, settings, first = pickle.loads(Path(given).read_bytes())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if settings.use_gpu else "cpu")
    history: list[dict[str, Any]] = []

    def report(row: dict[str, Any], _: torch.Tensor, save: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
        history.append(row)

    learn(Worker(settings, films, 0, 1, device), first, None, report)
    Path(told).write_bytes(pickle.dumps(history))


if __name__ == "__main__":
    _learn_alone(*sys.argv[1:])
