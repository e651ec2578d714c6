"""A training run whose last worker pauses after its second epoch until it is killed, so that a test
that kills it at that epoch does so before the last one, even on a busy machine."""

from __future__ import annotations

import threading
from typing import Any

import ray.train

from lungopacity.training.loop import train_loop


def resting_loop(config: dict[str, Any]) -> dict[str, Any]:
    """`train_loop`, for Ray Train; after a restart, it runs to the end."""
    context = ray.train.get_context()
    rests = context.get_world_rank() == context.get_world_size() - 1
    report = ray.train.report

    def reported(row: dict[str, Any], *rest: Any, **options: Any) -> None:
        report(row, *rest, **options)
        if rests and row["epoch"] == 2:
            threading.Event().wait()

    ray.train.report = reported
    return train_loop(config)
