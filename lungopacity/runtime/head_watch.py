"""Ends this process, with the reason, when the head of the Ray cluster that it has joined is gone.

Ray itself ends a process that has not reached the head for a minute: with exit code 1, which here
means that the job is done; and without a word, because its log lines are off where there are
actors.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_RAYS_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAYS_LIMIT_S = 60.0
_EARLIER_S = 10.0
"""So much earlier than Ray does, this ends the process."""
_LOOK_S = 2.0
_ANSWER_S = 5.0
_LAST_WORDS_S = 5.0
"""So long the process waits for what `if_head_is_lost` calls."""

_listeners: list[Callable[[str], object]] = []


@contextmanager
def if_head_is_lost(tell: Callable[[str], object]) -> Iterator[None]:
    """In the block, `tell` is called with the reason before the process ends because the head is
    gone: the block itself does not go on. It is called in another thread, and must not use Ray."""
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


class HeadWatch:
    """A thread that looks whether the head, at `address` (HOST:PORT), accepts connections."""

    def __init__(self, address: str) -> None:
        self.address = address
        limit_s = float(os.environ.get(_RAYS_LIMIT, _RAYS_LIMIT_S)) - _EARLIER_S
        self._limit_s = max(limit_s, _LOOK_S)
        self._over = threading.Event()

    def start(self) -> None:
        """Does nothing if the head cannot be reached from here even now, as through a proxy."""
        if self._answers():
            threading.Thread(target=self._watch, name="head-watch", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        answered = time.monotonic()
        while not self._over.wait(_LOOK_S):
            if self._answers():
                answered = time.monotonic()
            elif time.monotonic() - answered > self._limit_s and not self._over.is_set():
                self._end()

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        except (OSError, ValueError):
            return False
        return True

    def _end(self) -> None:
        why = (
            f"the head of the Ray cluster, {self.address}, has not answered for "
            f"{self._limit_s:.0f} s; start the cluster again, and resume the job: what was "
            "finished is kept"
        )
        log.error("%s", why)
        # In a thread of its own, because it is perhaps this machine that reaches nothing.
        words = threading.Thread(target=_tell, args=[why], name="last-words", daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not raised in the main thread: whatever unwinds there would wait for the head.
        os._exit(2)


def _tell(why: str) -> None:
    for tell in _listeners:
        tell(why)
