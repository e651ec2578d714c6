"""A search for better settings: Ray Tune runs trials in parallel, each a real training run.

Films are decoded once and kept in Ray's object store. A trial is a single process, so trials never
wait for each other; ASHA (Li et al. 2020, arXiv:1810.05934) stops those that lag behind others at
the same epoch. Trials are ranked by their validation loss after calibration, as in the model folder
that they would give: label smoothing, mixup and weight decay also shift the confidence, which
calibration corrects. The test split is never loaded.

    search.json          what is searched; another search needs another output
    trials/00007.json    a finished trial with its epochs, so that the same command can resume after
                         a crash
    trials.parquet       one row per trial, best first
    best.json            the best trial, and the command that trains it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import torch
from ray import tune as ray_tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from lungopacity.dataset.classes import class_names_of
from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.errors import NOTICE, UserError
from lungopacity.models import build_network
from lungopacity.models.pretrained import FirstWeights
from lungopacity.progress import Progress
from lungopacity.runtime import (
    capacity,
    check_same_code,
    code_digest,
    free_resources,
    leave_no_core,
    ray_session,
    require_resources,
    resolve_gpu,
    versions,
)
from lungopacity.storage import ConflictError, Store, open_store
from lungopacity.storage.lease import LEASE_S, Lease
from lungopacity.storage.parquet import parquet_bytes
from lungopacity.storage.probe import check_checkpoints
from lungopacity.training.calibrate import calibrate, shares_shifted
from lungopacity.training.fit import check_validation, count_films, films_of, first_tensors
from lungopacity.training.loop import Films, Worker, learn
from lungopacity.training.search_space import Domain, draw, search_space, with_draw
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.task import DEFAULT_CLASSES, TrainingTask, training_task
from lungopacity.training.trials import (
    OBJECTIVE,
    Trials,
    best_of,
    train_arguments,
    trials_table,
)

log = logging.getLogger(__name__)

_REDUCTION = 3
"""ASHA lets the best third of the trials at each rung continue."""


@dataclass(frozen=True)
class TuneResult:
    """The result of a search; the output holds it as `trials.parquet` and `best.json`."""

    trials: pa.Table
    """One row per trial, the best first; see `trials_table`."""
    best: dict[str, Any]
    """The first row's settings and figures, and the `command` that trains it."""


def tune(
    images: Sequence[str],
    labels: str,
    output: str,
    *,
    trials: int = 20,
    search: Mapping[str, str] | None = None,
    time_budget_s: float | None = None,
    model: str = "classical-cnn",
    classes: Sequence[str] = DEFAULT_CLASSES,
    positive_class: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, str] | None = None,
    use_gpu: bool | None = None,
    seed: int = 0,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
) -> TuneResult:
    """Runs `trials` trials, the first with the recipe itself, and writes the results to `output`.

    `search`: see `search_space`; None searches the network's default space. `time_budget_s`: limit
    for this call's trials; the next call runs those again that it cut short. The others are as in
    `train`. The same call resumes where a crashed one stopped, and a call with more trials adds
    them. A trial that diverges or crashes becomes a row with its error. Raises `UserError`, also
    where no trial succeeds, or another search is running in that output.
    """
    _check_arguments(trials, time_budget_s, settings or {})
    task = training_task(
        images,
        labels,
        model=model,
        classes=classes,
        positive_class=positive_class,
        image_size=image_size,
        options={"weights": weights, "epochs": epochs, "batch_size": batch_size, "seed": seed},
        words=settings or {},
        accept=accept,
        reject_quality=reject_quality,
    )
    space = _space(task.settings, search or {}, trials)
    check_checkpoints(output)
    names = class_names_of(task.label_map)
    network = build_network(model, len(names), task.settings.model_settings)
    first = first_tensors(network, task.settings)
    # Of two running at once, each would overwrite the other's rows.
    lease = Lease(open_store(output), "tune", f"tuning of {model}", LEASE_S, patient=True)
    with ray_session(), lease:
        task = replace(task, settings=replace(task.settings, use_gpu=resolve_gpu(use_gpu)))
        known = _tried(task, first, space, output, trials, time_budget_s)
        return _written(task, known, output, trials)


