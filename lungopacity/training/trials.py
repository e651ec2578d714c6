"""The trials of a search: a row for each that has ended, and the command that trains one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import cloudpickle
from ray import tune as ray_tune

from lungopacity.errors import NOTICE, last_line
from lungopacity.results.schema import METADATA
from lungopacity.storage import Store, join_uri
from lungopacity.training.search_space import Domain, draw, value_of, with_draw
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.task import TrainingTask

DONE, STOPPED, DIVERGED, FAILED, OUT_OF_TIME = (
    "done",
    "stopped",
    "diverged",
    "failed",
    "out of time",
)
"""done: trained to its end; stopped: by ASHA; diverged: a loss was not finite; failed: it crashed
twice; out of time: cut short by the time budget, and run again by the next call."""
_SOUND = (DONE, STOPPED, OUT_OF_TIME)
"""Trials whose settings would give a model; training gives none where a run diverges."""

OBJECTIVE = "calibrated_loss"
"""The loss that ranks trials, at the epoch that training would keep, which is the one with the
lowest validation loss."""

# No figure has the name of a setting, because searched settings are columns, too.
_FIGURES = [
    pa.field("epochs_trained", pa.int64(), nullable=False),
    pa.field("best_epoch", pa.int64()),
    pa.field("calibrated_loss", pa.float64()),
    pa.field("validation_loss", pa.float64()),
    pa.field("validation_accuracy", pa.float64()),
    pa.field("validation_auc", pa.float64()),
    pa.field("seconds", pa.float64(), nullable=False),
    pa.field("error", pa.string()),
]


_CURVE = ("epoch", "train_loss", "validation_loss", OBJECTIVE, "validation_auc", "learning_rate")
"""Figures that are kept of each epoch; they show whether a trial was stopped too soon."""


class Trials(ray_tune.Callback):  # type: ignore[misc]  # ray ships no types
    """Rows by trial number. Tune calls this on the driver; each row is written when its trial
    ends."""

    def __init__(
        self, store: Store, space: Mapping[str, Domain], settings: TrainingSettings
    ) -> None:
        self.space = space
        self.rows: dict[int, dict[str, Any]] = {}
        self.on_row: Callable[[str], None] = lambda note: None
        """Called after each new row, with a note on the best loss so far."""
        self._store = store
        self._settings = settings
        self._epochs: dict[int, list[dict[str, Any]]] = {}
        for item in store.list("trials/"):
            row = json.loads(store.read(item.key))
            self.rows[row["trial"]] = row

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks in order to restore a search. We resume from the rows, and a
        # terminal cannot be pickled.
        return {}

    def settings_of(self, number: int) -> TrainingSettings:
        return with_draw(self._settings, draw(self.space, self._settings.seed, number))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        epochs = self._epochs.setdefault(trial.config["trial"], [])
        # A trial that is run again after a crash begins at its first epoch.
        epochs[:] = [row for row in epochs if row["epoch"] < result["epoch"]]
        epochs.append(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["trial"]
        last = self._epochs.get(number, [{}])[-1]
        if last.get("diverged"):
            error = f"the loss of epoch {last['epoch']} is not finite; lower the learning rate"
            self._end(number, DIVERGED, error)
        elif not last:
            self._end(number, FAILED, "it ended before its first epoch")
        else:
            self._end(number, STOPPED if self._cut(number) else DONE)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial.config["trial"], FAILED, _why_it_crashed(trial))

    def out_of_time(self) -> None:
        """Adds rows, which are not written, for trials that began and have not ended."""
        for number, epochs in self._epochs.items():
            if number not in self.rows and not epochs[-1].get("diverged"):
                self.rows[number] = self._row(number, OUT_OF_TIME, None)

    def _cut(self, number: int) -> bool:
        """Whether the trial ended neither at its last epoch nor by its own patience."""
        settings = self.settings_of(number)
        epochs = self._epochs[number]
        losses = [row["validation_loss"] for row in epochs]
        waited = len(losses) - 1 - losses.index(min(losses))
        patient = settings.patience == 0 or waited < settings.patience
        return patient and len(epochs) < settings.epochs

    def _end(self, number: int, status: str, error: str | None = None) -> None:
        row = self._row(number, status, error)
        self.rows[number] = row
        curve = [
            {name: epoch[name] for name in _CURVE if name in epoch}
            for epoch in self._epochs.get(number, [])
        ]
        kept = {**row, "curve": curve, "notice": NOTICE}
        self._store.write(f"trials/{number:05}.json", json.dumps(kept).encode())
        best = best_of(self.rows.values())
        self.on_row("" if best is None else f"lowest calibrated loss {best[OBJECTIVE]:.4f}")

    def _row(self, number: int, status: str, error: str | None) -> dict[str, Any]:
        epochs = [row for row in self._epochs.get(number, []) if not row.get("diverged")]
        # Of equal losses the last, as in Ray Train.
        best: dict[str, Any] = min(
            reversed(epochs), key=lambda row: row["validation_loss"], default={}
        )
        return {
            "trial": number,
            "status": status,
            "words": draw(self.space, self._settings.seed, number),
            "epochs_trained": len(epochs),
            "best_epoch": best.get("epoch"),
            **{
                name: best.get(name)
                for name in (OBJECTIVE, "validation_loss", "validation_accuracy", "validation_auc")
            },
            "seconds": round(sum(row["seconds"] for row in epochs), 1),
            "error": error,
        }


def best_of(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the lowest calibrated loss, among those whose settings would give a model."""
    sound = [row for row in rows if row["status"] in _SOUND]
    return min(sound, key=_rank, default=None)


