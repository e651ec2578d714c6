"""An actor that passes rows on.

In a module of its own: its process imports what the module does, and Ray Train takes two seconds.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Rows:
    """An actor between the controller's process and the driver's.

    The driver waits in a call for new rows, because polling would take CPU time from training.
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
        """Waits for rows after the first `count`, or the end. Returns them, and whether training
        has ended."""
        while len(self.rows) == count and not self.ended:
            self.news.clear()
            await self.news.wait()
        return self.rows[count:], self.ended
