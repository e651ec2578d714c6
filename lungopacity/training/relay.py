"""What runs in Ray Train's controller process: it relays epochs as they finish to the driver, and
ends a training that no restart can mend.

Apart from `fit` so that the processes between, which import this module, need not import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.train import UserCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lungopacity.errors import UserError


class _Rows:
    """An actor that both can reach: the controller calls back in its own process.

    Who wants rows waits in it: to ask again and again would take from two cores that train.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ended = False
        self.news = asyncio.Event()

    async def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.news.set()

    async def end(self) -> None:
        self.ended = True
        self.news.set()

    async def since(self, count: int) -> tuple[list[dict[str, Any]], bool]:
        """Rows after so many, once there are any or the training has ended; and whether it has."""
        while len(self.rows) == count and not self.ended:
            self.news.clear()
            await self.news.wait()
        return self.rows[count:], self.ended


class EndAtOnce(UserCallback):  # type: ignore[misc]  # ray ships no types
    """A worker's `UserError` ends the training: what the user has to mend, restarts do not."""

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
    """Callbacks for `RunConfig`. While the block runs, rank 0's reports reach `on_epoch`.

    `on_epoch` is called from another thread; all calls are done when the block ends.
    """
    if on_epoch is None:
        yield []
        return
    # Here, as the controller is: a node that is lost must not take the relay with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rows = ray.remote(num_cpus=0)(_Rows).options(scheduling_strategy=here).remote()

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