def _rank(row: Mapping[str, Any]) -> tuple[bool, bool, float, int]:
    loss = row[OBJECTIVE]
    return row["status"] not in _SOUND, loss is None, loss or 0.0, row["trial"]


def trials_table(rows: Iterable[Mapping[str, Any]], space: Mapping[str, Domain]) -> pa.Table:
    """The rows as a table: the lowest calibrated loss first, trials that diverged or failed last.

    Columns: trial, status; one for each setting that is searched, null where the recipe's own value
    was tried; epochs_trained, best_epoch; calibrated_loss and validation_loss (nats),
    validation_accuracy and validation_auc (0 … 1), all at best_epoch; seconds (of training), error.
    """
    kinds = {name: domain.arrow_type for name, domain in space.items()}
    schema = pa.schema(
        [
            pa.field("trial", pa.int64(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            *(pa.field(name, kind) for name, kind in kinds.items()),
            *_FIGURES,
        ],
        metadata=METADATA,
    )

    def filled(row: Mapping[str, Any]) -> dict[str, Any]:
        words = {name: value_of(word, kinds[name]) for name, word in row["words"].items()}
        return {**words, **row}

    return pa.Table.from_pylist([filled(row) for row in sorted(rows, key=_rank)], schema=schema)


def train_arguments(task: TrainingTask, drawn: Mapping[str, str], output: str) -> dict[str, Any]:
    """`arguments` and `command` line of `lungopacity train` for a trial. drawn: its words."""
    settings = task.settings
    words = {**task.words, **drawn}
    options = {
        "--model": settings.model,
        "--weights": settings.weights,
        "--classes": ",".join(task.classes),
        "--positive-class": settings.positive_class,
        "--image-size": str(settings.preprocessing.image_size),
        "--epochs": words.pop("epochs", str(settings.epochs)),
        "--batch-size": words.pop("batch_size", str(settings.batch_size)),
        "--seed": str(settings.seed),
        "--accept": ",".join(sorted(task.accepted)),
        "--reject-quality": ",".join(sorted(task.rejecting)) or "none",
    }
    arguments = ["train"]
    for uri in task.images:
        arguments += ["--images", uri]
    arguments += ["--labels", task.labels, "--output", join_uri(output, "model")]
    for option, value in options.items():
        if value:
            arguments += [option, value]
    arguments += [] if settings.use_gpu else ["--no-gpu"]
    for name, word in words.items():
        arguments += ["--set", f"{name}={word}"]
    return {"arguments": arguments, "command": shlex.join(["lungopacity", *arguments])}


def _why_it_crashed(trial: Any) -> str:
    """Why a trial crashed: the last line of the error that Tune stored. Tune's `get_pickled_error`
    reads a copy that may not exist yet."""
    kept = trial.pickled_error_file
    cause = cloudpickle.loads(Path(kept).read_bytes()) if kept and Path(kept).exists() else None
    if cause is None:
        return "it crashed"
    return last_line(getattr(cause, "cause", None) or cause)[:300]
