"""The Ray Data pipeline: read ▶ score ▶ part files. Nothing else moves images.

On CPUs, one task does all three steps for its share of the objects, so no pixels leave its process.
On GPUs, or if single shards are too large to share out evenly, each stage has its own processes.
Attempts write freely under `_work/`; `publish` picks one row for each image from what they wrote.
So a task that Ray runs twice does no harm, and the driver holds no images or rows, only a few
numbers for each part file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.stream import (
    BLOCK_BYTES,
    OBJECTS_PER_TASK,
    RETRIES,
    counted_images,
    divide_evenly,
    read_tasks,
    stream,
    stream_images,
    tables_of,
)
from lungopacity.errors import UserError
from lungopacity.models import TrainedModel
from lungopacity.radiograph import OUT_OF_DISTRIBUTION
from lungopacity.results.folder import attempt_prefix, published_meanwhile, read_run
from lungopacity.runtime import (
    capacity,
    check_same_code,
    code_digest,
    quiet_about_remote_arguments,
    worker_environment,
)
from lungopacity.screening.explanations import Explainer
from lungopacity.screening.parts import ROWS_PER_PART, WriteParts
from lungopacity.screening.resources import ScoringResources
from lungopacity.screening.scoring import ScoreImages
from lungopacity.storage import Store, open_store

if TYPE_CHECKING:
    import ray.data

_MODELS_A_WRITER = 8
_LARGEST_BATCH_BYTES = 64 << 20
"""Of pixels. Each reading task holds two such batches, and Ray's object store holds several per
task."""


def screen_objects(
    archive_uri: str,
    objects: pa.Table,
    model: TrainedModel,
    settings: ReadSettings,
    results: Store,
    run_id: str,
    resources: ScoringResources,
    batch_size: int,
    explainer: Explainer | None,
    precision: str,
    *,
    losses: int = 0,
    most: int = OBJECTS_PER_TASK,
) -> Iterator[Counter[str]]:
    """Screen the objects of `PLAN_SCHEMA`. Yields, for each part file that was written, its counts
    of images (`ok`, `rejected`, `failed`) and of finished `objects`.

    `explainer`: draws a picture of each positive film. `precision`: see `Scorer`. `losses`: see
    `stream`; the objects of a lost task have no rows. `most`: at most so many loose objects per
    task. Raises `UserError` if part files cannot be written, or if nothing moves for hours.
    """
    import ray

    attempt = attempt_prefix(run_id)
    unlike = OUT_OF_DISTRIBUTION in settings.reject_quality
    scoring = ray.put(model), resources, unlike, explainer, precision
    cpus = int(capacity()["CPU"])
    if resources.apart or not divide_evenly(objects, cpus):
        tasks = read_tasks(objects, cpus, most)
        size = settings.preprocessing.image_size
        settings, block_bytes = _whole_batches(settings, batch_size * size**2, batch_size)
        images = stream_images(archive_uri, tasks, settings, block_bytes=block_bytes, losses=losses)
        parts = _apart(images, scoring, results, attempt, resources, batch_size)
    else:
        parts = stream(
            read_tasks(objects, cpus, most),
            _together(archive_uri, settings, scoring, results, attempt, batch_size),
            # Each report is a block of its own. Otherwise the driver would hear nothing of a large
            # shard before its end.
            block_bytes=1,
            losses=losses,
            runtime_env=worker_environment(use_gpu=False),
        )
    for part in tables_of(parts):
        for row in part.to_pylist():
            error = row.pop("error")
            if error is not None:
                if read_run(results, run_id) is not None:
                    raise published_meanwhile(run_id)
                raise UserError(error)
            yield Counter(row)


def _whole_batches(
    settings: ReadSettings, batch_bytes: int, batch_size: int
) -> tuple[ReadSettings, int]:
    """Read settings for which a block holds whole batches, and the `block_bytes` to use.

    Ray shares no block between two tasks. It would give the model two blocks of 192 films as
    batches of 256 and 128, which costs a fifth more forward passes.
    """
    if batch_bytes > _LARGEST_BATCH_BYTES:
        return settings, BLOCK_BYTES
    batches = -(-BLOCK_BYTES // batch_bytes)
    # Ray hands a block on once it is larger than this, and splits one that is half as large again.
    return replace(settings, rows_per_table=batch_size), int((batches - 0.2) * batch_bytes)


def _together(
    archive_uri: str,
    settings: ReadSettings,
    scoring: tuple[Any, ...],
    results: Store,
    attempt: str,
    batch_size: int,
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """The function of a task that reads, scores and writes its objects, and yields the reports of
    `WriteParts`. `scoring`: arguments of `ScoreImages`."""
    store, settings = open_store(archive_uri), replace(settings, rows_per_table=batch_size)
    code = code_digest()

    def screen(objects: pa.Table) -> Iterator[pa.Table]:
        check_same_code(code)
        score, write = _scorer_of(attempt, scoring), WriteParts(results, attempt)
        scored: list[pa.Table] = []
        # The next films are fetched meanwhile, but not decoded: there are as many tasks as cores,
        # and two jobs that alternate on one core evict each other's data from its caches.
        with closing(counted_images(store, objects, settings)) as tables:
            for table in tables:
                scored.append(score(table))
                if sum(rows.num_rows for rows in scored) >= ROWS_PER_PART:
                    report = write(pa.concat_tables(scored))
                    yield report
                    if report["error"][0].is_valid:
                        return  # the driver stops the run
                    scored = []
        if scored:
            yield write(pa.concat_tables(scored))

    return screen


_kept: tuple[str, ScoreImages] | None = None
"""The attempt that this process last worked for, and its scorer."""


def _scorer_of(attempt: str, scoring: tuple[Any, ...]) -> ScoreImages:
    """The scorer of this process, kept for its next task."""
    global _kept
    if _kept is None or _kept[0] != attempt:
        _kept = None  # freed first: two scorers may not fit into memory
        model, resources, *rest = scoring
        # There are as many tasks as CPUs.
        _kept = attempt, ScoreImages(model, replace(resources, threads=1), *rest)
    return _kept[1]


def _apart(
    images: ray.data.Dataset,
    scoring: tuple[Any, ...],
    results: Store,
    attempt: str,
    resources: ScoringResources,
    batch_size: int,
) -> ray.data.Dataset:
    """Score and write the images in separate actors; the dataset holds the reports of
    `WriteParts`. `scoring`: arguments of `ScoreImages`."""
    import ray

    with quiet_about_remote_arguments():
        scored = images.map_batches(
            ScoreImages,
            fn_constructor_args=(*scoring, code_digest()),
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=resources.actor_cpus,
            num_gpus=resources.actor_gpus,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, initial_size=resources.first_actors, max_size=resources.max_actors
            ),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
            runtime_env=worker_environment(resources.use_gpu),
        )
        # Actors, because Ray ends a worker that had no task for a second, and starting a new one
        # takes two seconds of CPU time: as tasks, writers took a fifth of a small machine. They
        # reserve no CPU: they wait on storage, and must run however busy the other stages are.
        return scored.map_batches(
            WriteParts,
            fn_constructor_args=(results, attempt),
            batch_size=ROWS_PER_PART,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=-(-resources.max_actors // _MODELS_A_WRITER)
            ),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
