"""What lies in an archive: one row an object, from the storage's own listing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from lungopacity.archive.containers import SHARD_SUFFIXES
from lungopacity.errors import UserError
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.storage import ObjectInfo, Store, open_store, split_uri


@dataclass(frozen=True)
class Archive:
    """A listed archive."""

    uri: str
    """The root that `image` is relative to."""
    objects: pa.Table
    """`PLAN_SCHEMA`, sorted by `image`."""

    @property
    def store(self) -> Store:
        return open_store(self.uri)


def is_shard(key: str) -> bool:
    """Whether the object is a container of images, by its name."""
    return key.lower().endswith(SHARD_SUFFIXES)


def take_inventory(uri: str, on_listed: Callable[[int], None] | None = None) -> Archive:
    """List the archive at `uri`: a prefix of loose objects and shards, or one object.

    `on_listed` is called with the number of objects found since the last call. Raises `UserError`
    where the place cannot be listed or holds nothing.
    """
    store = open_store(uri)
    objects = _listed(store, on_listed)
    if not objects:
        parent, name = split_uri(uri)
        # "s3://bucket" alone has no parent to look the name up in.
        single = open_store(parent).head(name) if parent not in ("s3:/", "s3://") else None
        if single is None:
            raise UserError(f"{store.uri}: nothing lies there; check the path or prefix")
        store, objects = open_store(parent), [single]
    objects.sort(key=lambda item: item.key)
    return Archive(uri=store.uri, objects=plan_table(objects))


def _listed(store: Store, on_listed: Callable[[int], None] | None) -> list[ObjectInfo]:
    objects: list[ObjectInfo] = []
    for found in store.list():
        objects.append(found)
        if on_listed is not None and len(objects) % 1000 == 0:
            on_listed(1000)
    if on_listed is not None:
        on_listed(len(objects) % 1000)
    return objects


def plan_table(objects: list[ObjectInfo]) -> pa.Table:
    """The objects as a table of `PLAN_SCHEMA`."""
    return pa.Table.from_pydict(
        {
            "image": [item.key for item in objects],
            "source_etag": [item.etag for item in objects],
            "source_size_bytes": [item.size_bytes for item in objects],
            "source_modified_at": [item.modified_at for item in objects],
            "is_shard": [is_shard(item.key) for item in objects],
        },
        schema=PLAN_SCHEMA,
    )
