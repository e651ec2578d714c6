"""The driver's side of training: checks, the run, calibration, the model folder.

A run is named by the hash of its settings and data, and keeps its checkpoints in
`_training/<name>` of the output. The same command therefore resumes after a crash, while another
command starts from its first epoch and leaves the others' checkpoints alone. A lease keeps the same
command from running twice at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import safetensors.numpy
import torch

from lungopacity import observe
from lungopacity.dataset.classes import positive_class_of
from lungopacity.dataset.manifest import SPLIT_SEED
from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.errors import UserError
from lungopacity.models import (
    ModelSpec,
    TrainedModel,
    build_network,
    network_card,
    refuse_model,
    save_model,
)
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.models.pretrained import FirstWeights, first_weights, take_weights
from lungopacity.results.schema import METADATA, logit_columns
from lungopacity.runtime import require_resources, versions
from lungopacity.storage import join_uri, open_store
from lungopacity.storage.lease import LEASE_S, Lease
from lungopacity.storage.parquet import parquet_bytes
from lungopacity.training.calibrate import calibrate, shares_shifted, warn_of_few
from lungopacity.training.checkpoint import (
    HISTORY_FILE,
    LOGITS_FILE,
    NETWORK_FILE,
    checkpoints_of,
    read_file_of,
    remove_checkpoints,
    rows_of_before,
)
from lungopacity.training.finish import compiled_of, distribution_of
from lungopacity.training.loop import Films
from lungopacity.training.ray_run import run_ray_train
from lungopacity.training.settings import TrainingSettings

log = logging.getLogger(__name__)

HISTORY_SCHEMA = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("train_loss", pa.float64(), nullable=False),
        pa.field("train_accuracy", pa.float64(), nullable=False),
        pa.field("validation_loss", pa.float64(), nullable=False),
        pa.field("validation_accuracy", pa.float64(), nullable=False),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("images_per_s", pa.float64(), nullable=False),
        pa.field("workers", pa.int32(), nullable=False),
    ],
    metadata=METADATA,
)
"""Of `history.parquet`; docs/reports.md explains the columns and their units."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished run. The output folder holds the model, too."""

    model: TrainedModel
    history: list[dict[str, Any]]
    """Rows of `HISTORY_SCHEMA`, including those from before a crash."""
    best_epoch: int
    """The epoch whose weights were kept: the one with the lowest validation loss."""


@dataclass(frozen=True)
class Start:
    """What a training run starts from, determined before a film is read."""

    architecture_settings: dict[str, Any]
    first: FirstWeights | None
    """First weights under our network's names; None: all weights are random."""

    @property
    def source(self) -> dict[str, Any] | None:
        """Where the first weights come from, for the model folder."""
        return None if self.first is None else dict(self.first.facts)


@dataclass(frozen=True)
class _Kept:
    """The epoch with the lowest validation loss, and the history."""

    epoch: int
    weights: bytes
    """As in the model folder."""
    logits_VK: npt.NDArray[np.float32]
    history: list[dict[str, Any]]
    """Rows of all epochs."""


def start_of(settings: TrainingSettings, class_names: Sequence[str]) -> Start:
    """Checks the settings and loads the first weights. Needs a running Ray. Raises `UserError`
    where the positive class is not one of the classes, the cluster is too small or the first
    weights are not available; `ValueError` for settings that the network refuses."""
    positive_class_of(class_names, settings.positive_class)
    workers = settings.workers
    require_resources(workers, workers * settings.use_gpu, "training", "--workers")
    network = build_network(settings.model, len(class_names), settings.model_settings)
    return Start(asdict(network.settings), first_tensors(network, settings))  # type: ignore[call-overload]


