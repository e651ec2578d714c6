"""Waits up to a minute for a server that restarts: once, for all requests of a process together.

botocore's own attempts are over in seconds, so a thousand images would fail in the half minute that
a server takes to come back. A server that has never answered is not waited for: most likely its
address is wrong. Its first answer may take as long as the timeouts allow, and a warning says so.
One that stays away is waited for once, or every object would wait again. A store that is pickled to
another process takes along which servers have answered, because that process may start in the
middle of an outage.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Timer
from typing import TypeVar

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
_PAUSE_S = 2.0
_SILENCE_S = 8.0
"""After this time without a first answer, a warning says what is waited for."""

T = TypeVar("T")

_silent_since: dict[str, float | None] = {}
"""For each endpoint that has ever answered, the time since when it does not; None while it does."""


def answered() -> tuple[str, ...]:
    """The endpoints that have answered this process, or a process that sent it a store."""
    return tuple(_silent_since)


def trust(endpoints: Iterable[str]) -> None:
    """Record that these have answered another process: they are waited for from the first request
    on."""
    for endpoint in endpoints:
        _silent_since.setdefault(endpoint, None)


def heard(endpoint: str) -> None:
    """Record that the endpoint has answered, whichever client asked."""
    _silent_since[endpoint] = None


def patiently(endpoint: str, request: Callable[[], T]) -> T:
    """The result of `request`, which is repeated while the server at `endpoint` cannot be reached.

    Raises what `request` raises: at once if the server answered or never has, else after
    `PATIENCE_S`.
    """
    from botocore.exceptions import (
        ClientError,
        ConnectionClosedError,
        ConnectTimeoutError,
        EndpointConnectionError,
    )

    began = time.monotonic()
    while True:
        try:
            with _telling_of_silence(endpoint):
                answer = request()
        except (ConnectionClosedError, ConnectTimeoutError, EndpointConnectionError):
            now = time.monotonic()
            if endpoint not in _silent_since:
                raise
            since = _silent_since[endpoint]
            if since is None:
                log.warning("the storage at %s cannot be reached; waiting for it", endpoint)
                since = _silent_since[endpoint] = now
            # Also since this request began: others may get through while this one never does.
            if now - min(since, began) > PATIENCE_S:
                raise
            time.sleep(random.uniform(0.5, 1.0) * _PAUSE_S)
        except ClientError:
            heard(endpoint)
            raise
        else:
            heard(endpoint)
            return answer


@contextmanager
def _telling_of_silence(endpoint: str) -> Iterator[None]:
    """Warn if a server that has never answered does not answer the block's request soon either."""
    if endpoint in _silent_since:
        yield
        return
    timer = Timer(_SILENCE_S, _warn_of_silence, [endpoint])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def _warn_of_silence(endpoint: str) -> None:
    """Once per process: several threads may wait."""
    log.warning("the storage at %s has not answered yet; waiting for it", endpoint)
