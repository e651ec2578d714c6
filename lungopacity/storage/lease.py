"""One job at a time: a lease on a folder of results, kept in the folder itself.

The holder is the job that wrote `_lock/<name>.json`, by a conditional write that only one job can
win. It renews the lease while it lives. A lease that has not been renewed for as long as it lasts
may be taken over. Only the storage's clock measures its age: the clocks of the machines may differ,
or be set back.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self

from lungopacity.errors import ErrorCode, ImageError, UserError
from lungopacity.storage.interface import ConflictError, Store

log = logging.getLogger(__name__)

LOCKS = "_lock"
LEASE_S = 90.0
"""How long a lease is valid after its last renewal: after a kill, the next job waits this long."""
_RENEWALS = 5
"""Renewals within that time, so that some may fail."""


@dataclass
class Lease:
    """`with Lease(store, "nightly", "night 7"): …`. Raises `UserError` if another job holds it."""

    store: Store
    name: str
    purpose: str
    """What another job's error message says of this one, besides host and process."""
    seconds: float = LEASE_S
    patient: bool = False
    """Wait until another job's lease is renewed or expires: so a killed job can be started again at
    once. Otherwise the holder of a lease that has not expired is assumed to live."""
    _token: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    _etag: str | None = field(default=None, init=False)
    """The etag of what was written last; None if it is unknown."""
    _renewing: threading.Lock = field(default_factory=threading.Lock, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _taken_over: bool = field(default=False, init=False)
    _renewed: float = field(default=0.0, init=False)
    """`time.monotonic()` at the start of the last renewal that succeeded."""

    @property
    def key(self) -> str:
        return f"{LOCKS}/{self.name}.json"

    def __enter__(self) -> Self:
        self._take()
        self._thread = threading.Thread(target=self._keep, daemon=True, name=f"lease {self.name}")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self.held():
                self.store.delete(self.key)
        except (UserError, ImageError) as failure:
            # It expires by itself.
            log.warning("the lease could not be released: %s", failure)

    def held(self) -> bool:
        """Whether the lease is still ours. Renews it. If the storage does not answer: whether the
        last renewal is so recent that nobody can have taken the lease over."""
        try:
            self._renew()
        except UserError as error:
            log.warning("%s", error)
            return time.monotonic() - self._renewed <= self.seconds
        return not self._taken_over

    def check(self) -> None:
        """Raises `UserError` if the lease was lost; then nothing may be published."""
        if not self.held():
            why = (
                "another job has taken it over"
                if self._taken_over
                else "it could not be renewed in time"
            )
            raise UserError(f"{self.store.uri}: the lease '{self.name}' was lost ({why})")

    @property
    def taken_over(self) -> bool:
        """Whether another job is known to hold the lease; does not ask the storage."""
        return self._taken_over

    def _take(self) -> None:
        try:
            self._put(if_absent=True)
        except ConflictError:
            found = self.store.head(self.key)
            if found is not None:
                self._wait_for_renewal(found.etag, found.modified_at)
                found = self.store.head(self.key)
            if found is not None:
                age = self.store.now() - found.modified_at
                if age <= timedelta(seconds=self.seconds):
                    raise UserError(self._held(age)) from None
                log.warning("a lease that was not renewed for %s is taken over", _in_s(age))
            try:
                self._put(if_absent=found is None, if_match=None if found is None else found.etag)
            except ConflictError:
                raise UserError(self._held(timedelta(0))) from None

    def _wait_for_renewal(self, etag: str, modified_at: datetime) -> None:
        """Find out whether the holder lives, if the lease's age does not say: a holder that does
        not renew it in time is taken for dead, and its lease is removed. After a clock was set
        back, a lease is dated in the future and has no age."""
        age_s = (self.store.now() - modified_at).total_seconds()
        is_ahead = age_s <= -self.seconds
        if not is_ahead and not (self.patient and age_s <= self.seconds):
            return
        wait_s = self.seconds if is_ahead else self.seconds - age_s
        log.warning(
            "%s: %s is at work there, or was killed; waiting up to %.0f s for a sign of life",
            self.store.uri,
            self._holder(),
            wait_s,
        )
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            time.sleep(self.seconds / _RENEWALS)
            found = self.store.head(self.key)
            if found is None or found.etag != etag:
                return
        remove_if_same(self.store, self.key, etag)

    def _held(self, age: timedelta) -> str:
        return (
            f"{self.store.uri}: another job is at work there: {self._holder()}, last sign of life "
            f"{_in_s(age)} ago; wait until it ends (if it was killed, its lease expires "
            f"{self.seconds:.0f} s after its last sign of life)"
        )

    def _holder(self) -> str:
        holder = self._content()
        return (
            f"{holder.get('purpose', 'unknown')}, process {holder.get('process', '?')} on "
            f"{holder.get('host', '?')}"
        )

    def _put(self, *, if_absent: bool = False, if_match: str | None = None) -> None:
        """Write the lease. Raises `ConflictError` if another job holds it, `UserError` if the
        storage does not answer."""
        renewal = uuid.uuid4().hex
        content = {
            "token": self._token,
            "renewal": renewal,
            "purpose": self.purpose,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        began = time.monotonic()
        # The write may succeed and its answer be lost.
        self._etag = None
        try:
            self.store.write(
                self.key,
                json.dumps(content, indent=2).encode(),
                if_absent=if_absent,
                if_match=if_match,
            )
        except ConflictError:
            # After a lost answer the client asks again, and meets what it wrote itself.
            if self._content().get("renewal") != renewal:
                raise
        self._renewed = began
        self._etag = self._own_etag()

    def _own_etag(self) -> str | None:
        """The etag of the lease if it is ours, else None. Raises `UserError` if the storage does
        not say."""
        found = self.store.head(self.key)
        if found is None or self._content(found.etag).get("token") != self._token:
            return None
        return found.etag

    def _content(self, etag: str | None = None) -> dict[str, Any]:
        """The content of the lease; empty if it is gone or damaged. Raises `UserError` if the
        storage does not say, or if the lease no longer has this etag."""
        try:
            found = json.loads(self.store.read(self.key, etag=etag))
        except ImageError as error:
            if error.code is ErrorCode.MISSING:
                return {}
            raise UserError(
                f"{self.store.uri}/{self.key} cannot be read ({error.message}); try again"
            ) from error
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _renew(self) -> None:
        """Renew the lease, however late: while what we wrote last is still there, nobody has taken
        it over. Raises `UserError` if the storage does not answer."""
        with self._renewing:
            if self._taken_over:
                return
            # Twice: the etag may have changed and not the content, as after a copy.
            for _ in range(2):
                etag = self._etag or self._own_etag()
                if etag is None:
                    break
                try:
                    self._put(if_match=etag)
                except ConflictError:
                    continue
                return
            self._taken_over = True

    def _keep(self) -> None:
        while not self._taken_over and not self._stop.wait(self.seconds / _RENEWALS):
            try:
                self._renew()
            except UserError as error:
                log.warning("the lease could not be renewed: %s", error)


def remove_if_same(store: Store, key: str, etag: str) -> bool:
    """Remove a lease that has expired, unless it no longer has this etag: then somebody renewed it
    or took it over. Returns whether it was removed. Raises `UserError` if the storage refuses."""
    try:
        # This makes any later renewal fail, so the delete cannot remove a live lease.
        store.write(key, b"{}", if_match=etag)
    except ConflictError:
        return False
    store.delete(key)
    return True


def _in_s(age: timedelta) -> str:
    return f"{max(0.0, age.total_seconds()):.0f} s"
