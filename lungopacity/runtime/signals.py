"""How a scheduler's SIGTERM and Ctrl-C end this process."""

from __future__ import annotations

import atexit
import signal
import threading
from dataclasses import dataclass
from types import FrameType

_ASK_AGAIN_S = 0.05


@dataclass
class _Signals:
    """Of this process: there is one."""

    handled: bool = False
    """Whether our handlers are in place."""
    told_by: int | None = None
    """The signal that told the process to end."""


_here = _Signals()


def end_on_signals() -> None:
    """Let SIGTERM, by which schedulers end a job, unwind as Ctrl-C does: leases are given back.

    And let neither raise in the middle of an import: Python drops such an exception, or worse,
    leaves the lock of all imports taken, and the thread that starts Ray waits for it for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _end)
    # A shell has what it runs in the background ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if not _here.handled:
        # What Python no longer handles at its very end would kill it.
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    _here.handled = True


def take_signals_back() -> None:
    """Ray has put its own handlers there; where ours were, they are again."""
    if _here.handled:
        end_on_signals()


def end_if_told() -> None:
    """For long loops: Python drops what a signal handler raises in a destructor. Raises
    `SystemExit` after a SIGTERM, `KeyboardInterrupt` after Ctrl-C."""
    if _here.told_by == signal.SIGINT:
        _here.told_by = None  # once: Python may go on to something else
        raise KeyboardInterrupt
    if _here.told_by is not None:
        raise SystemExit(code_of_signal())


def code_of_signal() -> int | None:
    """The exit code of a process that a signal told to end; None: none did."""
    return None if _here.told_by is None else 128 + _here.told_by


def _end(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGALRM:
        _here.told_by = number
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, _ASK_AGAIN_S)
            return
        frame = frame.f_back
    end_if_told()
