"""`fit` in a process of its own, for a test to kill. Arguments: Ray's address, the output, and
where TensorBoard and MLflow look."""

from __future__ import annotations

import sys

import ray

from lungopacity.training.fit import fit
from lungopacity.training.tracking import run_logs
from tests.training.blobs import EVERYTHING, blob_films

if __name__ == "__main__":
    address, output, tensorboard, mlflow = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    with run_logs(tensorboard, mlflow) as logs:
        fit(
            blob_films(),
            EVERYTHING,
            output,
            on_start=lambda run, earlier: logs.start(run, EVERYTHING, output, earlier),
            on_epoch=lambda row: (logs.epoch(row), print("epoch", row["epoch"], flush=True)),  # type: ignore[func-returns-value]
        )
