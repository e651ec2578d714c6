"""Training by Ray Train beside the same loop without it: what does the framework cost?

The films are decoded once for all ways. Each way trains a few epochs in processes of its own.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lungopacity.benchmark.inputs import DEFAULT_NETWORK, scratch_place
from lungopacity.benchmark.place import NO_GPU, gpus_here
from lungopacity.errors import UserError
from lungopacity.models import NETWORK_NAMES, build_network, check_network, load_model
from lungopacity.models.networks import ENSEMBLE
from lungopacity.progress import Progress
from lungopacity.runtime import KEEP_FREED_MEMORY, capacity, ray_session, resolve_gpu
from lungopacity.training.fit import films_of, first_tensors, fit
from lungopacity.training.loop import Films, Worker, ddp_options, learn
from lungopacity.training.settings import TRAINING_PRECISIONS, TrainingSettings
from lungopacity.training.task import DEFAULT_CLASSES, training_task
from lungopacity.words import counted

log = logging.getLogger(__name__)

BARE = "bare loop"
_LOOK_S = 0.1


@dataclass(frozen=True)
class TrainSpeed:
    """One way to train."""

    way: str
    on: str = ""
    """How many cores or GPUs the way has."""
    epochs: int = 0
    """Epochs that were timed, without the first of each repeat. 0: the way has no figures."""
    images_per_s: float = 0.0
    """Training films in an epoch over its seconds from report to report, with validation and
    checkpoint. Median."""
    spread: float = 0.0
    """Half the range between the quartiles, as a share of the median."""
    step_images_per_s: float = 0.0
    """The same for the training steps alone. Median."""
    note: str = ""
    """Why the way did not run, or not as often as it should have."""


@dataclass(frozen=True)
class _Way:
    name: str
    on: str = ""
    settings: TrainingSettings | None = None
    is_bare: bool = False
    note: str = ""


def train_speeds(
    images: Sequence[str],
    labels: str,
    *,
    model: str = DEFAULT_NETWORK,
    image_size: int | None = None,
    workers: Sequence[int] | None = None,
    precisions: Sequence[str] = ("auto",),
    epochs: int = 4,
    repeats: int = 2,
    use_gpu: bool | None = None,
    output: str | None = None,
) -> list[TrainSpeed]:
    """Train without Ray and with each number of workers, in turns.

    images, labels, image_size: as for `train`. `model`: the name of a network, or the URI of a
    model folder, whose network is trained anew. `workers`: None is 1, and 2 if the cluster is large
    enough; numbers that do not fit are left out with a note. `precisions`: of the training
    settings, each of which is measured. `use_gpu`: None uses what there is. `output`: URI of a
    place for checkpoints, which are removed again; needed if the Ray cluster has several nodes.
    Raises `UserError`.
    """
    if epochs < 2 or repeats < 1 or min(workers or [1]) < 1:
        raise UserError("--epochs must be at least 2, --repeats and --workers at least 1")
    for precision in precisions:
        if precision not in TRAINING_PRECISIONS:
            raise UserError(
                f"--precision: '{precision}' is none of {', '.join(TRAINING_PRECISIONS)}"
            )
    name, words = _network_of(model)
    task = training_task(
        images,
        labels,
        model=name,
        classes=DEFAULT_CLASSES,
        positive_class=None,
        image_size=image_size,
        options={"epochs": epochs},
        words=words,
        accept=(),
        reject_quality=None,
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    with ray_session():
        ways = _ways(
            replace(task.settings, use_gpu=resolve_gpu(use_gpu)), workers, precisions, output
        )
        notes = {way.name: way.note for way in ways}
        data = task.load()
        films = films_of(data)
        able = [way for way in ways if not way.note]
        with Progress("Training", total=repeats * len(able), unit="runs") as progress:
            for _ in range(repeats):
                for way in able:
                    if not notes[way.name]:
                        try:
                            history = _history(way, data, films, output)[1:]
                            rows.setdefault(way.name, []).extend(history)
                            speed = _speed(way, history, len(films.train), "")
                            # Logged at once, because a run that is cut short prints no table.
                            log.info("%s: %.1f images/s", way.name, speed.images_per_s)
                        except UserError as error:
                            notes[way.name] = f"failed: {error}"
                    progress.advance(1)
    return [
        _speed(way, rows[way.name], len(films.train), notes[way.name])
        if way.name in rows
        else TrainSpeed(way.name, way.on, note=notes[way.name])
        for way in ways
    ]


def _network_of(model: str) -> tuple[str, Mapping[str, str]]:
    """The network's name, and its settings as words."""
    if model in NETWORK_NAMES or not (os.sep in model or Path(model).exists()):
        check_network(model)
        return model, {}
    spec = load_model(model).spec
    if spec.architecture == ENSEMBLE:
        raise UserError(f"{model}: an ensemble is not trained as one; give one of its members")
    settings = {f"model_settings.{name}": of for name, of in spec.architecture_settings.items()}
    settings |= {f"preprocessing.{name}": of for name, of in asdict(spec.preprocessing).items()}
    return spec.architecture, {name: json.dumps(value) for name, value in settings.items()}


