"""Whether a place can be written to: told before hours of work, not after them."""

from __future__ import annotations

import contextlib
import uuid

from lungopacity.errors import UserError
from lungopacity.storage import open_store


def check_writable(uri: str, *, private: bool = False) -> None:
    """Raises `UserError` where nothing can be kept in the folder. `private`: see `Store.write`."""
    store, key = open_store(uri), f".probe-{uuid.uuid4().hex}"
    store.write(key, b"", private=private)
    # Some may write and not remove; an empty file is left then.
    with contextlib.suppress(UserError, OSError):
        store.delete(key)
