"""A place where training runs are followed, and what is said of one that fails."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lungopacity.errors import UserError, first_line

log = logging.getLogger(__name__)


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


@contextlib.contextmanager
def as_user_error(place: str) -> Iterator[None]:
    """Whatever goes wrong in the block is a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}: cannot be written to ({_said(error)}); check the address and its "
            "permissions, or leave the option out"
        ) from error


@contextlib.contextmanager
def as_warning(place: str) -> Iterator[None]:
    """Whatever goes wrong in the block is a line of the log."""
    try:
        yield
    except Exception as error:
        log.warning("%s: not written (%s); training goes on", place, _said(error))


def _said(error: Exception) -> str:
    """MLflow says much, and quotes the URI with its password: its first sentence, without URIs."""
    words = [word for word in first_line(error).split(". ")[0].split() if "@" not in word]
    return " ".join(words)[:200]
