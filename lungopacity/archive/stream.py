"""`read_images` as the first stage of a Ray Data pipeline, for training and for screening."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lungopacity import observe
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.decoder import DecoderStartError
from lungopacity.archive.names import Wanted
from lungopacity.archive.reading import ReadFigures, read_images
from lungopacity.errors import UserError, first_line, of_other_code
from lungopacity.runtime import (
    check_same_code,
    code_digest,
    leave_no_core,
    may_grow,
    quiet_about_remote_arguments,
    quiet_ray_data,
)
from lungopacity.runtime.ray_internals import errors_ray_data_ignores
from lungopacity.storage import Store, open_store
from lungopacity.storage.probe import check_node

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger(__name__)

OBJECTS_PER_TASK = 1024
"""Most loose objects of one task. A core is idle between two tasks, and the first films of a task
are decoded before any is scored: with 256, a light network scored a fifth less."""
_FEWEST_OBJECTS = 32
"""Fewest objects of one task, near the end."""
_EVEN_SHARDS = 4
"""If each reader has work for so many shards of the largest size, at most a fifth of the readers'
time is lost when all but one wait for the last shard."""
_SMALL_SHARD_BYTES = 8 << 20
"""Waiting for one reader of so small a shard costs less than the start of actors that would share
its films: each is a process of three seconds of CPU time."""
BLOCK_BYTES = 8 << 20
"""Size of blocks between stages. Ray's 128 MiB would keep thousands of images from the model."""
RETRIES = 3
"""Retries of a task or actor whose process dies. Ray Data would retry for ever."""

_NO_PROGRESS_S = 2 * 3600.0
"""A pipeline is given up if no stage takes or gives a block for so long. Ray's own half hour is
less than one huge shard may take."""
_NO_NODE_S = 12 * 3600.0
"""The same on a cluster that may grow: it may take hours to get a GPU or a spot node."""


def read_tasks(
    objects: pa.Table, readers: int = 1, most: int = OBJECTS_PER_TASK
) -> Iterator[pa.Table]:
    """Split rows of `PLAN_SCHEMA` into tasks of one shard, or of up to `most` loose objects.

    `readers`: how many tasks run at once. The largest shards come first, and the tasks of loose
    objects get smaller towards the end (Polychronopoulos & Kuck 1987), so that all readers finish
    together.
    """
    shards = objects.filter(objects["is_shard"]).sort_by([("source_size_bytes", "descending")])
    for row in range(shards.num_rows):
        yield shards.slice(row, 1)
    loose = objects.filter(pa.compute.invert(objects["is_shard"]))
    start = 0
    while start < loose.num_rows:
        share = (loose.num_rows - start) // (2 * readers)
        size = min(most, max(_FEWEST_OBJECTS, share))
        yield loose.slice(start, size)
        start += size


def divide_evenly(objects: pa.Table, readers: int) -> bool:
    """Whether so many readers can share the objects (`PLAN_SCHEMA`) without most of them waiting
    long for the last shards. Only one reader reads a shard."""
    shards = objects.filter(objects["is_shard"])["source_size_bytes"]
    largest = pa.compute.max(shards).as_py() or 0
    total = pa.compute.sum(objects["source_size_bytes"]).as_py() or 0
    return bool(largest <= _SMALL_SHARD_BYTES or largest * readers * _EVEN_SHARDS <= total)


