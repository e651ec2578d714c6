"""Temporary folders on this machine: for lists of objects, and tables too large for memory.

A killed job leaves its folder behind, with the names of objects in it. Each folder holds a file
that its job keeps locked. A folder whose file is no longer locked may be removed, and a folder
without such a file is not one of ours.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "lungopacity-"
_MARK = ".at-work"
_LEFT_S = 86400.0


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder, empty but for a hidden file, that is removed when the block ends."""
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX) as name,
        Path(name, _MARK).open("wb") as mark,
    ):
        # On a file system without locks, `left_behind` gets no lock either, and finds nothing.
        with suppress(OSError):
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(name)


def left_behind() -> list[Path]:
    """This user's scratch folders that were made more than a day ago and whose jobs are gone."""
    found = []
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_MARK}"):
        with suppress(OSError):  # not readable, still locked, or gone meanwhile
            facts = mark.lstat()
            if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > _LEFT_S:
                with mark.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(mark.parent)
    return sorted(found)


def no_room(error: OSError) -> str:
    """Why a temporary file cannot be written, and what to do."""
    return (
        f"temporary files cannot be written on {socket.gethostname()} "
        f"({error.strerror or type(error).__name__}); "
        "free space, or set TMPDIR to a larger folder"
    )
