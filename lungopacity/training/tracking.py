"""A training run, as TensorBoard and MLflow show it while it runs.

The driver tells them; workers know nothing of it. Each epoch is told once, also of a run that goes
on after a crash. Nothing of the films is told: no label, no name, no weights.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lungopacity.training.fit import TrainingResult
from lungopacity.training.mlflow_log import MlflowLog
from lungopacity.training.run_log import RunLog, as_user_error, as_warning
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.tensorboard_log import TensorBoardLog

log = logging.getLogger(__name__)

_WAIT_S = 30.0
"""At the end of a training, for a place that says nothing."""


class _Teller:
    """A place with a thread of its own: one that is slow, or hangs, holds nothing else up."""

    def __init__(self, place: RunLog) -> None:
        self.place = place
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._skips_epochs = False

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Returns at once."""

        def tell() -> None:
            if not self._skips_epochs:
                self.place.tell_rows([row])

        self._do(tell)

    def end(self, last: Callable[[], None], *, tells_all: bool) -> None:
        """Do that, and wait for it while the place shows any life. tells_all: it tells of every
        epoch itself, so that those that wait need not be told one by one."""
        self._skips_epochs = tells_all
        thread, told = self._do(last), -1
        self._jobs.put(None)
        while thread.is_alive() and told < len(self.place.told):
            told = len(self.place.told)
            thread.join(_WAIT_S)
        if thread.is_alive():
            log.warning("%s: does not answer; not all was written", self.place.place)

    def _do(self, job: Callable[[], None]) -> threading.Thread:
        self._jobs.put(job)
        if self._thread is None or not self._thread.is_alive():
            # A daemon: one that hangs does not hold the process up either.
            self._thread = threading.Thread(target=self._work, daemon=True, name=self.place.place)
            self._thread.start()
        return self._thread

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            with as_warning(self.place.place):
                job()


class RunLogs:
    """All places of one run. Once training runs, none of them can stop it or hold it up: what could
    not be told is told at the end, or a log line says that it was not."""

    def __init__(self, logs: Sequence[RunLog]) -> None:
        self.places = logs
        self._tellers = [_Teller(place) for place in logs]

    def start(
        self,
        run: str,
        settings: TrainingSettings,
        output: str,
        earlier: Sequence[Mapping[str, Any]],
    ) -> None:
        """earlier: rows of epochs that were trained before a crash. Raises `UserError` where a
        place cannot be written to."""
        for place in self.places:
            with as_user_error(place.place):
                place.start(run, flat_settings(settings), output)
                place.tell_rows(earlier)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """A history row, as it comes."""
        for teller in self._tellers:
            teller.epoch(row)

    def finish(self, result: TrainingResult) -> None:
        """The model, and what could not be told of its epochs before."""
        spec = result.model.spec
        metrics = {
            **{f"model/{name}": value for name, value in spec.metrics.items()},
            "model/temperature": spec.temperature,
        }
        facts = {
            "model_id": result.model.model_id,
            "best_epoch": str(result.best_epoch),
            "synthetic": str(spec.synthetic).lower(),
        }

        def finished(place: RunLog) -> None:
            place.tell_rows(result.history)
            place.finish(metrics, facts, result.best_epoch)

        for teller in self._tellers:
            teller.end(functools.partial(finished, teller.place), tells_all=True)

    def give_up(self) -> None:
        for teller in self._tellers:
            teller.end(teller.place.give_up, tells_all=False)


@contextlib.contextmanager
def run_logs(tensorboard: str | None, mlflow: str | None) -> Iterator[RunLogs]:
    """tensorboard: URI of a folder. mlflow: a tracking URI. None: not there.

    Raises `UserError` where one cannot be written to, or MLflow is not installed.
    """
    places: list[RunLog] = []
    if tensorboard is not None:
        places.append(TensorBoardLog(tensorboard))
    if mlflow is not None:
        places.append(MlflowLog(mlflow))
    logs = RunLogs(places)
    try:
        yield logs
    except BaseException:
        logs.give_up()
        raise


def flat_settings(settings: TrainingSettings) -> dict[str, bool | float | str]:
    """By the names that `--set` takes, as augmentation.scale; lists as JSON."""
    flat: dict[str, bool | float | str] = {}

    def add(prefix: str, part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{name}.", value)
            elif isinstance(value, bool | int | float | str):
                flat[f"{prefix}{name}"] = value
            else:
                flat[f"{prefix}{name}"] = json.dumps(value)

    add("", settings.as_json())
    return flat
