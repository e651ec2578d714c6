"""Progress of anything that takes longer than about two seconds.

A live line on a terminal, log lines elsewhere. Only the command line turns them on: called from
Python, functions print nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Event, Thread
from typing import Any, Self, TypeVar

log = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_QUICK_S = 2.0
_STILL_S = 60.0
"""A stall is logged after this time without progress, then after pauses of twice, four times ...
this time."""
_LONG_UNITS = frozenset({"epochs", "trials", "runs", "networks", "sizes"})
"""Units of which one takes seconds: shown as seconds each, all others as so many a second. The
speed does not choose: it may cross any limit from one line to the next."""
_live = False
_shown: Any = None
"""The bar that holds the terminal's live line; there is only one such line."""

T = TypeVar("T")


def show_on_terminal() -> None:
    """Let `Progress` draw its live line, if standard error is a terminal."""
    global _live
    _live = sys.stderr.isatty()


def _bar(unit: str) -> Any:
    """A bar for one task, with the fields `rate` and `note`."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as RichProgress,
    )
    from rich.text import Text

    class Bar(RichProgress):
        def get_renderables(self) -> Iterable[RenderableType]:
            """The note has a line of its own: beside it, a terminal of 80 columns has no room for
            the count."""
            yield from super().get_renderables()
            for task in self.tasks:
                if task.fields["note"]:
                    yield Text(f"  {task.fields['note']}", overflow="ellipsis", no_wrap=True)

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class Progress:
    """Counts up to a total: `with Progress("Screening", total=n) as progress: progress.advance(8)`.

    Not thread-safe. Its time runs from the start of the block. Of two nested ones, the terminal
    shows the one that advanced last. `quick`: it is usually done at once, and then not logged.
    `waits_for`: says, for people, what may be holding it up; another thread calls it after a minute
    without progress.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "images",
        *,
        quick: bool = False,
        waits_for: Callable[[], str] | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.quick = quick
        self.done = 0
        self._before = 0
        self.note = ""
        self._logged: int | None = None
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._waits_for = waits_for
        self._ended = Event()
        self._watch: Thread | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        if _live:
            self._bar = _bar(self.unit)
            self._show()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.done, note="", rate=""
            )
        if self._waits_for is not None:
            self._watch = Thread(target=self._watch_for_stalls, args=[self._waits_for], daemon=True)
            self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _shown
        self._ended.set()
        if self._watch is not None:
            # It may be asking Ray, which the caller must not shut down meanwhile.
            self._watch.join(timeout=30)
        if self._bar is not None:
            self._bar.stop()
            _shown = None if _shown is self._bar else _shown
        elif kind is None and self._logged != self.done and not self._was_quick:
            self._line()

    def start_at(self, done: int) -> None:
        """`done` of them were done before, by an earlier process: they count, but not as part of
        the speed. To be called before the block."""
        self.done = self._before = done

    def around(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items while the progress is shown."""
        with self:
            yield from items

    @property
    def _has_ended(self) -> bool:
        """Whether the last line is due. It comes at once: what the block does after its last step
        may take long, and is no part of the speed."""
        return self.done == self.total and self._logged != self.done and not self.quick

    @property
    def _was_quick(self) -> bool:
        return self.quick and time.monotonic() - self._started < _QUICK_S

    @property
    def per_second(self) -> float:
        return (self.done - self._before) / max(1e-9, time.monotonic() - self._started)

    def advance(self, count: int, note: str = "") -> None:
        """`count` more are done. `note` ends the line."""
        self.done += count
        self.note = note or self.note
        if self._bar is not None:
            self._show()
            self._bar.update(
                self._task,
                completed=self.done,
                note=self.note,
                rate=self._rate,
            )
        elif self._has_ended or time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._line()

    def _watch_for_stalls(self, waits_for: Callable[[], str]) -> None:
        done, since, pause_s = self.done, time.monotonic(), _STILL_S
        while not self._ended.wait(pause_s):
            # What comes after the last one, such as the end of a training, shows its own progress.
            if self.done != done or self.done == self.total:
                done, since, pause_s = self.done, time.monotonic(), _STILL_S
                continue
            note = f"no progress for {time.monotonic() - since:.0f} s; {waits_for()}"
            if self._bar is not None:
                self._bar.update(self._task, note=note)
            else:
                log.info("%s: %d%s %s, %s", self.title, done, self._of, self.unit, note)
            pause_s *= 2

    def _show(self) -> None:
        global _shown
        if _shown is not self._bar:
            if _shown is not None:
                _shown.stop()
            self._bar.start()
            _shown = self._bar

    @property
    def _of(self) -> str:
        return f" of {self.total}" if self.total is not None else ""

    @property
    def _rate(self) -> str:
        """Empty before the first."""
        rate = self.per_second
        if rate <= 0:
            return ""
        if self.unit in _LONG_UNITS:
            return f"{_digits(1 / rate)} s each"
        return f"{_digits(rate)}/s"

    def _line(self) -> None:
        self._last_line, self._logged = time.monotonic(), self.done
        facts = "".join(f", {fact}" for fact in (self._rate, self.note) if fact)
        log.info("%s: %d%s %s%s", self.title, self.done, self._of, self.unit, facts)


def _digits(number: float) -> str:
    """Two digits, or all before the point."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
