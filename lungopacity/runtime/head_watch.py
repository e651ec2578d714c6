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

log = logging.getLogger(__name__)

_RAYS_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAYS_LIMIT_S = 60.0
_EARLIER_S = 10.0
"""So much earlier than Ray does, this ends the process."""
_LOOK_S = 2.0
_ANSWER_S = 5.0


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
        sys.stdout.flush()
        sys.stderr.flush()
        # Not raised in the main thread: whatever unwinds there would wait for the head.
        os._exit(2)
