"""Checks before hours of work, not after them, whether a place can be written to safely."""

from __future__ import annotations

import contextlib
import os
import uuid
from functools import partial

from lungopacity.errors import UserError
from lungopacity.storage import ConflictError, LocalStore, S3Store, Store, open_store

_NO_ETAG = "0" * 32
"""An etag that no object has."""


def check_writable(uri: str, *, private: bool = False) -> None:
    """Raises `UserError` if the folder cannot be written to. A folder that does not exist yet still
    does not exist afterwards. `private`: see `Store.write`."""
    _probe(open_store(uri), private=private)


def _probe(store: Store, *, private: bool = False, if_absent: bool = False) -> None:
    """Write an empty object, and remove it and the folders made for it."""
    key, new = f".probe-{uuid.uuid4().hex}", []
    if isinstance(store, LocalStore):
        above = (store.root, *store.root.parents)
        new = [folder for folder in above if not os.path.exists(folder)]
    store.write(key, b"", private=private, if_absent=if_absent)
    # Some users may write and not delete; an empty file stays then.
    with contextlib.suppress(UserError, OSError):
        store.delete(key)
        for folder in new:
            folder.rmdir()


def check_conditions(uri: str) -> None:
    """Raises `UserError` if conditional writes do not work at the place, or if it cannot be written
    to at all. A server may ignore If-None-Match or If-Match: two nights would both hold the lease,
    and overwrite each other's runs. A folder's file system may lack hard links, which replace
    If-None-Match there.
    """
    store, key = open_store(uri), f".probe-{uuid.uuid4().hex}"
    if not isinstance(store, S3Store):
        _probe(store, if_absent=True)
        return
    store.write(key, b"")
    try:
        for name, write in (
            ("If-None-Match", partial(store.write, if_absent=True)),
            ("If-Match", partial(store.write, if_match=_NO_ETAG)),
        ):
            with contextlib.suppress(ConflictError):
                write(key, b"")
                raise UserError(
                    f"{store.uri}: the server ignores {name}, so two jobs could overwrite each "
                    "other's results; keep results on a server that honours it"
                )
    finally:
        with contextlib.suppress(UserError, OSError):
            store.delete(key)
