"""Count the part files written so far, for the progress line and for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import pyarrow.parquet as pq

from lungopacity import observe
from lungopacity.errors import Status
from lungopacity.progress import Progress
from lungopacity.runtime import free_resources
from lungopacity.screening.parts import OBJECTS


class Landed:
    """Progress of one round over the objects of a run that have no result yet.

    `with Landed(planned, files) as landed: landed.add(part)`.
    """

    def __init__(
        self, planned: int, files: Sequence[Path], go_on_or_raise: Callable[[], None] = lambda: None
    ) -> None:
        """planned: number of objects in the whole run. files: Parquet files of `PLAN_SCHEMA`, the
        objects of this round. `go_on_or_raise`: called for each part; may raise to end the round.
        """
        self.planned = planned
        self.go_on_or_raise = go_on_or_raise
        is_shard = [pq.read_table(path, columns=["is_shard"])["is_shard"] for path in files]
        self.to_do = sum(len(column) for column in is_shard)
        self.with_shards = any(True in column.unique().to_pylist() for column in is_shard)
        self.objects = 0
        self.images: Counter[str] = Counter()
        # The number of images in a shard is known only once it has been read.
        self.progress = Progress(
            "Screening",
            total=None if self.with_shards else self.to_do,
            waits_for=free_resources,
        )

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.progress.__exit__(kind)

    def add(self, part: Counter[str]) -> None:
        """part: counts of a part file that was written, as `screen_objects` yields them."""
        self.go_on_or_raise()
        self.objects += part[OBJECTS]
        self.images += Counter({status: part[status] for status in Status})
        # Every gauge is set each time, because Ray exports a gauge only once after it was set.
        observe.gauge("objects_planned", self.planned)
        observe.gauge("objects_waiting", self.to_do - self.objects)
        observe.gauge("images_done", self.images.total())
        of = f", {self.objects} of {self.to_do} objects" if self.with_shards else ""
        self.progress.advance(
            self.images.total() - self.progress.done,
            note=f"{self.images[Status.FAILED]} failed{of}",
        )
