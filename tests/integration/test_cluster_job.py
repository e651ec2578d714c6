"""The job as users run it at night: submitted to a running Ray cluster, over an archive in S3."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.dataset
import pytest

from lungopacity.errors import NOTICE
from lungopacity.results.query import query, runs
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]


def on_cluster(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command with `cluster/local.sh`: a head, a second node, and the tests' S3 server."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [str(ROOT / "cluster" / "local.sh"), *command],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            # Bash heeds a signal when its command has ended: all of them get it. Then the nodes
            # are ended, and what was said until then tells what it hung at.
            os.killpg(process.pid, signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=50)
            pytest.fail(f"no end in 240 s:\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture
def usual_folder() -> Iterator[Path]:
    """For TMPDIR, and short: the paths of Ray's sockets are of 107 characters at most."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        yield Path(folder)


@pytest.mark.timeout(300)
def test_a_submitted_job_screens_an_s3_archive_once_and_everyone_can_read_it(
    s3_server, s3_uri, ray_cluster, usual_folder
):
    archive, model, results = (f"{s3_uri}/{name}" for name in ("archive", "model", "results"))
    store = open_store(archive)
    for number in range(20):
        store.write(f"loose/{number}.png", encoded(grey_film(number)))
    for shard in range(3):
        films = {f"{n}.png": encoded(grey_film(100 * shard + n)) for n in range(30)}
        store.write(f"shards/{shard}.tar", tar(films))
    store.write("broken.png", b"\x89PNG\r\n\x1a\n")
    write_tiny_model(model, is_compiled=True)

    options = f"--archive {archive} --model {model} --output {results} --run-id night-1"
    job = f"ray job submit --working-dir . -- python jobs/screen.py {options}"
    # Beside another Ray (`ray_cluster`), and after one that was started later and is gone by now:
    # the job joins neither.
    later = f"echo 127.0.0.1:1 >{usual_folder}/ray/ray_current_cluster"
    done = on_cluster(
        "bash",
        "-c",
        f"{later}; {job}; echo submitted: $?; exit 7",
        TMPDIR=str(usual_folder),
    )
    told = done.stdout + done.stderr
    assert done.returncode == 7, told
    assert "a Ray cluster of two nodes at http://127.0.0.1:" in done.stderr
    assert "run night-1 published" in done.stdout, told
    # The job's own exit code is 1, for the broken film; `ray job submit` says 1 for any failure.
    assert "submitted: 1" in done.stdout
    assert "corrupt_image: 1" in done.stdout

    (run,) = runs(results).to_pylist()
    assert (run["images"], run["ok"], run["failed"]) == (111, 110, 1)
    counted = query(
        results, "SELECT count(*) n, count(DISTINCT (image, member_index)) once FROM predictions"
    )
    assert counted.to_pylist() == [{"n": 111, "once": 111}]
    assert not [item.key for item in open_store(results).list("_work/")]
    assert not list(usual_folder.glob("ray.*"))


def test_without_a_command_it_says_how_it_is_used():
    done = on_cluster()
    assert done.returncode == 2
    assert "cluster/local.sh ray job submit --working-dir . --" in done.stderr
    assert done.stderr.endswith(f"{NOTICE}\n")


def test_published_parquet_needs_no_option_of_any_reader(ray_cluster, tmp_path):
    import lungopacity

    store = open_store(str(tmp_path / "archive"))
    for number in range(5):
        store.write(f"{number}.png", encoded(grey_film(number)))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
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
