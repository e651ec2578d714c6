"""What a trained network is given besides its weights, found in Ray tasks: the driver of a
submitted job may have no GPU, and few cores."""

from __future__ import annotations

import ray

from lungopacity.models import TrainedModel
from lungopacity.models.compiled import compiled_if_better
from lungopacity.runtime import worker_environment
from lungopacity.training.loop import Films
from lungopacity.training.ray_run import last_line


def distribution_of(model: TrainedModel, films: ray.ObjectRef, use_gpu: bool) -> bytes:
    """Where the training films lie in the kept network's features."""

    def run(kept: TrainedModel, films: Films) -> bytes:
        import os

        from lungopacity.models.distribution import TrainingDistribution
        from lungopacity.models.scorer import Scorer

        scorer = Scorer(kept, use_gpu=use_gpu, threads=len(os.sched_getaffinity(0)))
        train_NF, validation_NF = (
            scorer.scores(films.pixels_NHW[rows]).features_NF
            for rows in (films.train, films.validation)
        )
        return TrainingDistribution.of(train_NF, validation_NF).to_bytes()

    found: bytes = ray.get(
        ray.remote(run)
        .options(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=2)
        .remote(model, films)
    )
    return found


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
        return None, f"CPUs run the network in torch: compiling it failed ({last_line(error)})"
    return found
