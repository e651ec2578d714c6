"""`fit` in a process of its own, for a test to kill. Arguments: Ray's address, the output."""

from __future__ import annotations

import sys

import ray

from lungopacity.training.fit import fit
from tests.training.blobs import EVERYTHING, blob_films

if __name__ == "__main__":
    address, output = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    fit(
        blob_films(),
        EVERYTHING,
        output,
        on_epoch=lambda row: print("epoch", row["epoch"], flush=True),
    )
