"""Labelled radiographs to a model folder: manifest ▶ split ▶ pixels ▶ fit. This module shows the
whole sequence."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from lungopacity.dataset.classes import class_names_of
from lungopacity.errors import UserError
from lungopacity.models import refuse_model
from lungopacity.progress import Progress
from lungopacity.runtime import free_resources, ray_session, resolve_gpu
from lungopacity.storage.probe import check_checkpoints
from lungopacity.training.fit import TrainingResult, fit, start_of
from lungopacity.training.task import DEFAULT_CLASSES, training_task, warn_of_no_effect
from lungopacity.training.tracking import run_logs

log = logging.getLogger(__name__)


def train(
    images: Sequence[str],
    labels: str,
    output: str,
    *,
    model: str = "classical-cnn",
    classes: Sequence[str] = DEFAULT_CLASSES,
    positive_class: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, str] | None = None,
    workers: int | tuple[int, int] = 1,
    use_gpu: bool | None = None,
    seed: int = 0,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
    tensorboard: str | None = None,
    mlflow: str | None = None,
) -> TrainingResult:
    """Trains a network and writes a model folder to `output`.

    images: URIs of archives. `labels`: see `read_labels`. `model`: see `network_card`. `classes`:
    see `classes_of_labels`. `positive_class`: None takes Lung_Opacity where it is one of the
    classes, else the last class. `weights`: see `first_weights`. `settings`: further settings by
    name, see `with_words`. `weights`, `image_size`, `epochs` and `batch_size` of None take the
    recipe's value. `workers`: a number, or the fewest and the most. `use_gpu`: see `resolve_gpu`.
    `accept`, `reject_quality`: as in screening; rejected films are left out. `tensorboard`,
    `mlflow`: see `run_logs`. The same call resumes where a crashed one stopped. Raises
    `UserError`.
    """
    refuse_model(output)
    fewest, most = (workers, 0) if isinstance(workers, int) else workers
    if not isinstance(workers, int) and most < max(1, fewest):
        raise UserError(f"--workers {fewest}:{most} must be MIN:MAX with 1 <= MIN <= MAX")
    task = training_task(
        images,
        labels,
        model=model,
        classes=classes,
        positive_class=positive_class,
        image_size=image_size,
        options={
            "weights": weights,
            "epochs": epochs,
            "batch_size": batch_size,
            "workers": fewest,
            "max_workers": most,
            "seed": seed,
        },
        words=settings or {},
        accept=accept,
        reject_quality=reject_quality,
    )
    warn_of_no_effect(task)
    check_checkpoints(output)
    with run_logs(tensorboard, mlflow) as logs, ray_session():
        chosen = replace(task.settings, use_gpu=resolve_gpu(use_gpu))
        # Reports impossible settings before the films are read.
        start = start_of(chosen, class_names_of(task.label_map))
        progress = Progress(
            "Training", total=chosen.epochs, unit="epochs", waits_for=free_resources
        )

        def show(row: dict[str, Any]) -> None:
            progress.advance(
                row["epoch"] - progress.done,
                note=f"validation loss {row['validation_loss']:.4f}, "
                f"accuracy {row['validation_accuracy']:.4f}, "
                f"{row['images_per_s']:.0f} images/s",
            )
            logs.epoch(row)

        with _how_to_resume(progress), ExitStack() as shown:

            def begin(run: str, earlier: list[dict[str, Any]]) -> None:
                logs.start(run, chosen, output, earlier)
                if earlier:
                    log.info("resumed after epoch %d of %d", len(earlier), chosen.epochs)
                    progress.start_at(len(earlier))
                # Not before: until `fit` has the lease, it waits for another run, not for CPUs.
                shown.enter_context(progress)

            result = fit(
                task.load(),
                chosen,
                output,
                start=start,
                label_map=task.label_map,
                left_out=task.left_out,
                provenance=task.provenance(),
                on_start=begin,
                on_epoch=show,
            )
        logs.finish(result)
    return result


@contextmanager
def _how_to_resume(progress: Progress) -> Iterator[None]:
    """Says after Ctrl-C or SIGTERM in the block what is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if progress.done:
            log.warning(
                "stopped after epoch %d of %d; the same command resumes there",
                progress.done,
                progress.total,
            )
        else:
            log.warning("stopped before an epoch was finished; the same command starts again")
        raise
