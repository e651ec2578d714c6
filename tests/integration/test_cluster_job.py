"""The job as users run it at night: submitted to a running Ray cluster, over an archive in S3."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.dataset
import pytest

from lungopacity.results.query import query, runs
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sysconfig.get_path("scripts")) / "ray"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(s3_server, tmp_path_factory) -> Iterator[dict[str, str]]:
    """`ray start --head` of two CPUs, as an administrator starts one; gives the environment of one
    who submits to it. Ended by its pid: other Rays on the machine are left alone."""
    dashboard, agent = free_port(), free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "RAY_USAGE_STATS_ENABLED": "0",
        # The head's `python` runs the jobs.
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
        # `ray start` asks for a token by default, `ray job` gives none: both must be told alike.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("wb")
    head = subprocess.Popen(
        [
            *(str(RAY), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            f"--port={free_port()}",
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={free_port()}"),
        ],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        listed = [str(RAY), "job", "list", "--address", address]
        deadline = time.monotonic() + 90
        while subprocess.run(listed, env=environment, capture_output=True, timeout=60).returncode:
            assert head.poll() is None, "the cluster did not start"
            assert time.monotonic() < deadline, "the cluster does not answer"
            time.sleep(1)
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        # The head ends its own children; a signal to all of them at once would take it 30 s.
        head.terminate()
        try:
            head.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait(10)


def submit(cluster: dict[str, str], *job: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RAY), "job", "submit", "--working-dir", ".", "--", "python", *job],
        cwd=ROOT,
        env=cluster,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.timeout(300)
def test_a_submitted_job_screens_an_s3_archive_once_and_everyone_can_read_it(cluster, s3_uri):
    archive, model, results = (f"{s3_uri}/{name}" for name in ("archive", "model", "results"))
    store = open_store(archive)
    for number in range(20):
        store.write(f"loose/{number}.png", encoded(grey_film(number)))
    for shard in range(3):
        films = {f"{n}.png": encoded(grey_film(100 * shard + n)) for n in range(30)}
        store.write(f"shards/{shard}.tar", tar(films))
    store.write("broken.png", b"\x89PNG\r\n\x1a\n")
    write_tiny_model(model)

    options = ["--archive", archive, "--model", model, "--output", results, "--run-id", "night-1"]
    done = submit(cluster, "jobs/screen.py", *options)
    assert "run night-1 published" in done.stdout, done.stdout + done.stderr
    # The job's own exit code is 1, for the broken film; `ray job submit` says 1 for any failure.
    assert done.returncode == 1
    assert "corrupt_image: 1" in done.stdout

    (run,) = runs(results).to_pylist()
    assert (run["images"], run["ok"], run["failed"]) == (111, 110, 1)
    counted = query(
        results, "SELECT count(*) n, count(DISTINCT (image, member_index)) once FROM predictions"
    )
    assert counted.to_pylist() == [{"n": 111, "once": 111}]
    assert not [item.key for item in open_store(results).list("_work/")]

    again = submit(cluster, "jobs/screen.py", *options)
    assert "published already" in again.stdout + again.stderr
    assert runs(results).num_rows == 1


def test_published_parquet_needs_no_option_of_any_reader(ray_cluster, tmp_path):
    import lungopacity

    store = open_store(str(tmp_path / "archive"))
    for number in range(5):
        store.write(f"{number}.png", encoded(grey_film(number)))
    write_tiny_model(str(tmp_path / "model"))
    results = tmp_path / "results"
    result = lungopacity.screen(
        str(tmp_path / "archive"), str(tmp_path / "model"), str(results), run_id="one"
    )
    assert (result.images, result.exit_code) == (5, 0)
    folder = results / "predictions"
    assert len(pd.read_parquet(folder)) == 5
    assert pyarrow.dataset.dataset(folder, partitioning="hive").count_rows() == 5
    found = duckdb.sql(
        f"SELECT count(*), min(screened_on), sum(p_Normal) + sum(p_Lung_Opacity) "
        f"FROM '{folder}/**/*.parquet'"
    ).fetchall()
    ((count, screened_on, total),) = found
    assert count == 5
    started_at = runs(str(results)).to_pylist()[0]["started_at"]
    assert str(screened_on) == f"{started_at:%Y-%m-%d}"
    assert total == pytest.approx(5, abs=1e-5)
