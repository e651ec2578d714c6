"""The limit of a machine: one process for each core reads, decodes and scores, and does no more.

With a GPU, these processes decode, and all feed one scorer. The loop reads, decodes and computes by
the same functions as screening. So the additional time of screening is the cost of the framework
around them, of the rows that it writes, and of its safeguards.

A shard is read by one process, as in screening: if there are fewer shards than cores, some cores
have nothing to do.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.content import ReadSettings, shown_films
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.reading import read_files
from lungopacity.archive.stream import read_tasks
from lungopacity.errors import ImageError
from lungopacity.models import TrainedModel, load_model
from lungopacity.models.scorer import FLOAT32, Scorer
from lungopacity.results.schema import class_column
from lungopacity.storage import open_store

WHOLE, READ_HALF, SCORE_HALF = "bare", "bare-read", "bare-score"
"""The loop, and its halves: reading and decoding alone, and the forward pass alone."""
_OBJECTS_PER_TURN = 128
_TURNS_A_PROCESS = 4
_FILMS_HELD = 64
"""How many films the forward pass alone scores again and again."""

Name = tuple[str, str | None, int | None]
"""Key, member of a shard, and frame."""
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class BareTask:
    """What to score, and by which of the three ways."""

    way: str
    images: str
    """URI."""
    model: str
    """URI."""
    output: str
    """A local folder."""
    batch_size: int
    use_gpu: bool = False
    precision: str = FLOAT32
    """See `Scorer`."""
    films: int = 0
    """How many films the forward pass alone scores."""


def run(task: BareTask, *, one_scorer: bool | None = None) -> None:
    """Score every image and write Parquet files: image, member, frame, p_…, scored_at (seconds).

    `one_scorer`: this process scores what the others decode; None: only on a GPU.
    """
    if one_scorer is None:
        one_scorer = task.use_gpu
    processes = len(os.sched_getaffinity(0))
    archive = take_inventory(task.images)
    turns = _turns_of(archive.objects, processes)
    context = multiprocessing.get_context("spawn")
    taken = context.Value("q", 0)
    room = None
    if one_scorer and task.way == WHOLE:
        size = load_model(task.model).spec.preprocessing.image_size
        room = _Room(context, 2 * processes, task.batch_size, size)
    elif one_scorer and task.way == SCORE_HALF:
        processes = 1
    workers = [
        context.Process(
            target=_process,
            args=(task, archive.uri, turns, taken, room, f"{task.output}/{rank}.parquet"),
            daemon=True,
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    if room is not None:
        _score_what_comes(task, room, workers)
    for worker in workers:
        worker.join()
    _check(workers)


def _turns_of(objects: pa.Table, processes: int) -> list[pa.Table]:
    # Small enough that every process gets some.
    rows = math.ceil(objects.num_rows / (_TURNS_A_PROCESS * processes))
    rows = max(1, min(_OBJECTS_PER_TURN, rows))
    return [
        table.slice(start, rows)
        for table in read_tasks(objects)
        for start in range(0, table.num_rows, rows)
    ]


def _check(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.exitcode:
            raise SystemExit(f"a process of the bare loop ended with exit code {worker.exitcode}")


class _Room:
    """Shared memory for batches on their way from the processes that decode to the one scorer."""

    def __init__(self, context: Any, batches: int, batch_size: int, size: int) -> None:
        self._shape = (batches, batch_size, size, size)
        self._memory = context.RawArray("B", math.prod(self._shape))
        self.free, self.full = context.Queue(), context.Queue()
        for slot in range(batches):
            self.free.put(slot)

    def pixels(self) -> Pixels:
        """(batches, batch_size, size, size) uint8: a view."""
        return np.frombuffer(self._memory, np.uint8).reshape(self._shape)


def _process(
    task: BareTask,
    uri: str,
    turns: Sequence[pa.Table],
    taken: Any,
    room: _Room | None,
    output: str,
) -> None:
    trained = load_model(task.model)
    films = _films(uri, turns, trained, taken)
    if room is not None:
        pixels = room.pixels()
        for names, pixels_NHW in _batches(films, task.batch_size):
            slot = room.free.get()
            pixels[slot, : len(names)] = pixels_NHW
            room.full.put((slot, names))
        room.full.put(None)
        return
    if task.way == SCORE_HALF:
        films = _same_films(uri, turns, task.films, trained, taken)
    scorer = None if task.way == READ_HALF else _scorer(trained, task)
    _write([_scored(scorer, *batch) for batch in _batches(films, task.batch_size)], output)


def _score_what_comes(task: BareTask, room: _Room, workers: Sequence[Any]) -> None:
    scorer = _scorer(load_model(task.model), task)
    pixels, tables = room.pixels(), []
    decoding = len(workers)
    while decoding:
        try:
            came = room.full.get(timeout=1)
        except queue.Empty:
            _check(workers)
            continue
        if came is None:
            decoding -= 1
            continue
        slot, names = came
        tables.append(_scored(scorer, names, pixels[slot, : len(names)]))
        room.free.put(slot)
    _write(tables, f"{task.output}/scored.parquet")


def _scorer(trained: TrainedModel, task: BareTask) -> Scorer:
    return Scorer(trained, use_gpu=task.use_gpu, threads=1, precision=task.precision)


def _scored(scorer: Scorer | None, names: Sequence[Name], pixels_NHW: Pixels) -> pa.Table:
    columns: dict[str, Any] = {}
    if scorer is not None:
        scores = scorer.scores(pixels_NHW, len(pixels_NHW))
        scorer.out_of_distribution(scores.features_NF)
        probabilities_NK = scorer.probabilities(scores.logits_NK)
        columns = {
            class_column("p", name): probabilities_NK[:, index]
            for index, name in enumerate(scorer.model.spec.class_names)
        }
    images, members, frames = zip(*names, strict=True)
    return pa.table(
        {
            "image": pa.array(images, pa.string()),
            "member": pa.array(members, pa.string()),
            "frame": pa.array(frames, pa.int32()),
            **columns,
            "scored_at": np.full(len(names), time.time()),
        }
    )


def _write(tables: Sequence[pa.Table], output: str) -> None:
    if tables:
        pq.write_table(pa.concat_tables(tables), output)


def _batches(
    films: Iterator[tuple[Name, Pixels]], batch_size: int
) -> Iterator[tuple[list[Name], Pixels]]:
    while batch := list(islice(films, batch_size)):
        yield [name for name, _ in batch], np.stack([pixels for _, pixels in batch])


def _films(
    uri: str, turns: Sequence[pa.Table], model: TrainedModel, taken: Any
) -> Iterator[tuple[Name, Pixels]]:
    """The films that can be decoded. Each turn goes to whichever process is free, so that no core
    is idle at the end."""
    store, settings = open_store(uri), ReadSettings(model.spec.preprocessing)
    preprocessing = settings.preprocessing
    for turn in _turns(turns, taken):
        for image, member, data in read_files(store, turn, settings):
            # Whole files and single frames that cannot be read are skipped.
            with suppress(ImageError):
                for found in shown_films(data, settings):
                    if not isinstance(found, ImageError):
                        name = (image, member, found.film.frame)
                        yield name, preprocessing.pad(preprocessing.fit(found.shown))


def _turns(turns: Sequence[pa.Table], taken: Any) -> Iterator[pa.Table]:
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(turns):
            return
        yield turns[number]


def _same_films(
    uri: str, turns: Sequence[pa.Table], count: int, model: TrainedModel, taken: Any
) -> Iterator[tuple[Name, Pixels]]:
    """`count` films over all processes: the first few that can be decoded, again and again."""
    alone = multiprocessing.Value("q", 0)
    first = list(islice(_films(uri, turns, model, alone), _FILMS_HELD))
    while first:
        with taken.get_lock():
            left = count - taken.value
            taken.value += len(first)
        if left <= 0:
            return
        yield from first[:left]


if __name__ == "__main__":
    run(BareTask(**json.loads(Path(sys.argv[1]).read_text())))