def _ways(
    settings: TrainingSettings,
    workers: Sequence[int] | None,
    precisions: Sequence[str],
    output: str | None,
) -> list[_Way]:
    """The ways to train, checked before anything is trained. Raises `UserError`."""
    import ray

    kind = "GPU" if settings.use_gpu else "CPU"
    there = int(capacity()[kind])
    if there < 1:
        raise UserError(f"the Ray cluster has no {kind}; give --no-gpu, or a larger cluster")
    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and output is None:
        raise UserError(
            f"the Ray cluster has {nodes} nodes; say with --output URI where all of them can write"
        )
    cores = counted(len(os.sched_getaffinity(0)), "core")
    ways = []
    for precision in precisions:
        of = f", {precision}" if len(precisions) > 1 else ""
        chosen = replace(settings, precision=precision)
        missing = settings.use_gpu and not gpus_here()
        ways.append(
            _Way(
                f"{BARE}{of}",
                "1 GPU" if settings.use_gpu else cores,
                replace(chosen, workers=1, max_workers=0),
                is_bare=True,
                note=f"this machine has no GPU: {NO_GPU}" if missing else "",
            )
        )
        for number in workers or sorted({1, min(2, there)}):
            name = f"Ray Train, {number}{of}"
            on = counted(number, "GPU") if settings.use_gpu else cores
            if nodes > 1:
                on = f"{counted(number, kind)} of {nodes} nodes"
            if number > there:
                ways.append(_Way(name, note=f"needs {number} {kind}s, there are {there}"))
                continue
            try:
                shared = replace(chosen, workers=number, max_workers=0)
            except ValueError as error:
                ways.append(_Way(name, note=str(error)))
                continue
            if number > 1 and nodes == 1 and not missing:
                # Shows which part of the cost of several workers is torch's, not Ray's.
                ways.append(_Way(f"{BARE}, {number}{of}", on, shared, is_bare=True))
            ways.append(_Way(name, on, shared))
    return ways


def _history(way: _Way, data: Any, films: Films, output: str | None) -> list[dict[str, Any]]:
    """A row for each epoch. Raises `UserError`."""
    assert way.settings is not None
    if way.is_bare:
        return _bare(films, way.settings)
    with scratch_place(output) as place:
        history: list[dict[str, Any]] = fit(data, way.settings, f"{place}/model").history
    return history


