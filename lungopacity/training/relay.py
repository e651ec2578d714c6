"""Callbacks in Ray Train's controller process. They relay each finished epoch to the driver, and
end a run whose error a restart cannot fix.

Separate from `fit` so that the processes that import this module need not import torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungopacity.errors import UserError
from lungopacity.runtime.rows import Rows


class EndAtOnce(UserCallback):  # type: ignore[misc]  # ray ships no types
    """Ends the run at a worker's `UserError`, which the user has to fix and a restart does not."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error


class _SendRows(UserCallback):  # type: ignore[misc]  # ray ships no types
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self.rows.add.remote(metrics[0])


@contextlib.contextmanager
def relayed_rows(on_epoch: Callable[[dict[str, Any]], None] | None) -> Iterator[list[UserCallback]]:
    """Yields callbacks for `RunConfig`. While the block runs, `on_epoch` gets rank 0's reports.

    `on_epoch` is called from another thread; all calls have returned when the block ends.
    """
    if on_epoch is None:
        yield []
        return
    # On the driver's node, like the controller: the loss of another node must not end the relay.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rows = ray.remote(num_cpus=0)(Rows).options(scheduling_strategy=here).remote()

    def pass_on() -> None:
        count, ended = 0, False
        while not ended:
            try:
                new, ended = ray.get(rows.since.remote(count))
            except ray.exceptions.RayError:
                return
            for row in new:
                on_epoch(row)
            count += len(new)

    thread = threading.Thread(target=pass_on, name="training-progress", daemon=True)
    thread.start()
    try:
        yield [_SendRows(rows)]
    finally:
        rows.end.remote()
        thread.join()
        ray.kill(rows)
