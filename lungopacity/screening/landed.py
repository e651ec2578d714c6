"""What of a run has landed so far: for the line of progress, and for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow.parquet as pq

from lungopacity import observe
from lungopacity.errors import Status
from lungopacity.progress import Progress
from lungopacity.runtime import free_resources
from lungopacity.screening.parts import OBJECTS


class Landed:
    """Of one round over the objects of a run that have no result yet, however many files list them.

    `with Landed(planned, files) as landed: landed.add(part)`.
    """

    def __init__(
        self, planned: int, files: Sequence[Path], go_on_or_raise: Callable[[], None] = lambda: None
    ) -> None:
        """planned: objects of the whole run. files: `PLAN_SCHEMA`, what is still to do.
        `go_on_or_raise`: may end the round with each part."""
        self.planned = planned
        self.go_on_or_raise = go_on_or_raise
        is_shard = [pq.read_table(path, columns=["is_shard"])["is_shard"] for path in files]
        self.to_do = sum(len(column) for column in is_shard)
        self.with_shards = any(True in column.unique().to_pylist() for column in is_shard)
        self.objects = 0
        self.images: Counter[str] = Counter()
        # How many images a shard holds is known only once it has been read.
        self.progress = Progress(
            "Screening",
            total=None if self.with_shards else self.to_do,
            waits_for=free_resources,
        )

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, error, trace)

    def add(self, part: Counter[str]) -> None:
        """part: counts of a part file that has landed, as `screen_objects` yields them."""
        self.go_on_or_raise()
        self.objects += part[OBJECTS]
        self.images += Counter({status: part[status] for status in Status})
        # All each time: Ray tells a gauge to Prometheus once after it was set.
        observe.gauge("objects_planned", self.planned)
        observe.gauge("objects_waiting", self.to_do - self.objects)
        observe.gauge("images_done", self.images.total())
        of = f", {self.objects} of {self.to_do} objects" if self.with_shards else ""
        self.progress.advance(
            self.images.total() - self.progress.done,
            note=f"{self.images[Status.FAILED]} failed{of}",
        )
