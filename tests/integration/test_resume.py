"""A run killed in its middle goes on under its id, and publishes each image once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lungopacity.results.query import query
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

LOOSE, SHARDS, MEMBERS = 1500, 4, 200


@pytest.mark.timeout(280)
def test_a_killed_run_goes_on_under_its_id_and_loses_nothing(tmp_path: Path):
    archive = open_store(str(tmp_path / "archive"))
    film = encoded(grey_film())
    for number in range(LOOSE):
        archive.write(f"{number:04d}.png", film)
    for shard in range(SHARDS):
        archive.write(f"{shard}.tar", tar({f"{n}.png": film for n in range(MEMBERS)}))
    write_tiny_model(str(tmp_path / "model"), image_size=96)
    results = tmp_path / "results"
    command = [
        *(sys.executable, "-m", "lungopacity.cli", "screen", "--run-id", "night"),
        *("--archive", str(tmp_path / "archive"), "--model", str(tmp_path / "model")),
        *("--output", str(results)),
    ]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(results.glob("_work/night/attempt=*/*.parquet")):
            assert killed.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        # Ray's own processes end by themselves when their driver is gone.
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (results / "runs").exists()

    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "taken up again" in again.stderr
    still = int(again.stderr.split(" objects are still to do")[0].split()[-3])
    assert 0 < still < LOOSE + SHARDS
    answer = query(
        str(results),
        "SELECT count(*) AS images, count(DISTINCT (image, member_index)) AS once, "
        "count(*) FILTER (status = 'ok') AS ok FROM predictions",
    ).to_pylist()
    images = LOOSE + SHARDS * MEMBERS
    assert answer[0]["images"] == answer[0]["once"] == answer[0]["ok"] == images
    assert not (results / "_work").exists()