def table(speeds: Sequence[TrainSpeed]) -> str:
    """A line for each way; ratios are to the first bare loop. Notes stand below."""
    bare = next((speed for speed in speeds if speed.way.startswith(BARE) and speed.epochs), None)
    width = 2 + max(len(speed.way) for speed in speeds)
    form = f"{{:<{width}}}{{:>8}}{{:>10}}{{:>8}}{{:>8}}{{:>9}}  {{}}"
    lines = [form.format("way", "epochs", "images/s", "spread", "/ bare", "steps", "on")]
    lines += [
        form.format(
            speed.way,
            speed.epochs,
            f"{speed.images_per_s:.1f}",
            f"{speed.spread:.0%}",
            f"{speed.images_per_s / bare.images_per_s:.2f}" if bare else "",
            f"{speed.step_images_per_s:.1f}",
            speed.on,
        )
        for speed in speeds
        if speed.epochs
    ]
    lines += [f"{speed.way:<{width}}{speed.note}" for speed in speeds if speed.note]
    return "\n".join(lines)


def _speed(way: _Way, rows: list[dict[str, Any]], images: int, note: str) -> TrainSpeed:
    rates = sorted(images / row["seconds"] for row in rows)
    median = statistics.median(rates)
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (median,) * 3
    return TrainSpeed(
        way=way.name,
        on=way.on,
        epochs=len(rows),
        images_per_s=median,
        spread=(high - low) / 2 / median,
        step_images_per_s=statistics.median(row["images_per_s"] for row in rows),
        note=note,
    )


def _bare(films: Films, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The history of the loop, in processes of its own, one for each worker."""
    network = build_network(settings.model, films.classes, settings.model_settings)
    given_first = first_tensors(network, settings)
    first = None if given_first is None else dict(given_first.tensors)
    with tempfile.TemporaryDirectory(prefix="lungopacity-") as folder:
        (Path(folder) / "given").write_bytes(pickle.dumps((films, settings, first)))
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "lungopacity.benchmark.train", folder, str(rank)],
                env=os.environ | ({} if settings.use_gpu else KEEP_FREED_MEMORY),
                stdin=subprocess.PIPE,
            )
            for rank in range(settings.workers)
        ]
        try:
            codes: list[int | None] = [None]
            while None in codes:
                time.sleep(_LOOK_S)
                codes = [worker.poll() for worker in workers]
                # The others would wait for the one that is gone.
                if failed := [code for code in codes if code]:
                    raise UserError(
                        f"the loop without Ray ended with exit code {failed[0]}; its error is above"
                    )
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()  # and close its pipe
        history: list[dict[str, Any]] = pickle.loads((Path(folder) / "told").read_bytes())
    return history


def _end_with_parent() -> None:
    """End this process when the one that started it ends, even if that is killed: the operating
    system then closes the pipe that is this one's standard input."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _WithoutRay(Worker):
    """One of several processes, which found one another through a file."""

    def together(self, network: torch.nn.Module) -> torch.nn.Module:
        if self.workers == 1:
            return network
        on = None if self.device.type == "cpu" else [self.device]
        return torch.nn.parallel.DistributedDataParallel(network, device_ids=on, **ddp_options())


def _learn_without_ray(folder: Path, rank: int) -> None:
    films, settings, first = pickle.loads((folder / "given").read_bytes())
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.workers))
    device = torch.device("cpu")
    if settings.use_gpu:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if settings.workers > 1:
        torch.distributed.init_process_group(
            "nccl" if settings.use_gpu else "gloo",
            init_method=f"file://{folder}/met",
            rank=rank,
            world_size=settings.workers,
        )
    history: list[dict[str, Any]] = []

    def report(row: dict[str, Any], _: torch.Tensor, save: Any) -> None:
        if rank == 0:
            with tempfile.TemporaryDirectory() as checkpoint:
                save(checkpoint)
        history.append(row)

    learn(_WithoutRay(settings, films, rank, settings.workers, device), first, None, report)
    if rank == 0:
        (folder / "told").write_bytes(pickle.dumps(history))
    if settings.workers > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _end_with_parent()
    _learn_without_ray(Path(sys.argv[1]), int(sys.argv[2]))