def _check_arguments(trials: int, time_budget_s: float | None, settings: Mapping[str, str]) -> None:
    if trials < 1:
        raise UserError(f"--trials must be 1 or more, not {trials}")
    if time_budget_s is not None and not time_budget_s > 0:
        raise UserError(f"--time-budget-s must be above 0, not {time_budget_s}")
    for name in ("workers", "max_workers"):
        if name in settings:
            raise UserError(
                f"--set {name}: every trial has one worker; give --workers to the command that "
                "trains the best trial"
            )


def _space(settings: TrainingSettings, search: Mapping[str, str], trials: int) -> dict[str, Domain]:
    """The search space. Raises `UserError` where any of the trials drawn from it is impossible."""
    try:
        space = search_space(settings, search)
        for number in range(trials):
            with_draw(settings, draw(space, settings.seed, number))
    except ValueError as error:
        raise UserError(f"--search {error}") from error
    return space


def _tried(
    task: TrainingTask,
    first: FirstWeights | None,
    space: Mapping[str, Domain],
    output: str,
    trials: int,
    time_budget_s: float | None,
) -> Trials:
    """Runs the trials that earlier calls have not finished; returns all. Needs a running Ray.
    Raises `UserError`."""
    require_resources(1, task.settings.use_gpu, "tuning")
    data = task.load()
    count_films(data)
    check_validation(data, first)
    store = open_store(output)
    _claim(store, task.settings, None if first is None else first.facts, space, data)
    known = Trials(store, space, task.settings)
    waiting = [number for number in range(trials) if number not in known.rows]
    if waiting:
        progress = Progress("Trials", total=trials, unit="trials", waits_for=free_resources)
        progress.start_at(trials - len(waiting))
        known.on_row = lambda note: progress.advance(1, note=note)
        tensors = None if first is None else dict(first.tensors)
        try:
            with progress:
                _run(task.settings, data, tensors, known, waiting, time_budget_s)
        except (KeyboardInterrupt, SystemExit):
            log.warning(
                "stopped; %d of %d trials are kept, and the same command runs the others",
                progress.done,
                trials,
            )
            raise
    return known


def _written(task: TrainingTask, known: Trials, output: str, trials: int) -> TuneResult:
    """Writes `trials.parquet` and `best.json`. Raises `UserError` where no trial gives a model."""
    store = open_store(output)
    table = trials_table(known.rows.values(), known.space)
    store.write("trials.parquet", parquet_bytes(table))
    best = best_of(known.rows.values())
    if best is None:
        errors = [row["error"] for row in table.to_pylist() if row["error"]]
        raise UserError(
            f"no trial of {trials} gives a model: {(errors or ['out of time'])[0]}; "
            "change --search, or give a longer --time-budget-s"
        )
    found = {
        **table.to_pylist()[0],
        # The words as drawn, so that the command trains exactly what the trial did.
        "settings": best["words"],
        **train_arguments(task, best["words"], output),
        "versions": versions(),
        "notice": NOTICE,
    }
    store.write("best.json", json.dumps(found, indent=2).encode())
    return TuneResult(table, found)


