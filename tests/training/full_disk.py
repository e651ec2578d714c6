"""A training run whose disk is full when its first checkpoint is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lungopacity.training import loop


def full_disk_loop(config: dict[str, Any]) -> dict[str, Any]:
    """`train_loop`, for Ray Train. Each worker that starts adds a letter to a file beside the
    checkpoints' folder."""
    with Path(config["place"]).parents[1].with_suffix(".starts").open("a") as starts:
        starts.write("x")

    def write(*_: object) -> None:
        Path("/dev/full").write_bytes(b"x")

    loop.write_checkpoint = write  # type: ignore[assignment]
    return loop.train_loop(config)
