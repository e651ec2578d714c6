"""Processes that this process starts, and their environment."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

T = TypeVar("T")

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of a process in which torch computes on a CPU in a loop. With it, glibc keeps freed
memory for the next step, instead of returning large tensors to the kernel and fetching them again
page by page; and torch asks for huge pages. Other platforms ignore it."""


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block, for the processes that it starts."""
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


def leave_no_core() -> None:
    """Let the kernel write no image of the memory of this process, or of those that it starts from
    now on, if one crashes: it would hold films, with the names in their headers, and stay."""
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def open_closed_streams() -> None:
    """Open those of the standard streams that the caller has closed, as a shell does by `2>&-`. The
    next file to be opened would take the stream's number, and get what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def have_a_home() -> None:
    """Set HOME to `/`, as container runtimes do, for a user that is only a number and has no home
    folder: Ray Train cannot be imported without one."""
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a new process, and return what it returns.

    If the wait is interrupted, the process is killed. This does not use multiprocessing, which
    first runs the caller's own script again in the new process, and fails if the script has no
    `if __name__ == "__main__"`. Raises what the function raises, and `ChildProcessError` if the
    process ends before the function does.
    """
    start = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from lungopacity.runtime.processes import _answer; _answer(*sys.argv[1:])"
    )
    with TemporaryDirectory(prefix="lungopacity-") as folder:
        asked, told = Path(folder) / "asked", Path(folder) / "told"
        asked.write_bytes(pickle.dumps((function, arguments)))
        done = subprocess.run([sys.executable, "-c", start, asked, told], check=False)
        if done.returncode:
            raise ChildProcessError(f"a process ended with exit code {done.returncode}")
        answer, error = pickle.loads(told.read_bytes())
    if error is not None:
        raise error
    found: T = answer
    return found


def _answer(asked: str, told: str) -> None:
    # Ctrl-C reaches both processes; the one that waits kills this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer, raised = None, None
    try:
        function, arguments = pickle.loads(Path(asked).read_bytes())
        answer = function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        raised = error
    Path(told).write_bytes(pickle.dumps((answer, raised)))