def _claim(
    store: Store,
    settings: TrainingSettings,
    weights: Mapping[str, Any] | None,
    space: Mapping[str, Domain],
    data: LabelledPixels,
) -> None:
    """Claims the output for this search. Raises `UserError` where it is another search's."""
    facts = {
        "settings": {**settings.as_json(), "use_gpu": None},
        # With their hash: a file may have changed since.
        "weights": None if weights is None else dict(weights),
        "version": versions()["lungopacity"],
        "search": {name: vars(domain) for name, domain in space.items()},
        "classes": list(data.class_names),
        "fingerprint": data.fingerprint,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    document = json.dumps({**facts, "sha256": digest, "notice": NOTICE}, indent=2).encode()
    try:
        store.write("search.json", document, if_absent=True)
    except ConflictError:
        if json.loads(store.read("search.json"))["sha256"] != digest:
            raise UserError(
                f"{store.uri}: holds a search with other settings, films, splits, weights or "
                "--search, or by another version; choose another --output"
            ) from None


def _run(
    settings: TrainingSettings,
    data: LabelledPixels,
    first: Mapping[str, torch.Tensor] | None,
    known: Trials,
    waiting: Sequence[int],
    time_budget_s: float | None,
) -> None:
    """Runs the trials numbered `waiting`; `known` receives their rows."""
    threads = _threads(len(waiting))
    run = ray_tune.with_parameters(
        _trial,
        settings=settings,
        space=known.space,
        # Inside a dictionary they stay references, so that trials on a node share one copy.
        shared={
            "films": ray.put(films_of(data)),
            "first": None if first is None else ray.put(first),
        },
        positive=data.class_names.index(settings.positive_class),
        threads=threads,
        code=code_digest(),
    )
    if settings.use_gpu:
        resources, slots = {"CPU": 1, "GPU": 1}, capacity()["GPU"]
    else:
        resources, slots = {"CPU": threads}, capacity()["CPU"] // threads
    most = max(known.settings_of(number).epochs for number in waiting)
    # We handle Ctrl-C and write the output ourselves.
    os.environ.update(TUNE_DISABLE_SIGINT_HANDLER="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, _user_errors_kept():
        ray_tune.Tuner(
            ray_tune.with_resources(run, resources),
            param_space={"trial": ray_tune.grid_search(list(waiting))},
            tune_config=ray_tune.TuneConfig(
                metric=OBJECTIVE,
                mode="min",
                scheduler=AsyncHyperBandScheduler(
                    time_attr="epoch",
                    max_t=most,
                    grace_period=max(1, most // 4),
                    reduction_factor=_REDUCTION,
                ),
                max_concurrent_trials=max(1, int(slots)),
                time_budget_s=time_budget_s,
                reuse_actors=True,
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=folder,
                verbose=0,
                callbacks=[known],
                # One retry, for a lost node.
                failure_config=ray_tune.FailureConfig(max_failures=1),
            ),
        ).fit()
    known.out_of_time()


@contextlib.contextmanager
def _user_errors_kept() -> Iterator[None]:
    """Raises a callback's `UserError` as it was, which Tune would turn into a `TuneError`."""
    try:
        yield
    except ray_tune.TuneError as error:
        if isinstance(error.__context__, UserError):
            raise error.__context__ from None
        raise


def _threads(trials: int) -> int:
    """CPU threads of a trial: its share of the cluster's CPUs, at most those of one node."""
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min(max(cpus), sum(cpus) // trials)))


def _trial(
    config: dict[str, Any],
    *,
    settings: TrainingSettings,
    space: Mapping[str, Domain],
    shared: Mapping[str, ray.ObjectRef | None],
    positive: int,
    threads: int,
    code: str,
) -> None:
    """Trains in this process, and reports each epoch to Tune."""
    check_same_code(code)
    leave_no_core()
    own = with_draw(settings, draw(space, settings.seed, config["trial"]))
    films: Films = ray.get(shared["films"])
    labels_V = films.labels_N[films.validation]
    shifted = shares_shifted(own.class_balance, films.labels_N[films.train], labels_V)
    first = None if shared["first"] is None else ray.get(shared["first"])
    # Ray lets a process see only its own GPU.
    device = torch.device("cuda:0" if settings.use_gpu else "cpu")
    if not settings.use_gpu:
        torch.set_num_threads(threads)

    def report(row: dict[str, Any], logits_VK: torch.Tensor, _: object) -> None:
        found = calibrate(logits_VK.numpy(), labels_V, positive, shifted=shifted).metrics
        ray_tune.report({**row, OBJECTIVE: found["loss"], "validation_auc": found["auc"]})

    # Without Ray Train, which refuses to run within Tune and is not needed for one process.
    worker = Worker(own, films, rank=0, workers=1, device=device)
    diverged = learn(worker, first, None, report)
    if diverged:
        ray_tune.report({"epoch": diverged, OBJECTIVE: float("inf"), "diverged": True})
