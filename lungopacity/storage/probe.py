"""Checks before hours of work, not after them, whether a place can be written to safely."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from functools import partial

from lungopacity.errors import UserError
from lungopacity.storage import ConflictError, LocalStore, S3Store, Store, open_store
from lungopacity.storage.outage import answered
from lungopacity.storage.s3_clients import check_credentials, is_amazon
from lungopacity.storage.s3_errors import may_pass

_NO_ETAG = "0" * 32
"""An etag that no object has."""


def check_writable(uri: str, *, private: bool = False) -> None:
    """Raises `UserError` if the folder cannot be written to. A folder that does not exist yet still
    does not exist afterwards. `private`: see `Store.write`."""
    _probe(open_store(uri), private=private)


def check_checkpoints(uri: str) -> None:
    """Raises `UserError` unless Ray Train can keep checkpoints there: through Arrow, which asks for
    the bucket before it writes anything in it."""
    check_writable(uri)
    store = open_store(uri)
    if isinstance(store, S3Store):
        store.check_bucket()


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


def check_node(store: Store, work: str, key: str = "") -> None:
    """Raises `UserError` if this node has no AWS credentials for the store, cannot reach its server
    or means another server than the driver; or if the store is a folder of another node's disk. To
    be called on the node that does the `work`, for example "films are read".

    `key`: an object that the driver has written there, to look for in a folder; by default the
    folder need only exist.
    """
    where = f"{socket.gethostname()}, where {work}"
    if isinstance(store, S3Store):
        try:
            _ = store.client  # cannot be made where the profile is missing
            check_credentials()
        except UserError as error:
            raise UserError(f"{where}: {error}; the same on every node") from error
        _check_server(store, where)
        return
    assert isinstance(store, LocalStore)
    if os.path.isdir(store.root) if not key else store.head(key) is not None:
        return
    raise UserError(
        f"{store.uri}: is not on {where}; give a place in S3, or on a disk that all nodes share"
    )


_reached: set[tuple[str, str]] = set()
"""The endpoints, and URIs there, that this process has reached: to ask once is enough."""


def _check_server(store: S3Store, where: str) -> None:
    """Raises `UserError` if this process's server is not the one that answered the process that
    sent it the store, or does not answer: each film would get a row of its own that says so."""
    endpoint = store.client.meta.endpoint_url
    if (endpoint, store.uri) in _reached:
        return
    servers = set(map(_server, answered()))
    if servers and _server(endpoint) not in servers:
        raise UserError(
            f"{where}: AWS_ENDPOINT_URL, or a profile, names {endpoint} there, and "
            f"{' or '.join(sorted(servers))} where the job was started; set the same on every node"
        )
    try:
        store.now()
    except UserError as error:
        fix = "the same on every node"
        if servers and may_pass(error):
            fix = "or, if it was away, start the job again"
        raise UserError(f"{where}: {error}; {fix}") from error
    _reached.add((endpoint, store.uri))


def _server(endpoint: str) -> str:
    """The endpoint; one name for all of Amazon's."""
    return "Amazon S3" if is_amazon(endpoint) else endpoint


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
