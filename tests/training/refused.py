"""A training run whose S3 server refuses checkpoints."""

from __future__ import annotations

import os
from typing import Any

from lungopacity.training import loop
from tests.fault_proxy import fault_proxy


def refused_loop(config: dict[str, Any]) -> dict[str, Any]:
    """`train_loop`, for Ray Train: this worker can read from S3, but not write."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.choose_any = lambda method, *_: "403" if method == "PUT" else None
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        return loop.train_loop(config)
