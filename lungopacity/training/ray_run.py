"""Runs Ray Train: workers, restarts, checkpoints, and the errors a run can end with."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from lungopacity.errors import UserError, last_line, of_other_code
from lungopacity.runtime import code_digest, lean_training, worker_environment
from lungopacity.storage import join_uri, open_store
from lungopacity.training.checkpoint import DOES_NOT_PASS
from lungopacity.training.loop import Films, train_loop
from lungopacity.training.relay import EndAtOnce, relayed_rows
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.torch_backend import OnNodesInterface

log = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Restarts of a run's workers before the run is given up."""
MAX_ELASTIC_RESTARTS = 30
"""The same where the number of workers may change: such runs expect nodes to come and go."""
RESIZE_EVERY_S = 60.0
"""How often such a run checks for room for more workers. If there is, it restarts the epoch."""
_PAUSE_S = 5.0
"""After an error of storage."""


def run_ray_train(
    films: Films,
    first: dict[str, torch.Tensor] | None,
    settings: TrainingSettings,
    work_uri: str,
    run: str,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> ray.train.Result:
    """Trains, or resumes where a crashed run of that name stopped. Checkpoints are kept in
    `work_uri`/`run`. `first`: as in `learn`; on_epoch: as in `fit`. Raises `UserError`."""
    filesystem, root = open_store(work_uri).arrow_filesystem()
    elastic = settings.max_workers > 0
    restarts = MAX_ELASTIC_RESTARTS if elastic else MAX_RESTARTS
    with relayed_rows(on_epoch) as callbacks:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={
                "settings": settings,
                "code": code_digest(),
                "films": ray.put(films),
                "first": None if first is None else ray.put(first),
                # Absolute, because a worker may run in another folder.
                "place": open_store(join_uri(work_uri, run)).uri,
                "filesystem": filesystem,
            },
            torch_config=OnNodesInterface(),
            scaling_config=ScalingConfig(
                num_workers=(settings.workers, settings.max_workers)
                if elastic
                else settings.workers,
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": 1, **({"GPU": 1} if settings.use_gpu else {})},
            ),
            run_config=RunConfig(
                name=run,
                storage_path=root,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=restarts),
                # Ray also keeps the latest checkpoint besides the best.
                checkpoint_config=CheckpointConfig(
                    num_to_keep=1,
                    checkpoint_score_attribute="validation_loss",
                    checkpoint_score_order="min",
                ),
                callbacks=[*callbacks, EndAtOnce()],
                # Set by the worker's environment, because a running process cannot change how its
                # memory is allocated.
                worker_runtime_env=worker_environment(settings.use_gpu),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            return _fitted(trainer)
        except ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise error.controller_failure from error
            other_code = of_other_code(error.controller_failure)
            if other_code is not None:
                raise UserError(other_code) from error
            raise UserError(
                f"training was given up: {last_line(error.controller_failure, with_type=True)}; "
                "its finished epochs are kept, and the same command resumes from there"
            ) from error
        except TrainingFailedError as error:
            raise UserError(
                f"training was given up after {restarts} restarts: {_cause(error)}; its "
                "finished epochs are kept, and the same command resumes from there"
            ) from error
        except ActorDiedError as error:
            # Ray overwrites its record of the checkpoints in place: a crash can leave half of it.
            # Nor does Ray read the record of another version of Ray.
            _, of_the_record, why = last_line(error).partition(
                "CheckpointManagerInitializationError: "
            )
            if not of_the_record:
                raise
            raise UserError(
                f"Ray's record of the checkpoints in {join_uri(work_uri, run)} cannot be read "
                f"({why}); remove that folder, and the same command starts from epoch 1"
            ) from error


def _fitted(trainer: TorchTrainer) -> ray.train.Result:
    """Trains, again after each error of storage that may pass: Ray does so if a worker meets it,
    but not if its record of the checkpoints cannot be written. Arrow itself tries for 2 s in S3 and
    once on disk, and its file systems lose any other setting when they are pickled."""
    for left in reversed(range(MAX_RESTARTS + 1)):
        try:
            with lean_training(), _own_interrupts(trainer):
                return trainer.fit()
        except ControllerError as error:
            failure = error.controller_failure
            if not left or not isinstance(failure, OSError) or failure.errno in DOES_NOT_PASS:
                raise
            why = last_line(failure, with_type=True)
            log.warning("%s; training starts again after its last finished epoch", why)
            time.sleep(_PAUSE_S)
    raise AssertionError


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None)
    # The last line only: Ray quotes whole tracebacks.
    return last_line(next(iter(failures.values())) if failures else error, with_type=True)


@contextlib.contextmanager
def _own_interrupts(trainer: TorchTrainer) -> Iterator[None]:
    """Keeps our own handling of Ctrl-C in the block. Ray Train would replace it for good, by a
    handler that ends the process with code 1 and no message."""
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for controller in controllers:
            # Otherwise a Ray that outlives this call would go on training. The controller's death
            # ends its workers.
            ray.kill(controller)
        raise
