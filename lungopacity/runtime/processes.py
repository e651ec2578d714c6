"""Processes that this one starts, and their environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of a process in which torch computes on a CPU, in a loop. glibc keeps what is freed
for the next step, where by default large tensors are fetched from the kernel, page by page, and
given back; and torch asks for huge pages. Other platforms ignore it."""


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that are set for the block: for the processes that it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a new process. Whatever ends the wait for it, ends it."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BaseException:
            # The pool itself would wait for its end.
            for child in multiprocessing.active_children():
                child.terminate()
            raise
