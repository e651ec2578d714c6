"""Actors that take every CPU make Ray wait for ever. Ours must leave one to reading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lungopacity.storage import open_store
from tests.films import encoded, grey_film
from tests.models.tiny import write_tiny_model

SCRIPT = """
import logging, sys
import ray
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False,
         log_to_driver=False, logging_level=logging.ERROR)
import lungopacity
print(lungopacity.screen(*sys.argv[2:5]).ok)
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("cpus", [1, 5])
def test_screening_fits_itself_to_the_cluster(tmp_path: Path, cpus: int):
    store = open_store(str(tmp_path / "archive"))
    for number in range(600):
        store.write(f"{number}.png", encoded(grey_film(number % 7)))
    write_tiny_model(str(tmp_path / "model"))
    places = [str(tmp_path / name) for name in ("archive", "model", "results")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cpus), *places],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.stdout.splitlines()[-1:] == ["600"], done.stderr
