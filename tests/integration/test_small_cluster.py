"""Actors that take every CPU make Ray wait for ever. Ours must leave one to reading.

Of one large shard no two CPUs have their share, and then the model has actors of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
print(lungopacity.screen(*sys.argv[2:5]).ok)
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("cpus", "in_a_shard"), [(1, 0), (1, 120), (5, 120)])
def test_screening_fits_itself_to_the_cluster(tmp_path: Path, cpus: int, in_a_shard: int):
    store = open_store(str(tmp_path / "archive"))
    films = {f"{number}.png": encoded(grey_film(number % 7)) for number in range(_FILMS)}
    names = list(films)
    for name in names[in_a_shard:]:
        store.write(name, films[name])
    if in_a_shard:
        store.write("x.tar", tar({name: films[name] for name in names[:in_a_shard]}))
    write_tiny_model(str(tmp_path / "model"))
    places = [str(tmp_path / name) for name in ("archive", "model", "results")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cpus), *places],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout.splitlines()[-1:] == [str(_FILMS)], done.stderr
