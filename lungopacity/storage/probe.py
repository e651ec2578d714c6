"""Whether a place can be written to, and safely: told before hours of work, not after them."""

from __future__ import annotations

import contextlib
import os
import uuid
from functools import partial

from lungopacity.errors import UserError
from lungopacity.storage import ConflictError, LocalStore, S3Store, Store, open_store

_OF_NOTHING = "0" * 32
"""The etag of no object."""


def check_writable(uri: str, *, private: bool = False) -> None:
    """Raises `UserError` where nothing can be kept in the folder. One that is not there yet is not
    made. `private`: see `Store.write`."""
    _probe(open_store(uri), private=private)


def _probe(store: Store, *, private: bool = False, if_absent: bool = False) -> None:
    """Write an empty object as `Store.write` does, and remove it."""
    key, new = f".probe-{uuid.uuid4().hex}", []
    if isinstance(store, LocalStore):
        above = (store.root, *store.root.parents)
        new = [folder for folder in above if not os.path.exists(folder)]
    store.write(key, b"", private=private, if_absent=if_absent)
    # Some may write and not remove; an empty file is left then.
    with contextlib.suppress(UserError, OSError):
        store.delete(key)
        for folder in new:
            folder.rmdir()


def check_conditions(uri: str) -> None:
    """Raises `UserError` where a server takes no notice of If-None-Match or If-Match: two nights
    would both hold the lease, and write over each other's runs. Or where a folder's file system
    has no hard links, which stand for the first of them there. Or where the place cannot be
    written to, which results must.
    """
    store, key = open_store(uri), f".probe-{uuid.uuid4().hex}"
    if not isinstance(store, S3Store):
        _probe(store, if_absent=True)
        return
    store.write(key, b"")
    try:
        for name, write in (
            ("If-None-Match", partial(store.write, if_absent=True)),
            ("If-Match", partial(store.write, if_match=_OF_NOTHING)),
        ):
            with contextlib.suppress(ConflictError):
                write(key, b"")
                raise UserError(
                    f"{store.uri}: the server writes whatever {name} says, so two jobs could "
                    "publish over each other; keep results on one that honours it"
                )
    finally:
        with contextlib.suppress(UserError, OSError):
            store.delete(key)
