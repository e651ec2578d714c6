"""How the objects of a plan are divided among the readers."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest
from ray.exceptions import RaySystemError

from lungopacity.archive import decoder
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.stream import counted_images, divide_evenly, read_tasks
from lungopacity.radiograph import Preprocessing
from lungopacity.results.schema import PLAN_SCHEMA


def plan(loose: int = 0, shards: tuple[int, ...] = ()) -> pa.Table:
    """`loose` objects of 1 kB and shards of so many kB, mixed."""
    sizes = [*((size, True) for size in shards), *[(1, False)] * loose]
    rows = [
        {"image": f"{n:05d}", "source_size_bytes": kilobytes * 1000, "is_shard": is_shard}
        for n, (kilobytes, is_shard) in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


@pytest.mark.parametrize("readers", [1, 2, 16])
@pytest.mark.parametrize("loose", [0, 1, 31, 33, 256, 7629])
def test_every_object_is_in_one_task(loose: int, readers: int):
    objects = plan(loose, shards=(5, 900, 40))
    tasks = list(read_tasks(objects, readers))
    named = [name for task in tasks for name in task["image"].to_pylist()]
    assert sorted(named) == objects["image"].to_pylist()
    assert [task["source_size_bytes"].to_pylist() for task in tasks[:3]] == [
        [900_000],
        [40_000],
        [5_000],
    ]


def test_tasks_of_loose_objects_shrink_toward_the_end():
    sizes = [task.num_rows for task in read_tasks(plan(7629), 2)]
    assert sizes[0] == 1024
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 32
    # If a free reader takes the next task, none works longer than the smallest task.
    busy = [0, 0]
    for size in sizes:
        busy[busy.index(min(busy))] += size
    assert max(busy) - min(busy) <= 32


@pytest.mark.parametrize("most", [1, 64])
def test_tasks_have_at_most_the_given_number_of_objects(most: int):
    sizes = [task.num_rows for task in read_tasks(plan(1000, shards=(5,)), 2, most)]
    assert sum(sizes) == 1001
    assert max(sizes) == most


def test_a_few_hundred_objects_are_shared_among_all_cpus():
    sizes = [task.num_rows for task in read_tasks(plan(600), 16)]
    assert sum(sizes) == 600
    assert len(sizes) >= 16


def test_shards_that_cannot_be_shared_evenly_are_recognised():
    assert divide_evenly(plan(7629), 16)
    assert divide_evenly(plan(0, shards=(50_000,) * 8), 2)
    assert not divide_evenly(plan(0, shards=(50_000,) * 7), 2)
    assert not divide_evenly(plan(0, shards=(50_000,) * 8), 16)
    assert not divide_evenly(plan(300, shards=(50_000,)), 2)
    assert divide_evenly(plan(350_000, shards=(50_000,)), 2)
    assert divide_evenly(plan(0, shards=(0, 0)), 2)  # sizes that nobody told
    # For a shard of some hundred films, no actors are started.
    assert divide_evenly(plan(0, shards=(8_000,)), 16)
    assert not divide_evenly(plan(0, shards=(9_000,)), 16)


def test_a_task_whose_decoder_does_not_start_is_left_to_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray retries a task only for an error of Ray's own."""
    (tmp_path / "a.png").write_bytes(b"x")
    archive = take_inventory(str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(decoder, "_idle", {})
    settings = ReadSettings(Preprocessing(image_size=32))
    with pytest.raises(RaySystemError, match=r"process does not start \(No such file"):
        list(counted_images(archive.store, archive.objects, settings))
