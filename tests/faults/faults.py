"""The faults of screening, and the list of all faults. Each function breaks one run, once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lungopacity.results.query import query
from lungopacity.storage import open_store
from tests.faults.scene import LOOSE, Outcome, Scene, processes_of, wait_for
from tests.faults.training import elastic_node_lost, training_rank_killed
from tests.films import encoded, grey_film

Trial = Callable[[Scene], Outcome]
APART = ("--model-actors", "1")
"""Reading, scoring and writing each in processes of their own, as on GPUs."""


def _kill(job: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGKILL)


def driver_killed_while_reading(scene: Scene, seed: int = 0) -> Outcome:
    """When a random number of objects has been requested."""
    moment = random.Random(seed).randrange(10, LOOSE)
    with scene.trial() as outcome:
        job = scene.start()
        wait_for(
            lambda: len(scene.fetched()) >= moment or job.poll() is not None, "objects are fetched"
        )
        _kill(job)
    return outcome


def _killed_at_put(scene: Scene, part: str, *, after: bool) -> Outcome:
    struck = threading.Event()
    with scene.trial() as outcome:
        job = scene.start()

        def strike(method: str, path: str) -> None:
            if method == "PUT" and f"/{part}/" in path and "/_work/" not in path:
                if after:
                    # The request still reaches the server; nobody receives its answer.
                    threading.Timer(0.05, _kill, [job]).start()
                else:
                    _kill(job)
                struck.set()

        scene.proxy.on_request = strike
        wait_for(lambda: struck.is_set() or job.poll() is not None, f"a PUT to {part}/")
        scene.ended(job)
        scene.proxy.on_request = None
        assert struck.is_set()
    return outcome


def driver_killed_writing_predictions(scene: Scene) -> Outcome:
    return _killed_at_put(scene, "predictions", after=True)


def driver_killed_writing_metrics(scene: Scene) -> Outcome:
    return _killed_at_put(scene, "metrics", after=True)


def driver_killed_before_the_commit(scene: Scene) -> Outcome:
    return _killed_at_put(scene, "runs", after=False)


def driver_killed_after_the_commit(scene: Scene) -> Outcome:
    """When the run is published and its work is not removed yet."""
    struck = threading.Event()
    with scene.trial() as outcome:
        job = scene.start()

        def strike(method: str, path: str) -> None:
            if method == "DELETE" and "/_work/" in path:
                _kill(job)
                struck.set()

        scene.proxy.on_request = strike
        wait_for(lambda: struck.is_set() or job.poll() is not None, "the work is removed")
        scene.ended(job)
        scene.proxy.on_request = None
        assert struck.is_set()
    return outcome


def _process_killed(scene: Scene, title: str, *options: str) -> Outcome:
    """Kill one of Ray's processes in the middle of the run; the run itself must go on."""
    with scene.trial() as outcome:
        job = scene.start(*options)
        wait_for(lambda: len(scene.fetched()) >= 60 or job.poll() is not None, "objects come")
        wait_for(lambda: bool(processes_of(job, title)), f"a process '{title}'", seconds=10)
        os.kill(processes_of(job, title)[0], signal.SIGKILL)
        told = scene.ended(job)
        assert job.returncode == 0, told[-3000:]
        assert outcome.attempts == 1
    return outcome


def screening_worker_killed(scene: Scene) -> Outcome:
    return _process_killed(scene, "ray::MapBatches(screen)")


def model_actor_killed(scene: Scene) -> Outcome:
    return _process_killed(scene, "ray::MapWorker(MapBatches(ScoreImages))", *APART)


def writing_actor_killed(scene: Scene) -> Outcome:
    return _process_killed(scene, "ray::MapWorker(MapBatches(WriteParts))", *APART)


def reading_worker_killed(scene: Scene) -> Outcome:
    return _process_killed(scene, "ray::MapBatches(read)", *APART)


NODES = """
import logging, os, signal, sys, threading, time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
for _ in range(2):
    cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
doomed = sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0]
def strike():
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    for kind, processes in doomed.all_processes.items():
        for process in processes:
            os.kill(process.process.pid, signal.SIGKILL)
threading.Thread(target=strike, daemon=True).start()
from lungopacity.cli import main
code = main(sys.argv[2:])
cluster.shutdown()
sys.exit(code)
"""


def node_lost(scene: Scene) -> Outcome:
    """Kill every process of one node of three."""
    signal_file = scene.folder / "strike"
    signal_file.unlink(missing_ok=True)
    with scene.trial() as outcome:
        job = scene.started([sys.executable, "-c", NODES, str(signal_file), *scene.command()[3:]])
        wait_for(lambda: len(scene.fetched()) >= 60 or job.poll() is not None, "objects come")
        signal_file.touch()
        told = scene.ended(job)
        assert job.returncode == 0, told[-3000:]
    return outcome


def storage_restarted(scene: Scene) -> Outcome:
    """Kill the S3 server, and start it again three seconds later."""
    with scene.trial() as outcome:
        job = scene.start()
        wait_for(lambda: len(scene.fetched()) >= 60 or job.poll() is not None, "objects come")
        assert scene.server.process_group is not None
        os.killpg(scene.server.process_group, signal.SIGKILL)
        scene.server.stop()
        time.sleep(3)
        scene.server.start(keep_credentials=True)
        os.environ.update(scene.server.environment)
        scene.proxy.upstream = scene.server.endpoint_url.removeprefix("http://")
        told = scene.ended(job)
        assert job.returncode == 0, told[-3000:]
    return outcome


