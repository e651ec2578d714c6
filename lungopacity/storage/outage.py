"""Patience with a server that is restarted: a minute of it, once for all requests of a process.

botocore's own attempts are over in seconds, and a thousand images would fail for the half minute
that a server takes to come back. A server that has never answered gets no patience: most likely its
address is wrong. One that stays away gets it once, or every object would wait anew. A store that
travels to another process takes along which servers have answered, for that process may begin in
the middle of an outage.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

log = logging.getLogger(__name__)

PATIENCE_S = 60.0
_PAUSE_S = 2.0

T = TypeVar("T")

_silent_since: dict[str, float | None] = {}
"""By endpoint, once it has answered: since when it does not; None while it does."""


def answered() -> tuple[str, ...]:
    """The endpoints that have answered this process, or the one that a store came from."""
    return tuple(_silent_since)


def trust(endpoints: Iterable[str]) -> None:
    """These have answered elsewhere: they get patience from the first request on."""
    for endpoint in endpoints:
        _silent_since.setdefault(endpoint, None)


def heard(endpoint: str) -> None:
    """It has answered, whoever asked."""
    _silent_since[endpoint] = None


def patiently(endpoint: str, request: Callable[[], T]) -> T:
    """The answer to `request`, asked again while the server at `endpoint` cannot be reached.

    Raises what `request` raises: at once where the server answered, else after `PATIENCE_S`.
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
            answer = request()
        except (ConnectionClosedError, ConnectTimeoutError, EndpointConnectionError):
            now = time.monotonic()
            if endpoint not in _silent_since:
                raise
            since = _silent_since[endpoint]
            if since is None:
                log.warning("the storage at %s cannot be reached; waiting for it", endpoint)
                since = _silent_since[endpoint] = now
            # By its own begin, too: others may get through while this one never does.
            if now - min(since, began) > PATIENCE_S:
                raise
            time.sleep(random.uniform(0.5, 1.0) * _PAUSE_S)
        except ClientError:
            heard(endpoint)
            raise
        else:
            heard(endpoint)
            return answer