def fit(
    data: LabelledPixels,
    settings: TrainingSettings,
    output: str,
    *,
    start: Start | None = None,
    label_map: Mapping[str, str] | None = None,
    left_out: Mapping[str, Mapping[str, int]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    on_start: Callable[[str, list[dict[str, Any]]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Trains on `data`, and writes the model folder `output`. Needs a running Ray.

    start: the result of `start_of`; None calls it. label_map: label to class. left_out: images
    whose label belongs to no class; see `manifest.left_out`. provenance: facts for the model
    folder, such as the name of the labels file, as JSON can hold them. on_start: called once before
    training, with the run's name and the history rows that a crashed run of this name left.
    on_epoch: called with each history row while training runs, from another thread; a resumed run
    begins with its first new epoch.

    Raises `UserError` where the output holds a model, a class lacks films, the first weights are
    not available or learnt from a validation film, the cluster is too small, training fails, or the
    same training is already running; `ValueError` for settings that the network refuses.
    """
    refuse_model(output)
    counts = count_films(data)
    start = start or start_of(settings, data.class_names)
    check_validation(data, start.first)
    run = _run_name(data, settings, start.source)
    observe.set_run(run)
    films = films_of(data)
    # Of two running at once, each would remove the other's checkpoints.
    lease = Lease(open_store(output), run, f"training of {settings.model}", LEASE_S, patient=True)
    with lease:
        refuse_model(output)
        earlier = rows_of_before(output, run)
        if on_start is not None:
            on_start(run, earlier)
        kept = _trained(films, start, settings, output, run, on_epoch)
        log.info("epoch %d is kept; its network now scores all films once more", kept.epoch)
        spec = replace(
            _spec(data, settings, start.architecture_settings, kept.logits_VK, films),
            label_map=dict(label_map or {}),
            training={
                "settings": settings.as_json(),
                "data": _facts_of(data, counts, left_out),
                "weights": start.source,
                "versions": versions(),
                "best_epoch": kept.epoch,
                "seconds": round(sum(row["seconds"] for row in kept.history), 1),
                "provenance": dict(provenance or {}),
            },
        )
        model = _completed(TrainedModel(spec, kept.weights), films, settings.use_gpu)
        refuse_model(
            output,
            "another training finished first; the finished epochs of this one are kept in "
            f"{checkpoints_of(output, run)}: to use them, remove that model and run the same "
            "command again",
        )
        _save(output, model, data, films, kept, start.first)
        remove_checkpoints(output, run)
    return TrainingResult(model=model, history=kept.history, best_epoch=kept.epoch)


def _trained(
    films: Films,
    start: Start,
    settings: TrainingSettings,
    output: str,
    run: str,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> _Kept:
    """Trains, or resumes where a crashed run of that name stopped. Raises `UserError`."""
    first = None if start.first is None else dict(start.first.tensors)
    result = run_ray_train(films, first, settings, join_uri(output, "_training"), run, on_epoch)
    diverged = result.return_value["diverged_in_epoch"]
    if diverged:
        raise UserError(
            f"training diverged: the loss of epoch {diverged} is not a finite number; lower the "
            f"learning rate, for example with --set learning_rate={settings.learning_rate / 4:g}"
        )
    best, best_metrics = min(
        result.best_checkpoints, key=lambda checkpoint: checkpoint[1]["validation_loss"]
    )
    kept, latest = (
        join_uri(checkpoints_of(output, run), point.path.rsplit("/", 1)[1])
        for point in (best, result.checkpoint)
    )
    return _Kept(
        epoch=int(best_metrics["epoch"]),
        weights=read_file_of(kept, NETWORK_FILE),
        logits_VK=safetensors.numpy.load(read_file_of(kept, LOGITS_FILE))["logits_VK"],
        history=json.loads(read_file_of(latest, HISTORY_FILE)),
    )


def _facts_of(
    data: LabelledPixels,
    counts: dict[str, dict[str, int]],
    left_out: Mapping[str, Mapping[str, int]] | None,
) -> dict[str, Any]:
    """What the model folder records about the films."""
    unreadable = Counter([*data.unreadable["split"], *data.rejected["split"]])
    return {
        "fingerprint": data.fingerprint,
        "images": counts,
        "left_out": {"labels": dict(left_out or {}), "unreadable": dict(unreadable)},
        "unknown_patients": int(data.images["patient_id"].isna().sum()),
        "split_seed": SPLIT_SEED,
    }


def _completed(model: TrainedModel, films: Films, use_gpu: bool) -> TrainedModel:
    """The model with what is found by running it: the distribution of its training films and, where
    that is better, the network compiled for CPUs."""
    shared = ray.put(films)
    model = replace(model, distribution=distribution_of(model, films, shared, use_gpu))
    log.info("compiling the network for CPUs, and comparing it with torch on validation films")
    compiled, said = compiled_of(model, shared)
    log.info("%s", said)
    spec = replace(model.spec, training={**model.spec.training, "on_cpus": said})
    return replace(model, spec=spec, compiled=compiled)


def _save(
    output: str,
    model: TrainedModel,
    data: LabelledPixels,
    films: Films,
    kept: _Kept,
    first: FirstWeights | None,
) -> None:
    digests, views = data.images["content_sha256"], data.views()
    learnt, chosen_by = (digests.iloc[rows].to_list() for rows in (films.train, films.validation))
    before = frozenset() if first is None else first.known.all
    save_model(
        output,
        model,
        parquet_bytes(pa.Table.from_pylist(kept.history, schema=HISTORY_SCHEMA)),
        validation_parquet(
            chosen_by,
            [data.class_names[label] for label in data.labels_N[films.validation]],
            kept.logits_VK,
            logit_columns(data.class_names),
            [views[row] for row in films.validation],
        ),
        training_films_parquet([*learnt, *sorted(before - {*learnt, *chosen_by})]),
    )


def films_of(data: LabelledPixels) -> Films:
    """The part of the data that workers need."""
    return Films(
        pixels_NHW=data.pixels_NHW,
        labels_N=data.labels_N,
        train=np.flatnonzero(data.split_N == "train"),
        validation=np.flatnonzero(data.split_N == "validation"),
        classes=len(data.class_names),
    )


def first_tensors(network: torch.nn.Module, settings: TrainingSettings) -> FirstWeights | None:
    """The first weights under the names of `network`, which they are loaded into; None: only random
    weights. Raises `UserError` where they are not available."""
    card = network_card(settings.model)
    given = first_weights(card, settings.weights)
    if given is None:
        return None
    fresh = take_weights(network, card, given, settings.preprocessing.std)
    log.info("first weights: %s", given.facts["source"])
    first = {name: part for name, part in network.state_dict().items() if name not in fresh}
    return replace(given, tensors=first)


def check_validation(data: LabelledPixels, first: FirstWeights | None) -> None:
    """Raises `UserError` where the first weights learnt from a validation film: the choice of the
    epoch and the calibration would rest on films that the network already knows."""
    if first is None:
        return
    films = data.images[data.split_N == "validation"]
    seen = films.loc[films["content_sha256"].isin(list(first.known.learnt_from)), "image"]
    if len(seen):
        raise UserError(
            f"--weights {first.facts['source']}: learnt from {len(seen)} of {len(films)} films of "
            f"the validation split, such as {seen.iloc[0]}; give labels with the splits that it "
            "was trained with, or other first weights"
        )


def count_films(data: LabelledPixels) -> dict[str, dict[str, int]]:
    """Number of films by split and class. Raises `UserError` where a class has no films for
    training or validation."""
    counts = {
        split: {
            name: int(((data.split_N == split) & (data.labels_N == index)).sum())
            for index, name in enumerate(data.class_names)
        }
        for split in ("train", "validation", "test")
    }
    for split in ("train", "validation"):
        if not any(counts[split].values()):
            raise UserError(f"no film is in the {split} split; add films or change the split")
        for name, count in counts[split].items():
            if not count:
                raise UserError(
                    f"no film of class '{name}' is in the {split} split; add films of it, or leave "
                    "the class out"
                )
    return counts


def _run_name(
    data: LabelledPixels, settings: TrainingSettings, weights: dict[str, Any] | None
) -> str:
    facts = [
        settings.as_json(),
        weights,
        data.class_names,
        data.fingerprint,
        # In order: films are drawn, and checkpoints keep validation logits, by position.
        hashlib.sha256("".join(data.images["content_sha256"]).encode()).hexdigest(),
        versions()["lungopacity"],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _spec(
    data: LabelledPixels,
    settings: TrainingSettings,
    architecture_settings: dict[str, Any],
    logits_VK: npt.NDArray[np.float32],
    films: Films,
) -> ModelSpec:
    """The spec without `label_map` and `training`; calibrated on the validation films."""
    positive = data.class_names.index(settings.positive_class)
    labels_V = data.labels_N[films.validation]
    shifted = shares_shifted(settings.class_balance, data.labels_N[films.train], labels_V)
    found = calibrate(logits_VK, labels_V, positive, shifted=shifted)
    warn_of_few(labels_V, positive)
    return ModelSpec(
        architecture=settings.model,
        architecture_settings=architecture_settings,
        class_names=tuple(data.class_names),
        positive_class=settings.positive_class,
        preprocessing=settings.preprocessing,
        operating_point=found.operating_point,
        operating_points=found.operating_points,
        temperature=found.temperature,
        class_biases=found.class_biases,
        synthetic=data.synthetic,
        metrics=dict(found.metrics),
    )