def bad_network(scene: Scene, seed: int = 0) -> Outcome:
    """One request in twenty is refused, reset, cut, altered or delayed, or its answer is lost."""
    faults = {
        "GET": ("503", "reset", "cut", "flip", "delay"),
        "LIST": ("503", "reset", "cut", "delay"),
        "HEAD": ("503", "reset", "delay"),
        "PUT": ("503", "reset", "delay", "lost answer"),
        "DELETE": ("503", "reset", "delay", "lost answer"),
    }

    def choose(method: str, path: str, asked: int) -> str | None:
        draw = random.Random(f"{seed} {method} {path} {asked}")
        kind = "LIST" if "list-type" in path else method
        return draw.choice(faults.get(kind, ("503",))) if draw.random() < 0.05 else None

    with scene.trial() as outcome:
        scene.proxy.choose_any = choose
        job = scene.start()
        told = scene.ended(job)
        assert job.returncode == 0, told[-3000:]
    return outcome


def two_drivers(scene: Scene) -> Outcome:
    """At once, under one run id: one driver publishes, the other reports that it did."""
    with scene.trial() as outcome:
        jobs = [scene.start() for _ in range(2)]
        told = [scene.ended(job) for job in jobs]
        codes = sorted(job.returncode for job in jobs)
        assert codes == [0, 2], told
        (loser,) = (text for job, text in zip(jobs, told, strict=True) if job.returncode == 2)
        assert "published" in loser, loser
    return outcome


def disk_full(scene: Scene) -> Outcome:
    """The results are on a disk that fills up; the run must go on when there is room again."""
    folder = Path(tempfile.mkdtemp(prefix="lungopacity-small-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        folder.rmdir()
        raise NotPossibleHereError("mounting a small disk needs root")
    try:
        with scene.trial() as outcome:
            scene.results = str(folder / "results")
            job = scene.start()
            told = scene.ended(job)
            assert job.returncode == 2, told[-3000:]
            assert "cannot be written (No space left on device)" in told, told[-3000:]
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)
    return outcome


# Loaded by every Python of the job. Our code reads the date only by `datetime.now`.
CLOCK = """
import datetime
import pandas  # makes classes of the real datetime in C, and would crash on another
_real = datetime.datetime
class datetime_set_back(_real):
    @classmethod
    def now(cls, tz=None):
        return _real.now(tz) - datetime.timedelta(days=2)
datetime.datetime = datetime_set_back
"""


def clock_set_back(scene: Scene) -> Outcome:
    """By two days, for one night: the newest rows must still be found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = open_store(f"{name}/archive")
        for number in range(20):
            archive.write(f"{number}.png", encoded(grey_film(number)))
        (folder / "clock").mkdir()
        (folder / "clock" / "sitecustomize.py").write_text(CLOCK)

        def night(**env: str) -> None:
            done = subprocess.run(
                [sys.executable, "-m", "lungopacity.cli", "nightly", "--archive", archive.uri,
                 "--model", str(scene.folder / "model"), "--results", f"{name}/results"],
                capture_output=True, text=True, timeout=120, env={**os.environ, **env},
            )  # fmt: skip
            assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])

        night()
        archive.write("7.png", encoded(grey_film(77)))
        night(PYTHONPATH=f"{folder / 'clock'}{os.pathsep}{os.getcwd()}")
        night()
        asked = query(
            f"{name}/results",
            "SELECT (SELECT list(images ORDER BY images) FROM runs) AS runs, count(*) AS n, "
            "count(DISTINCT image) AS d, min(screened_on) < max(screened_on) AS back, "
            "any_value(source_etag) FILTER (image = '7.png') AS etag FROM latest",
        ).to_pylist()[0]
        newest = archive.head("7.png")
        assert newest is not None
        assert asked["back"], "the clock was not set back"
        return Outcome(
            expected=20,
            rows=asked["n"],
            twice=asked["n"] - asked["d"],
            finished=20,
            refetched=sum(asked["runs"]) - 21,
            parts_seen=int(asked["etag"] != newest.etag),
        )


class NotPossibleHereError(Exception):
    """The fault needs something that this machine does not have."""


FAULTS: dict[str, tuple[Trial, int]] = {
    "kill -9 of the driver at a random moment": (driver_killed_while_reading, 6),
    "kill -9 of the driver while it writes predictions": (driver_killed_writing_predictions, 1),
    "kill -9 of the driver while it writes metrics": (driver_killed_writing_metrics, 1),
    "kill -9 of the driver before the commit": (driver_killed_before_the_commit, 1),
    "kill -9 of the driver after the commit": (driver_killed_after_the_commit, 1),
    "kill -9 of a screening worker": (screening_worker_killed, 2),
    "kill -9 of a model actor": (model_actor_killed, 2),
    "kill -9 of a writing actor": (writing_actor_killed, 2),
    "kill -9 of a reading worker": (reading_worker_killed, 2),
    "kill -9 of one node of three": (node_lost, 2),
    "kill -9 and restart of the S3 server": (storage_restarted, 2),
    "5 % of requests broken": (bad_network, 3),
    "two drivers with one run id": (two_drivers, 2),
    "a full disk under _work": (disk_full, 1),
    "a clock set back by two days": (clock_set_back, 1),
    "kill -9 of a training rank in its third epoch": (training_rank_killed, 1),
    "kill -9 of a node of an elastic training, and another joins": (elastic_node_lost, 1),
}
"""Each fault, and how often `make faults` tries it."""
