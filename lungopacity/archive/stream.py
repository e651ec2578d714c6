"""`read_images` as the first stage of a Ray Data pipeline, for training and for screening alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from lungopacity import observe
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.reading import ReadFigures, read_images
from lungopacity.runtime import quiet_ray_data
from lungopacity.storage import open_store

if TYPE_CHECKING:
    import ray.data

_OBJECTS_PER_TASK = 256
"""Loose objects a task: enough that its ~10 ms of start do not count, few enough to spread."""
_BLOCK_BYTES = 8 << 20
"""Blocks between stages. Ray's 128 MiB would hold thousands of images back from the model."""


def read_tasks(objects: pa.Table) -> Iterator[pa.Table]:
    """Split rows of `PLAN_SCHEMA` into tasks: a shard each, or up to 256 loose objects."""
    shards = objects.filter(objects["is_shard"])
    for row in range(shards.num_rows):
        yield shards.slice(row, 1)
    loose = objects.filter(pa.compute.invert(objects["is_shard"]))
    for start in range(0, loose.num_rows, _OBJECTS_PER_TASK):
        yield loose.slice(start, _OBJECTS_PER_TASK)


def stream_images(
    uri: str,
    tasks: Iterable[pa.Table],
    settings: ReadSettings,
    *,
    wanted: frozenset[str] | None = None,
) -> ray.data.Dataset:
    """A lazy dataset of `READ_SCHEMA` rows. Each of `tasks` becomes one Ray task of one CPU."""
    import ray

    quiet_ray_data()
    ray.data.DataContext.get_current().target_max_block_size = _BLOCK_BYTES
    shared, store = ray.put(wanted), open_store(uri)

    def read(objects: pa.Table) -> Iterator[pa.Table]:
        names = ray.get(shared)
        figures = ReadFigures()
        for table in read_images(store, objects, settings, wanted=names, figures=figures):
            yield table
            for name, value in figures.taken().items():
                observe.count(name, value)

    # from_blocks keeps one block a table, where other sources merge small ones into one task, and
    # from_arrow first runs a Ray task for each, to ask for its schema.
    return ray.data.from_blocks(list(tasks)).map_batches(
        read, batch_size=None, batch_format="pyarrow", num_cpus=1, zero_copy_batch=True
    )
