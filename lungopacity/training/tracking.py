"""Shows a training run in TensorBoard and MLflow while it runs.

The driver writes to them, and workers are not involved. Each epoch appears once, even in a run that
was resumed. Nothing about single films is written: no label, no name; nor any weights.
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
"""How long to wait at the end of a training run for a place that makes no progress."""


class _Writer:
    """A place with a thread of its own, so that a slow one delays neither training nor others."""

    def __init__(self, place: RunLog) -> None:
        self.place = place
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._skips_epochs = False

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Queues a history row, and returns at once."""

        def write() -> None:
            if not self._skips_epochs:
                self.place.write_rows([row])

        self._do(write)

    def end(self, last: Callable[[], None], *, writes_all: bool) -> None:
        """Queues the job `last`, and waits for it while the place makes progress. writes_all: that
        job writes every epoch itself, so that queued epochs can be skipped."""
        self._skips_epochs = writes_all
        thread, written = self._do(last), -1
        self._jobs.put(None)
        while thread.is_alive() and written < len(self.place.written):
            written = len(self.place.written)
            thread.join(_WAIT_S)
        if thread.is_alive():
            log.warning("%s: does not answer; not everything was written", self.place.place)

    def _do(self, job: Callable[[], None]) -> threading.Thread:
        self._jobs.put(job)
        if self._thread is None or not self._thread.is_alive():
            # A daemon, so that a place that hangs does not keep the process alive.
            self._thread = threading.Thread(target=self._work, daemon=True, name=self.place.place)
            self._thread.start()
        return self._thread

    def _work(self) -> None:
        for job in iter(self._jobs.get, None):
            with as_warning(self.place.place):
                job()


class RunLogs:
    """All places of one run. Once training runs, none of them can stop or delay it: rows that could
    not be written are written at the end, or a warning says that they were not."""

    def __init__(self, logs: Sequence[RunLog]) -> None:
        self.places = logs
        self._writers = [_Writer(place) for place in logs]

    def start(
        self,
        run: str,
        settings: TrainingSettings,
        output: str,
        earlier: Sequence[Mapping[str, Any]],
    ) -> None:
        """Opens the run in every place. earlier: rows of the epochs before a crash. Raises
        `UserError` where a place cannot be written to."""
        for place in self.places:
            with as_user_error(place.place):
                place.start(run, flat_settings(settings), output)
                place.write_rows(earlier)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Writes a history row in every place, without waiting for it."""
        for writer in self._writers:
            writer.epoch(row)

    def finish(self, result: TrainingResult) -> None:
        """Writes the model's metrics, and the epochs that could not be written before."""
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
            place.write_rows(result.history)
            place.finish(metrics, facts, result.best_epoch)

        for writer in self._writers:
            writer.end(functools.partial(finished, writer.place), writes_all=True)

    def give_up(self) -> None:
        for writer in self._writers:
            writer.end(writer.place.give_up, writes_all=False)


@contextlib.contextmanager
def run_logs(tensorboard: str | None, mlflow: str | None) -> Iterator[RunLogs]:
    """tensorboard: URI of a folder. mlflow: a tracking URI. None: not used.

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
    """Settings by the names that `--set` takes, such as augmentation.scale; lists as JSON."""
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
