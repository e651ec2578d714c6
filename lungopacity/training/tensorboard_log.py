"""A training run in TensorBoard."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungopacity.errors import NOTICE
from lungopacity.storage import LocalStore, join_uri, open_store
from lungopacity.training.run_log import RunLog, as_user_error


class TensorBoardLog(RunLog):
    """Event files in a folder for each run, on disk or in S3; TensorBoard reads both."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.place = f"--tensorboard {uri}"
        self._uri = uri
        self._writer: Any = None
        self._spool = contextlib.ExitStack()
        store = open_store(uri)
        with as_user_error(self.place):
            if isinstance(store, LocalStore):
                store.root.mkdir(parents=True, exist_ok=True)
            next(iter(store.list()), None)

    def start(self, run: str, settings: Mapping[str, bool | float | str], output: str) -> None:
        # Not SummaryWriter, which writes in a thread of its own: `_flush` must leave a whole file.
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
        # All epochs are written again: at this event, TensorBoard drops earlier files' values.
        self._event(0, session_log=SessionLog(status=SessionLog.START))
        shown, started, self._ended = hparams(dict(settings), {"validation_loss": 0.0})
        self._event(0, summary=shown)
        self._event(0, summary=started)
        self._texts({"model_folder": output, "notice": NOTICE})
        self._flush()

    def write(self, row: Mapping[str, Any]) -> None:
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
        """Writes the events so far. In S3, where an object cannot grow, the whole file is uploaded
        again, which is some kilobytes."""
        self._writer.flush()
        if not isinstance(self._store, LocalStore):
            for path in self._folder.iterdir():
                self._store.write(path.name, path.read_bytes())
