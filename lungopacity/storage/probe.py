"""Whether a place can be written to, and safely: told before hours of work, not after them."""

from __future__ import annotations

import contextlib
import os
import uuid
from functools import partial

from lungopacity.errors import UserError
from lungopacity.storage import ConflictError, LocalStore, S3Store, open_store

_OF_NOTHING = "0" * 32
"""The etag of no object."""


def check_writable(uri: str, *, private: bool = False) -> None:
    """Raises `UserError` where nothing can be kept in the folder. One that is not there yet is not
    made. `private`: see `Store.write`."""
    store, key = open_store(uri), f".probe-{uuid.uuid4().hex}"
    new = []
    if isinstance(store, LocalStore):
        above = (store.root, *store.root.parents)
        new = [folder for folder in above if not os.path.exists(folder)]
    store.write(key, b"", private=private)
    # Some may write and not remove; an empty file is left then.
    with contextlib.suppress(UserError, OSError):
        store.delete(key)
        for folder in new:
            folder.rmdir()


def check_conditions(uri: str) -> None:
    """Raises `UserError` where a server takes no notice of If-None-Match or If-Match: two nights
    would both hold the lease, and write over each other's runs. Or where the place cannot be
    written to, which results must.
    """
    store, key = open_store(uri), f".probe-{uuid.uuid4().hex}"
    if not isinstance(store, S3Store):
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
