"""Lists the objects of an archive, one row per object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import pyarrow as pa
import pyarrow.compute as pc

from lungopacity.archive.containers import SHARD_SUFFIXES
from lungopacity.errors import UserError
from lungopacity.progress import Progress
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.storage import ObjectInfo, S3Store, Store, open_store, split_uri

log = logging.getLogger(__name__)

_ROWS_PER_TABLE = 10_000


@dataclass(frozen=True)
class Inventory:
    """Listed objects as a stream, which can be read once and is never whole in memory."""

    uri: str
    """The root that `image` is relative to."""
    tables: Iterator[pa.Table]
    """`PLAN_SCHEMA`, in any order."""


@dataclass(frozen=True)
class Archive:
    """A listed archive, small enough for memory."""

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


def list_archive(uri: str, on_listed: Callable[[int], None] | None = None) -> Inventory:
    """List the archive at `uri`: a prefix of loose objects and shards, or one object.

    `on_listed` is called with the number of objects found since the last call. Raises `UserError`
    if the place cannot be listed or holds nothing.
    """
    store = open_store(uri)
    objects = iter(store.list())
    first = next(objects, None)
    if first is None:
        empty = UserError(f"{store.uri}: nothing lies there; check the path or prefix")
        if isinstance(store, S3Store) and not store.prefix:
            raise empty  # a bucket has no parent, so it cannot be a single object
        parent, name = split_uri(uri)
        store = open_store(parent)
        first = store.head(name)
        if first is None:
            raise empty
    return Inventory(store.uri, _tables(chain([first], objects), on_listed))


def take_inventory(uri: str) -> Archive:
    """`list_archive` as a whole, sorted, with a progress display."""
    with Progress("Listing the images", unit="objects", quick=True) as progress:
        listed = list_archive(uri, progress.advance)
        objects = pa.concat_tables([PLAN_SCHEMA.empty_table(), *listed.tables])
    return Archive(listed.uri, objects.sort_by("image").combine_chunks())


def below(uri: str, root: str) -> str | None:
    """The key prefix under `root` of everything at `uri`; "" if both are the same place, None if
    `uri` is not below `root`. Both as in `Store.uri`."""
    prefix = f"{root.rstrip('/')}/"
    return f"{uri}/"[len(prefix) :] if f"{uri}/".startswith(prefix) else None


def without(
    inventory: Inventory, is_ours: Callable[[pa.ChunkedArray], pa.ChunkedArray], what: str
) -> Inventory:
    """The inventory without some of its objects. A log line counts them, if there are any.

    `is_ours`: from keys to booleans, true for those to leave out. `what`: ends the log line "3
    objects of ARCHIVE are left out, which …".
    """

    def others() -> Iterator[pa.Table]:
        objects = 0
        for table in inventory.tables:
            ours = is_ours(table["image"])
            objects += pc.sum(ours).as_py() or 0
            yield table.filter(pc.invert(ours))
        if objects:
            log.info("%d objects of %s are left out, which %s", objects, inventory.uri, what)

    return Inventory(inventory.uri, others())


def _tables(
    objects: Iterable[ObjectInfo], on_listed: Callable[[int], None] | None
) -> Iterator[pa.Table]:
    remaining = iter(objects)
    while piece := list(islice(remaining, _ROWS_PER_TABLE)):
        if on_listed is not None:
            on_listed(len(piece))
        yield plan_table(piece)


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
