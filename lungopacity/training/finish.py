"""What a trained network needs besides its weights, computed in Ray tasks, because the driver of a
submitted job may have no GPU and few cores."""

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
from lungopacity.runtime import (
    check_same_code,
    code_digest,
    cpus_here,
    free_resources,
    leave_no_core,
    worker_environment,
)
from lungopacity.training.loop import Films

log = logging.getLogger(__name__)

_BATCH = 64
"""Films per forward pass, after which the progress is reported."""
_TURNED_FILMS = 512
"""Number of training films whose features are also computed on either side and upside down."""
_FEWEST_VALIDATION = 100
"""With this many films, the distance that 1 in 100 exceeds lies among theirs. With fewer, n, it is
close to that of the farthest, which another film like them exceeds with a probability of
1 / (n + 1) or somewhat more."""


def distribution_of(
    model: TrainedModel, films: Films, shared: ray.ObjectRef, use_gpu: bool
) -> bytes:
    """The file of the training films' distribution in the kept network's features. `shared`: the
    films in Ray's object store."""

    def run(kept: TrainedModel, films: Films) -> Iterator[int | bytes]:
        from lungopacity.models.distribution import TrainingDistribution
        from lungopacity.models.scorer import Scorer

        check_same_code(code)
        leave_no_core()
        scorer = Scorer(kept, use_gpu=use_gpu, threads=cpus_here())
        features: list[npt.NDArray[np.float32]] = []
        for rows, turns in _passes(films):
            parts = []
            for start in range(0, len(rows), _BATCH):
                pixels_BHW = films.pixels_NHW[rows[start : start + _BATCH]]
                for turn in turns:
                    turned_BHW = np.ascontiguousarray(np.rot90(pixels_BHW, turn, axes=(1, 2)))
                    parts.append(scorer.scores(turned_BHW, _BATCH).features_NF)
                    yield len(pixels_BHW)
            features.append(np.concatenate(parts))
        yield TrainingDistribution.of(*features).to_bytes()

    code = code_digest()
    warn_of_few_to_compare(len(films.validation))
    count = sum(len(rows) * len(turns) for rows, turns in _passes(films))
    task = ray.remote(run).options(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=2)
    title = "Finding where the training films lie"
    with Progress(title, total=count, waits_for=free_resources) as progress:
        for update in map(ray.get, task.remote(model, shared)):
            if isinstance(update, int):
                progress.advance(update)
            else:
                found: bytes = update
    return found


def warn_of_few_to_compare(validation: int) -> None:
    """Warns where validation films are too few to tell which distance 1 in 100 of them exceeds."""
    if validation < _FEWEST_VALIDATION:
        log.warning(
            "with only %d validation films, about 1 in %d films like them or more will be flagged "
            "out_of_distribution; for 1 in 100, give %d or more validation films",
            validation,
            validation,
            _FEWEST_VALIDATION,
        )


def _passes(films: Films) -> list[tuple[npt.NDArray[np.int64], tuple[int, ...]]]:
    """Indices of films and the quarter turns that they are scored with: all training films, all
    validation films, and some training films turned."""
    some = films.train[:: -(-len(films.train) // _TURNED_FILMS)]
    return [(films.train, (0,)), (films.validation, (0,)), (some, (1, 2, 3))]


def compiled_of(model: TrainedModel, films: ray.ObjectRef) -> tuple[bytes | None, str]:
    """See `compiled_if_better`. In a task of its own, because pnnx or ncnn may crash on an
    unfamiliar network."""

    def run(kept: TrainedModel, films: Films) -> tuple[bytes | None, str]:
        leave_no_core()
        return compiled_if_better(kept, films.pixels_NHW[films.validation])

    try:
        found: tuple[bytes | None, str] = ray.get(
            ray.remote(run)
            # torch is timed in the environment that it has in screening.
            .options(num_cpus=1, max_retries=0, runtime_env=worker_environment(False))
            .remote(model, films)
        )
    except ray.exceptions.RayError as error:
        why = last_line(error, with_type=True)
        return None, f"CPUs run the network in torch: compiling it failed ({why})"
    return found
