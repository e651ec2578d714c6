"""Folders on this machine for what is at work: lists of objects, tables too large for memory.

A job that is killed leaves its own behind, names of objects and all. Each holds a file that its job
has locked: one that nobody holds any more may go, and no folder of another's is taken for one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "lungopacity-"
_MARK = ".at-work"
_LEFT_S = 86400.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of the system where a disk is full, or a user's share of it."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of the block's own, empty but for a hidden file, and gone after it."""
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX) as name,
        Path(name, _MARK).open("wb") as mark,
    ):
        # Where a file system knows no locks, none is found free either.
        with suppress(OSError):
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(name)


def left_behind() -> list[Path]:
    """This user's folders, begun more than a day ago, whose jobs are gone."""
    found = []
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_MARK}"):
        with suppress(OSError):  # of another user, held, or gone meanwhile
            facts = mark.lstat()
            if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > _LEFT_S:
                with mark.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(mark.parent)
    return sorted(found)
