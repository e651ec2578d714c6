"""How SIGTERM, as schedulers send it, and Ctrl-C end this process."""

from __future__ import annotations

import atexit
import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ASK_AGAIN_S = 0.05


@dataclass
class _Signals:
    """State of this process. `_here` is the only instance."""

    handled: bool = False
    """Whether our handlers are in place."""
    waits: bool = False
    """Whether a signal is only noted for now."""
    told_by: int | None = None
    """The signal that told the process to end."""


_here = _Signals()


def end_on_signals() -> None:
    """Let SIGTERM, with which schedulers end a job, unwind the stack as Ctrl-C does, so that leases
    are given back.

    Neither signal raises in the middle of an import: Python would drop such an exception or, worse,
    keep the global import lock, for which the thread that starts Ray would then wait forever.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _end)
    # A shell makes its background processes ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if not _here.handled:
        # At its very end Python handles no signals any more, and an alarm would kill it.
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    _here.handled = True


def signals_are_ours() -> bool:
    """Whether `end_on_signals` has put our handlers in place."""
    return _here.handled


def take_signals_back() -> None:
    """Put our handlers back, if they were in place: Ray may have replaced them with its own."""
    if _here.handled:
        end_on_signals()


@contextmanager
def signals_wait() -> Iterator[None]:
    """In the block no signal raises; call `end_if_told` after it. For native code that crashes the
    process if it is left half done."""
    _here.waits = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        _here.waits = False


@contextmanager
def native_handlers_kept() -> Iterator[None]:
    """For a block in which native code, as Ray's does, takes SIGTERM over: after it, the signal has
    the handler that it had. Unlike `signal.signal`, this works in any thread."""
    # Opaque, and larger than `struct sigaction` is anywhere.
    kept = ctypes.create_string_buffer(1024)
    libc = ctypes.CDLL(None)
    libc.sigaction(signal.SIGTERM, None, kept)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGTERM, kept, None)


def end_if_told() -> None:
    """For long loops, because Python drops what a signal handler raises inside a destructor. Raises
    `SystemExit` after a SIGTERM, `KeyboardInterrupt` after Ctrl-C."""
    if _here.told_by == signal.SIGINT:
        _here.told_by = None  # raised only once, because Python may go on to something else
        raise KeyboardInterrupt
    if _here.told_by is not None:
        raise SystemExit(code_of_signal())


def code_of_signal() -> int | None:
    """The exit code if a signal told this process to end; None if none did."""
    return None if _here.told_by is None else 128 + _here.told_by


def _end(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGALRM:
        _here.told_by = number
    if _here.waits:
        return
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, _ASK_AGAIN_S)
            return
        frame = frame.f_back
    end_if_told()