def stream(
    tasks: Iterable[pa.Table],
    function: Callable[[pa.Table], Iterator[pa.Table]],
    block_bytes: int = BLOCK_BYTES,
    losses: int = 0,
    **options: Any,
) -> ray.data.Dataset:
    """A lazy dataset of the tables that `function` makes of each of `tasks`, each in a Ray task of
    one CPU. Tables are passed on in blocks of about `block_bytes`. `losses`: how many tasks of this
    and later stages may fail before the pipeline does. `options`: further ones of `map_batches`."""
    import ray

    quiet_ray_data()
    # from_blocks keeps a block for each table. Other sources merge small ones into one task, and
    # from_arrow first runs a Ray task for each, to get its schema.
    blocks = ray.data.from_blocks(list(tasks))
    # Set only for this dataset: the caller may have others.
    blocks.context.target_max_block_size = block_bytes
    blocks.context.max_errored_blocks = losses
    # Without this, Ray wraps what an actor raises, and reports it as an error of its own.
    blocks.context.raise_original_map_exception = True
    blocks.context.execution_no_progress_timeout_s = _NO_NODE_S if may_grow() else _NO_PROGRESS_S
    with quiet_about_remote_arguments():
        return blocks.map_batches(
            function,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            zero_copy_batch=True,
            max_retries=RETRIES,
            **options,
        )


def tables_of(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """Run a pipeline of `stream`, and yield its tables. Raises `UserError` if nothing moves for
    hours; of what a task raised, as `reason_of_loss` does, even where tasks may fail."""
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayTaskError

    def log_failed() -> None:
        while failed:
            log.warning("Ray lost a task (%s)", reason_of_loss(failed.pop()))

    failed: list[BaseException]
    try:
        with errors_ray_data_ignores() as failed:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield table
                log_failed()
            log_failed()
    except ExecutionTimeoutError as error:
        stages = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")]
        limit_s = dataset.context.execution_no_progress_timeout_s
        raise UserError(
            f"nothing moved in the pipeline for {limit_s / 3600:g} hours ({'; '.join(stages)}); "
            "on a cluster, see `ray status`: it may lack what a stage without active tasks "
            "waits for"
        ) from error
    except RayTaskError as error:
        reason_of_loss(error)
        raise


def reason_of_loss(error: BaseException) -> str:
    """The first line of an error that came from Ray, as of a lost node: reading again may help.
    Raises `UserError` for one that our own code raised or that tells of other code on a node, and
    any other error as it is: sound films would get `reader_crash`."""
    from ray.exceptions import RayError, RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    # Ray Data adds its own advice below the first line.
    message = first_line(cause)
    if isinstance(cause, UserError):
        raise UserError(message) from error
    other_code = of_other_code(error)
    if other_code is not None:
        raise UserError(other_code) from error
    # When an actor does not start, Ray keeps only the text of what our code raised.
    is_ours = getattr(cause, "actor_init_failed", False)
    if is_ours or not isinstance(cause, RayError):
        raise error
    return f"{type(cause).__name__}: {message}"


def stream_images(
    uri: str,
    tasks: Iterable[pa.Table],
    settings: ReadSettings,
    *,
    wanted: Wanted | None = None,
    block_bytes: int = BLOCK_BYTES,
    losses: int = 0,
) -> ray.data.Dataset:
    """A lazy dataset of `READ_SCHEMA` rows. Each of `tasks` becomes a Ray task of one CPU.
    `wanted`: see `read_images`. `block_bytes`, `losses`: see `stream`."""
    import ray

    shared, store, code = ray.put(wanted), open_store(uri), code_digest()

    def read(objects: pa.Table) -> Iterator[pa.Table]:
        check_same_code(code)
        yield from counted_images(store, objects, settings, wanted=ray.get(shared))

    return stream(tasks, read, block_bytes, losses)


def counted_images(
    store: Store,
    objects: pa.Table,
    settings: ReadSettings,
    *,
    wanted: Wanted | None = None,
) -> Generator[pa.Table, None, None]:
    """`read_images` in a Ray task, with its figures reported to Prometheus. Raises `UserError` if
    this node can read nothing of the store: its films are not missing."""
    from ray.exceptions import RaySystemError

    check_node(store, "films are read")
    leave_no_core()
    figures = ReadFigures()
    try:
        for table in read_images(store, objects, settings, wanted=wanted, figures=figures):
            yield table
            for name, value in figures.taken().items():
                observe.count(name, value)
    except DecoderStartError as error:
        # Ray retries a task that raises this kind of error, on another node if it can.
        raise RaySystemError(error) from error
