"""A run of Ray Train: its workers, restarts and checkpoints, and its end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from lungopacity.errors import UserError, last_line
from lungopacity.runtime import lean_training, worker_environment
from lungopacity.storage import join_uri, open_store
from lungopacity.training.loop import Films, train_loop
from lungopacity.training.relay import EndAtOnce, relayed_rows
from lungopacity.training.settings import TrainingSettings

MAX_RESTARTS = 3
"""Of a run's workers, before the run is given up."""
MAX_ELASTIC_RESTARTS = 30
"""The same where their number may change: such runs are made for nodes that come and go."""
RESIZE_EVERY_S = 60.0
"""How often such a run looks for room for more workers; it then begins the epoch again."""


def run_ray_train(
    films: Films,
    first: dict[str, torch.Tensor] | None,
    settings: TrainingSettings,
    work_uri: str,
    run: str,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> ray.train.Result:
    """Train, or go on where a crashed run of that name stopped; its checkpoints lie in
    `work_uri`/`run`. `first`: as in `learn`; on_epoch: as in `fit`. Raises `UserError`."""
    filesystem, root = open_store(work_uri).arrow_filesystem()
    elastic = settings.max_workers > 0
    restarts = MAX_ELASTIC_RESTARTS if elastic else MAX_RESTARTS
    with relayed_rows(on_epoch) as callbacks:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={
                "settings": settings,
                "films": ray.put(films),
                "first": None if first is None else ray.put(first),
                "place": join_uri(work_uri, run),
                "filesystem": filesystem,
            },
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
                # Ray keeps the latest besides the best one.
                checkpoint_config=CheckpointConfig(
                    num_to_keep=1,
                    checkpoint_score_attribute="validation_loss",
                    checkpoint_score_order="min",
                ),
                callbacks=[*callbacks, EndAtOnce()],
                # Training runs in a thread: what it allocates with was chosen before it began.
                worker_runtime_env=worker_environment(settings.use_gpu),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            with lean_training(), _own_interrupts(trainer):
                return trainer.fit()
        except ControllerError as error:
            if isinstance(error.controller_failure, UserError):
                raise error.controller_failure from error
            raise UserError(
                f"training was given up: {last_line(error.controller_failure, with_type=True)}; "
                "its finished epochs are kept, and the same command goes on from there"
            ) from error
        except TrainingFailedError as error:
            raise UserError(
                f"training was given up after {restarts} restarts: {_cause(error)}; its "
                "finished epochs are kept, and the same command goes on from there"
            ) from error
        except ActorDiedError as error:
            # Ray overwrites the file in place: killed at that, or with the machine's power gone,
            # it leaves half of it. Nor does it read one of another version of its own.
            _, of_the_note, why = last_line(error).partition(
                "CheckpointManagerInitializationError: "
            )
            if not of_the_note:
                raise
            raise UserError(
                f"Ray's note of the epochs in {join_uri(work_uri, run)} cannot be read ({why}); "
                "remove that folder, and the same command begins anew"
            ) from error


def _cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None)
    # Ray quotes whole tracebacks.
    return last_line(next(iter(failures.values())) if failures else error, with_type=True)


@contextlib.contextmanager
def _own_interrupts(trainer: TorchTrainer) -> Iterator[None]:
    """Ctrl-C is ours to answer. Ray Train takes it for itself, ends the process with code 1 and
    without a word, and never gives it back."""
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for controller in controllers:
            # A Ray that outlives this call would train on. It takes its workers along.
            ray.kill(controller)
        raise
