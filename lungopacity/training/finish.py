"""What a trained network is given besides its weights, found in Ray tasks: the driver of a
submitted job may have no GPU, and few cores."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import ray

from lungopacity.errors import last_line
from lungopacity.models import TrainedModel
from lungopacity.models.compiled import compiled_if_better
from lungopacity.progress import Progress
from lungopacity.runtime import worker_environment
from lungopacity.training.loop import Films

log = logging.getLogger(__name__)

_BATCH = 64
"""Films of one forward pass, after which the progress is told."""
_TURNED_FILMS = 512
"""So many training films are looked at lying on each side and standing on their heads, too."""
_FEWEST_VALIDATION = 100
"""The place of 1 in 100 lies among as many. Of n, fewer, the farthest stands for it, which another
film like them exceeds with a chance of 1 / (n + 1), or somewhat more."""


def distribution_of(
    model: TrainedModel, films: Films, shared: ray.ObjectRef, use_gpu: bool
) -> bytes:
    """Where the training films lie in the kept network's features. `shared`: the films, for tasks
    to get."""

    def run(kept: TrainedModel, films: Films) -> Iterator[int | bytes]:
        from lungopacity.models.distribution import TrainingDistribution
        from lungopacity.models.scorer import Scorer

        scorer = Scorer(kept, use_gpu=use_gpu)
        features: list[npt.NDArray[np.float32]] = []
        for rows, turns in _looks(films):
            parts = []
            for start in range(0, len(rows), _BATCH):
                pixels_BHW = films.pixels_NHW[rows[start : start + _BATCH]]
                for turn in turns:
                    turned_BHW = np.ascontiguousarray(np.rot90(pixels_BHW, turn, axes=(1, 2)))
                    parts.append(scorer.scores(turned_BHW, _BATCH).features_NF)
                    yield len(pixels_BHW)
            features.append(np.concatenate(parts))
        yield TrainingDistribution.of(*features).to_bytes()

    warn_of_few_to_compare(len(films.validation))
    count = sum(len(rows) * len(turns) for rows, turns in _looks(films))
    task = ray.remote(run).options(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=2)
    with Progress("Finding where the training films lie", total=count) as progress:
        for told in map(ray.get, task.remote(model, shared)):
            if isinstance(told, int):
                progress.advance(told)
            else:
                found: bytes = told
    return found


def warn_of_few_to_compare(validation: int) -> None:
    """Where so few validation films do not tell what 1 in 100 films like them exceeds."""
    if validation < _FEWEST_VALIDATION:
        log.warning(
            "%d validation films tell what is unlike the training films: with fewer than %d, 1 in "
            "%d films like them, or more, will be flagged out_of_distribution, and not 1 in 100",
            validation,
            _FEWEST_VALIDATION,
            validation,
        )


def _looks(films: Films) -> list[tuple[npt.NDArray[np.int64], tuple[int, ...]]]:
    """Films, and the quarter turns that they are looked at with: all training films, all validation
    films, and some of the training films turned."""
    some = films.train[:: -(-len(films.train) // _TURNED_FILMS)]
    return [(films.train, (0,)), (films.validation, (0,)), (some, (1, 2, 3))]


def compiled_of(model: TrainedModel, films: ray.ObjectRef) -> tuple[bytes | None, str]:
    """The network as CPUs run it best, or None, and what was found. In a task of its own: what ncnn
    makes of a network that it does not know well may end the process."""

    def run(kept: TrainedModel, films: Films) -> tuple[bytes | None, str]:
        return compiled_if_better(kept, films.pixels_NHW[films.validation])

    try:
        found: tuple[bytes | None, str] = ray.get(
            ray.remote(run)
            # Timed, torch must have what it has in screening.
            .options(num_cpus=1, max_retries=0, runtime_env=worker_environment(False))
            .remote(model, films)
        )
    except ray.exceptions.RayError as error:
        why = last_line(error, with_type=True)
        return None, f"CPUs run the network in torch: compiling it failed ({why})"
    return found
