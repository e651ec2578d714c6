"""The Ray Data pipeline: read ▶ score ▶ part files. Nothing else moves images.

On CPUs one task does all three for some of the objects, so that no pixel leaves its process. On
GPUs, and where single shards are too large for that, each stage has processes of its own. Attempts
write freely under `_work/`; `publish` makes the truth of what they wrote. So a task that Ray runs
twice does no harm, and the driver holds no image and no row: a few numbers a part file.
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
from lungopacity.results.folder import attempt_prefix
from lungopacity.runtime import capacity, quiet_about_remote_arguments, worker_environment
from lungopacity.screening.explanations import Explainer
from lungopacity.screening.parts import ROWS_PER_PART, WriteParts
from lungopacity.screening.resources import ScoringResources
from lungopacity.screening.scoring import ScoreImages
from lungopacity.storage import Store, open_store

if TYPE_CHECKING:
    import ray.data

_MODELS_A_WRITER = 8
_LARGEST_BATCH_BYTES = 64 << 20
"""Of pixels. Each reading task holds two such, and Ray's store several of each task."""


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
    """Screen the objects of `PLAN_SCHEMA`; yields, for each part file that has landed, its counts
    of images (`ok`, `rejected`, `failed`) and of finished `objects`. `explainer`: positive films
    get pictures. `precision`: see `Scorer`. `losses`: see `stream`; what is lost has no rows.
    `most`: loose objects that are a task, and are lost together.

    Raises `UserError` where part files cannot be written, or where nothing moves for hours.
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
            # Each report by itself: of a large shard, the driver would hear at its end alone.
            block_bytes=1,
            losses=losses,
            runtime_env=worker_environment(use_gpu=False),
        )
    for part in tables_of(parts):
        for row in part.to_pylist():
            error = row.pop("error")
            if error is not None:
                raise UserError(error)
            yield Counter(row)


def _whole_batches(
    settings: ReadSettings, batch_bytes: int, batch_size: int
) -> tuple[ReadSettings, int]:
    """How to read so that a block holds whole batches, and its `block_bytes`. Else Ray would give
    the model two blocks of 192 films as batches of 256 and 128, for it shares no block between two
    tasks: a fifth more forward passes."""
    if batch_bytes > _LARGEST_BATCH_BYTES:
        return settings, BLOCK_BYTES
    batches = -(-BLOCK_BYTES // batch_bytes)
    # Ray gives a block on once it has more bytes than this; of half as many more, it cuts it.
    return replace(settings, rows_per_table=batch_size), int((batches - 0.2) * batch_bytes)


def _together(
    archive_uri: str,
    settings: ReadSettings,
    scoring: tuple[Any, ...],
    results: Store,
    attempt: str,
    batch_size: int,
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """What a task does with some of the objects: read, score and write them. Gives the reports of
    `WriteParts`. `scoring`: of `ScoreImages`."""
    store, settings = open_store(archive_uri), replace(settings, rows_per_table=batch_size)

    def screen(objects: pa.Table) -> Iterator[pa.Table]:
        score, write = _scorer_of(attempt, scoring), WriteParts(results, attempt)
        scored: list[pa.Table] = []
        # What comes next is fetched meanwhile, but not decoded: as many tasks run as there are
        # cores, and two that take turns on one drive each other out of its caches.
        with closing(counted_images(store, objects, settings)) as tables:
            for table in tables:
                scored.append(score(table))
                if sum(rows.num_rows for rows in scored) >= ROWS_PER_PART:
                    report = write(pa.concat_tables(scored))
                    yield report
                    if report["error"][0].is_valid:
                        return  # the driver will stop all
                    scored = []
        if scored:
            yield write(pa.concat_tables(scored))

    return screen


_kept: tuple[str, ScoreImages] | None = None
"""The attempt that this process works for, and its scorer."""


def _scorer_of(attempt: str, scoring: tuple[Any, ...]) -> ScoreImages:
    """Of this process, kept for its next task."""
    global _kept
    if _kept is None or _kept[0] != attempt:
        _kept = None  # two need not fit into memory
        model, resources, *rest = scoring
        # As many tasks run as there are CPUs.
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
    """Reports of part files of the images, scored and written by actors of their own."""
    import ray

    with quiet_about_remote_arguments():
        scored = images.map_batches(
            ScoreImages,
            fn_constructor_args=scoring,
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
        # Actors, for Ray ends a worker that had no task for a second, and a new one takes two
        # seconds of CPU time: as tasks, these cost a fifth of a small machine. No CPU of their own:
        # they wait on storage, and must run however busy the other stages are.
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
