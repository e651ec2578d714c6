"""The interface of a place that shows training runs, and the messages about one that fails."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lungopacity.errors import UserError, first_line

log = logging.getLogger(__name__)


class RunLog(ABC):
    """A place that shows a training run, such as TensorBoard or MLflow."""

    place: str
    """Its name in messages, without a password."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        """Epochs that it has."""

    @abstractmethod
    def start(self, run: str, settings: Mapping[str, bool | float | str], output: str) -> None:
        """Opens the run of that name, and writes its settings. May fill `written`."""

    @abstractmethod
    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one epoch's row of the history."""

    @abstractmethod
    def finish(self, metrics: Mapping[str, float], facts: Mapping[str, str], epoch: int) -> None:
        """Closes the run, with the metrics and facts of the model, which is of `epoch`."""

    @abstractmethod
    def give_up(self) -> None:
        """Closes a run that made no model; the run may be started again."""

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows that it does not have yet."""
        for row in rows:
            if row["epoch"] not in self.written:
                self.write(row)
                self.written.add(row["epoch"])


@contextlib.contextmanager
def as_user_error(place: str) -> Iterator[None]:
    """Turns any error of the block into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}: cannot be written to ({_shortened(error)}); check the address and its "
            "permissions, or leave the option out"
        ) from error


@contextlib.contextmanager
def as_warning(place: str) -> Iterator[None]:
    """Turns any error of the block into a warning in the log."""
    try:
        yield
    except Exception as error:
        log.warning("%s: not written (%s); training goes on", place, _shortened(error))


def _shortened(error: Exception) -> str:
    """The first sentence of an error, without URIs. MLflow's errors are long, and quote the URI
    with its password."""
    words = [word for word in first_line(error).split(". ")[0].split() if "@" not in word]
    return " ".join(words)[:200]
