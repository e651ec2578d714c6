"""The limit of a machine: one process a core reads, decodes and scores, and nothing else happens.

It reads, decodes and computes by the functions that screening calls, so what screening takes longer
is the cost of the framework around them, of the rows that it writes, and of its safeguards.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.reading import read_files
from lungopacity.archive.stream import read_tasks
from lungopacity.errors import ImageError
from lungopacity.models import TrainedModel, load_model
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import decode_radiographs
from lungopacity.results.schema import class_column

WHOLE, READ_HALF, SCORE_HALF = "bare", "bare-read", "bare-score"
"""The loop, and its halves: reading and decoding alone, and the forward pass alone."""
_OBJECTS_PER_TURN = 128


def run(way: str, images: str, model: str, output: str, batch_size: int) -> None:
    """Score every image and write a Parquet file a process: image, p_…, scored_at (seconds).

    way: one of the three above. images, model: URIs. output: a local folder.
    """
    processes = len(os.sched_getaffinity(0))
    archive = take_inventory(images)
    turns = [
        part for table in read_tasks(archive.objects) for part in _parts(table, _OBJECTS_PER_TURN)
    ]
    films = archive.objects.num_rows
    if way == SCORE_HALF and any(archive.objects["is_shard"].to_pylist()):
        settings = ReadSettings(load_model(model).spec.preprocessing)
        films = sum(1 for turn in turns for _ in read_files(archive.store, turn, settings))
    context = multiprocessing.get_context("spawn")
    taken = context.Value("q", 0)
    workers = [
        context.Process(
            target=_process,
            args=(
                way,
                archive.uri,
                turns,
                films,
                model,
                f"{output}/{rank}.parquet",
                batch_size,
                taken,
            ),
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"a process of the bare loop ended with {worker.exitcode}")


def _parts(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def _process(
    way: str,
    uri: str,
    turns: Sequence[pa.Table],
    count: int,
    model: str,
    output: str,
    batch_size: int,
    taken: Any,
) -> None:
    trained = load_model(model)
    scorer = Scorer(trained, threads=1)
    films = _films(uri, turns, trained, taken)
    if way == SCORE_HALF:
        films = _same_films(uri, turns, count, trained, taken)
    tables = []
    while batch := list(islice(films, batch_size)):
        names = [name for name, _ in batch]
        if way == READ_HALF:
            columns: dict[str, Any] = {}
        else:
            scores = scorer.scores(np.stack([pixels for _, pixels in batch]), batch_size)
            scorer.out_of_distribution(scores.features_NF)
            probabilities_NK = scorer.probabilities(scores.logits_NK)
            columns = {
                class_column("p", name): probabilities_NK[:, index]
                for index, name in enumerate(trained.spec.class_names)
            }
        now = np.full(len(names), time.time())
        tables.append(pa.table({"image": names, **columns, "scored_at": now}))
    if tables:
        pq.write_table(pa.concat_tables(tables), output)


def _films(
    uri: str, turns: Sequence[pa.Table], model: TrainedModel, taken: Any
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """The films that decode. A turn goes to whichever process is free: no core waits at the end."""
    from lungopacity.storage import open_store

    store, settings = open_store(uri), ReadSettings(model.spec.preprocessing)
    for turn in _turns(turns, taken):
        for name, data in read_files(store, turn, settings):
            # What cannot be read is passed over, as whole files or as single frames.
            with suppress(ImageError):
                for found in decode_radiographs(
                    data, limits=settings.limits, at_least=settings.preprocessing.at_least
                ):
                    if not isinstance(found, ImageError):
                        yield name, settings.preprocessing.square(found.pixels)


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
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """As many films as there are, of the pixels of the first few."""
    first = list(islice(_films(uri, turns[:1], model, multiprocessing.Value("q", 0)), 64))
    while True:
        with taken.get_lock():
            left = count - taken.value
            taken.value += len(first)
        if left <= 0 or not first:
            return
        yield from first[:left]


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    run(given["way"], given["images"], given["model"], given["output"], given["batch_size"])
