"""`fit` in a process of its own, for a test to kill after two epochs. Arguments: Ray's address, the
output, and the places of TensorBoard and MLflow."""

from __future__ import annotations

import sys

import ray

from lungopacity.training import ray_run
from lungopacity.training.fit import fit
from lungopacity.training.tracking import run_logs
from tests.training.blobs import EVERYTHING, blob_films
from tests.training.resting import resting_loop

if __name__ == "__main__":
    address, output, tensorboard, mlflow = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    ray_run.train_loop = resting_loop
    with run_logs(tensorboard, mlflow) as logs:
        fit(
            blob_films(),
            EVERYTHING,
            output,
            on_start=lambda run, earlier: logs.start(run, EVERYTHING, output, earlier),
            on_epoch=lambda row: (logs.epoch(row), print("epoch", row["epoch"], flush=True)),  # type: ignore[func-returns-value]
        )
