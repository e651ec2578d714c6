"""A training run, as TensorBoard and MLflow show it while it runs.

The driver tells them; workers know nothing of it. Each epoch is told once, also of a run that goes
on after a crash. Nothing of the films is told: no label, no name, no weights.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lungopacity.errors import NOTICE, UserError
from lungopacity.storage import LocalStore, join_uri, open_store
from lungopacity.training.fit import TrainingResult
from lungopacity.training.settings import TrainingSettings

log = logging.getLogger(__name__)

EXPERIMENT = "lungopacity"
"""MLflow's experiment, unless the variable MLFLOW_EXPERIMENT_NAME says another."""

_EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
_RUN_TAG = "lungopacity.run"
_OUTPUT_TAG = "model_folder"
# Read by MLflow when it is imported. It would tell its makers of every use, and try for minutes to
# reach a server that is not there.
_MLFLOW_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


_WAIT_S = 30.0
"""At the end of a training, for a place that says nothing."""


class RunLog(ABC):
    """One place where runs are followed."""

    place: str
    """What messages call it; without a password."""

    def __init__(self) -> None:
        self.told: set[int] = set()
        """Epochs."""

    @abstractmethod
    def start(self, run: str, settings: Mapping[str, bool | float | str], output: str) -> None:
        """Open the run of that name, and say what it is. May set `told`."""

    @abstractmethod
    def tell(self, row: Mapping[str, Any]) -> None:
        """One epoch."""

    @abstractmethod
    def finish(self, metrics: Mapping[str, float], facts: Mapping[str, str], epoch: int) -> None:
        """Close the run: what the model of `epoch` earned, and what it is."""

    @abstractmethod
    def give_up(self) -> None:
        """Close a run that made no model; it may be started again."""

    def tell_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Those that were not told yet."""
        for row in rows:
            if row["epoch"] not in self.told:
                self.tell(row)
                self.told.add(row["epoch"])


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
            with _as_warning(self.place.place):
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
            with _as_user_error(place.place):
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


class TensorBoardLog(RunLog):
    """Event files in a folder of the run's own. From S3 TensorBoard reads them, too."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.place = f"--tensorboard {uri}"
        self._uri = uri
        self._writer: Any = None
        self._spool = contextlib.ExitStack()
        store = open_store(uri)
        with _as_user_error(self.place):
            if isinstance(store, LocalStore):
                store.root.mkdir(parents=True, exist_ok=True)
            next(iter(store.list()), None)

    def start(self, run: str, settings: Mapping[str, bool | float | str], output: str) -> None:
        # Not its SummaryWriter, which writes when it pleases: `flush` must leave a whole file.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import hparams

        self._store = open_store(join_uri(self._uri, run))
        if isinstance(self._store, LocalStore):
            self._folder = self._store.root
            self._folder.mkdir(exist_ok=True)
        else:
            self._folder = Path(self._spool.enter_context(tempfile.TemporaryDirectory()))
        self._writer = EventsWriter(str(self._folder / "events"))
        # All is told anew: a reader drops what files of the folder said before from this step on.
        self._event(0, session_log=SessionLog(status=SessionLog.START))
        shown, started, self._ended = hparams(dict(settings), {"validation_loss": 0.0})
        self._event(0, summary=shown)
        self._event(0, summary=started)
        self._texts({"model_folder": output, "notice": NOTICE})
        self._flush()

    def tell(self, row: Mapping[str, Any]) -> None:
        self._scalars({name: row[name] for name in row if name != "epoch"}, row["epoch"])
        self._flush()

    def finish(self, metrics: Mapping[str, float], facts: Mapping[str, str], epoch: int) -> None:
        self._scalars(metrics, epoch)
        self._texts(facts)
        self._event(0, summary=self._ended)
        self.give_up()

    def give_up(self) -> None:
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._writer = None
            self._spool.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._event(step, summary=scalar(name, value))

    def _texts(self, texts: Mapping[str, str]) -> None:
        from tensorboardX.summary import text

        for name, value in texts.items():
            self._event(0, summary=text(name, value))

    def _event(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))

    def _flush(self) -> None:
        """To S3 the file goes up whole, some kilobytes: an object cannot grow."""
        self._writer.flush()
        if not isinstance(self._store, LocalStore):
            for path in self._folder.iterdir():
                self._store.write(path.name, path.read_bytes())


class MlflowLog(RunLog):
    """A run of an MLflow server, found again by its tag."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.place = f"--mlflow {_without_password(uri)}"
        for name, value in _MLFLOW_VARIABLES.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise UserError(
                "--mlflow: MLflow is not installed where the training is started; pip install "
                "'lungopacity[mlflow]'"
            ) from error
        name = os.environ.get(_EXPERIMENT_VARIABLE, EXPERIMENT)
        with _as_user_error(self.place):
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(name)
            self._experiment = (
                self._client.create_experiment(name) if found is None else found.experiment_id
            )
        self._run: str | None = None

    def start(self, run: str, settings: Mapping[str, bool | float | str], output: str) -> None:
        from mlflow.entities import Param

        # Also of one that was killed before its first checkpoint, and not of another output.
        unfinished = f"tags.`{_RUN_TAG}` = '{run}' and attributes.status != 'FINISHED'"
        found = [
            item
            for item in self._client.search_runs([self._experiment], unfinished)
            if item.data.tags.get(_OUTPUT_TAG) == output
        ]
        if found:
            self._run = str(found[0].info.run_id)
            self._client.update_run(self._run, status="RUNNING")
            history = self._client.get_metric_history(self._run, "validation_loss")
            self.told = {metric.step for metric in history}
            return
        tags = {_RUN_TAG: run, _OUTPUT_TAG: output, "mlflow.note.content": NOTICE}
        made = self._client.create_run(
            self._experiment, tags=tags, run_name=f"{settings['model']} {run}"
        )
        self._run = str(made.info.run_id)
        parameters = [Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self._run, params=parameters)

    def tell(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "epoch"}
        # Last: an epoch that has it has all.
        values["validation_loss"] = values.pop("validation_loss")
        self._metrics(values, row["epoch"])

    def finish(self, metrics: Mapping[str, float], facts: Mapping[str, str], epoch: int) -> None:
        self._metrics(metrics, epoch)
        for name, text in facts.items():
            self._client.set_tag(self._run, name, text)
        self._client.set_terminated(self._run, "FINISHED")
        self._run = None

    def give_up(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, "FAILED")

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)


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


@contextlib.contextmanager
def _as_user_error(place: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: cannot be written to ({_said(error)})") from error


@contextlib.contextmanager
def _as_warning(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("%s: not written (%s); training goes on", place, _said(error))


def _said(error: Exception) -> str:
    """MLflow says much, and quotes the URI with its password: its first sentence, without URIs."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    words = [word for word in first.split(". ")[0].split() if "@" not in word]
    return " ".join(words)[:200]


def _without_password(uri: str) -> str:
    host = urlsplit(uri).netloc
    return uri.replace(host, host.rpartition("@")[2], 1) if "@" in host else uri
