"""Run several iterators at once, each in a thread, with a bound on how far they run ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

_WAIT_S = 0.2


def ahead(inputs: Iterable[In], make: Callable[[In], Iterable[Out]], threads: int) -> Iterator[Out]:
    """The items of `make(input)` for every input, in any order. An exception in a thread is raised
    here.

    At most two items per thread wait to be taken, so memory stays small if the caller is slow.
    """
    items: queue.Queue[Out] = queue.Queue(maxsize=2 * threads)
    stop = threading.Event()

    def run(one: In) -> None:
        for item in make(one):
            while not stop.is_set():
                try:
                    items.put(item, timeout=_WAIT_S)
                    break
                except queue.Full:
                    continue
            if stop.is_set():
                return

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(run, one) for one in inputs]
        try:
            for future in running:
                while not future.done() or not items.empty():
                    try:
                        yield items.get(timeout=_WAIT_S)
                    except queue.Empty:
                        continue
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
