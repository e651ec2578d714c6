"""Actors that take every CPU make Ray wait for ever. Ours must leave one to reading.

Of one large shard no two CPUs have their share, and then the model has actors of its own. What
others take is waited for, and that is told."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lungopacity
from lungopacity import progress
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

_FILMS = 150
SCRIPT = """
import logging, sys
import ray
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False,
         log_to_driver=False, logging_level=logging.ERROR)
import lungopacity
from lungopacity import progress
from lungopacity.archive import stream
from lungopacity.runtime.resources import cpus_here

stream._SMALL_SHARD_BYTES = 0  # the shard here stands for a large one

@ray.remote(num_cpus=int(sys.argv[1]))
class Other:
    def is_there(self):
        return True

class UntilTold(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
        if "free in the Ray cluster" in record.getMessage():
            ray.kill(other)

print(ray.get(ray.remote(cpus_here).remote()))
other = Other.remote()
ray.get(other.is_there.remote())
progress._STILL_S = 0.5
progress.log.setLevel(logging.INFO)
progress.log.addHandler(UntilTold())
print(lungopacity.screen(*sys.argv[2:5]).ok)
"""


@pytest.mark.parametrize(("cpus", "in_a_shard"), [(1, 120), (5, 0)])
def test_screening_fits_itself_to_the_cluster(tmp_path: Path, cpus: int, in_a_shard: int):
    store = open_store(str(tmp_path / "archive"))
    films = {f"{number}.png": encoded(grey_film(number % 7)) for number in range(_FILMS)}
    names = list(films)
    for name in names[in_a_shard:]:
        store.write(name, films[name])
    if in_a_shard:
        store.write("x.tar", tar({name: films[name] for name in names[:in_a_shard]}))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    places = [str(tmp_path / name) for name in ("archive", "model", "results")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cpus), *places],
        capture_output=True,
        text=True,
    )
    told = done.stdout.splitlines()
    assert told[-1:] == [str(_FILMS)], done.stderr
    of = "" if in_a_shard else f" of {_FILMS}"
    free = f"; free in the Ray cluster: 0 of {cpus} CPU"
    # In a container with a limit, Ray knows of fewer than the process sees.
    assert told[0] == str(min(cpus, len(os.sched_getaffinity(0))))
    assert re.match(rf"Screening: 0{of} images, no progress for \d+ s{free}", told[2]), told


def test_what_training_and_evaluation_wait_for_is_told(ray_cluster, tmp_path, monkeypatch, caplog):
    # So short that every wait for a new process is one.
    monkeypatch.setattr(progress, "_STILL_S", 0.02)
    caplog.set_level(logging.INFO)
    write_phantom_archive(
        open_store(str(tmp_path)), PhantomSettings(images=40, image_size=96, shard_fraction=0)
    )
    images, labels, model = [f"{tmp_path}/archive"], f"{tmp_path}/labels.csv", f"{tmp_path}/model"
    small = {"model_settings.channels": "[8,16]", "model_settings.convolutions": "[1,1]"}
    lungopacity.train(images, labels, model, image_size=32, epochs=1, settings=small)
    lungopacity.evaluate(model, images, labels, f"{tmp_path}/report", split="all")
    told = [line.split(":")[0] for line in caplog.messages if "free in the Ray cluster" in line]
    assert {"Reading images", "Finding where the training films lie", "Scoring"} <= set(told)
