"""The faults of training, where epochs are counted instead of images."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile

from tests.faults.scene import Outcome, Scene

TRAIN = """
import json, os, signal, sys
from tests.faults.scene import processes_of
from dataclasses import replace
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
from lungopacity.training import ray_run
from lungopacity.training.fit import fit
from tests.training.blobs import SMALL_RUN, blob_films
from tests.training.resting import resting_loop
ray_run.train_loop = resting_loop
class Me: pid = os.getpid()
killed = []
def strike(row):
    if row["epoch"] == 2 and not killed:
        # The third epoch is under way, and the last rank waits to be struck.
        killed.append(processes_of(Me, "ray::RayTrainWorker")[0])
        os.kill(killed[0], signal.SIGKILL)
seen = []
settings = replace(SMALL_RUN, workers=2, epochs=int(sys.argv[2]))
result = fit(blob_films(train=97, validation=43), settings, sys.argv[1],
             on_epoch=lambda row: (seen.append(row["epoch"]), strike(row)))
assert killed
print(json.dumps({"seen": seen, "kept": [row["epoch"] for row in result.history]}))
"""


def training_rank_killed(scene: Scene) -> Outcome:
    """In the third epoch: training must resume after the second, and have each epoch once."""
    told = _trained(TRAIN, epochs=6, timeout_s=200)
    return _judged(told, expected=6, finished=2)


ELASTIC = """
import contextlib, json, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ray.cluster_utils import Cluster
health = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": health})
doomed = cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
from lungopacity.runtime import ray_session
from lungopacity.training import fit as training, ray_run
from tests.training.blobs import SMALL_RUN, blob_films
ray_run.RESIZE_EVERY_S = 5.0
seen = []
alone = threading.Event()
def follow(row):
    seen.append(row["epoch"])
    if row["workers"] == 2 and row["epoch"] == 2:
        for processes in doomed.all_processes.values():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # it fell with its raylet
                    os.kill(process.process.pid, signal.SIGKILL)
    elif row["workers"] == 1:
        alone.set()
# No number of workers but one divides the batch.
settings = replace(SMALL_RUN, workers=1, max_workers=2, batch_size=15, epochs=int(sys.argv[2]))
with ray_session(), ThreadPoolExecutor(1) as pool:
    run = pool.submit(training.fit, blob_films(train=1201), settings, sys.argv[1], on_epoch=follow)
    alone.wait(300)
    cluster.add_node(num_cpus=1)  # Ray starts nodes in the main thread alone
    result = run.result()
print(json.dumps({"seen": seen, "kept": [row["epoch"] for row in result.history],
                  "workers": [row["workers"] for row in result.history]}))
cluster.shutdown()
"""


def elastic_node_lost(scene: Scene) -> Outcome:
    """One of two nodes is lost; the other trains alone until a third joins."""
    epochs = 60
    told = _trained(ELASTIC, epochs, timeout_s=400)
    changes = [number for number, _ in itertools.groupby(told["workers"])]
    assert changes[:3] == [2, 1, 2], told
    return _judged(told, expected=epochs, finished=told["workers"].index(1))


def _trained(script: str, epochs: int, timeout_s: float) -> dict[str, list[int]]:
    """What the script printed: the epochs that its caller saw, and those in the history."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", script, f"{folder}/model", str(epochs)], capture_output=True,
            text=True, timeout=timeout_s, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    assert told["seen"] == told["kept"], told
    return told


def _judged(told: dict[str, list[int]], expected: int, finished: int) -> Outcome:
    """Count epochs as images. `finished`: epochs before the fault."""
    seen, kept = told["seen"], told["kept"]
    return Outcome(
        expected=expected,
        rows=len(kept),
        twice=len(kept) - len(set(kept)),
        finished=finished,
        refetched=len(seen) - len(set(seen)),
    )
