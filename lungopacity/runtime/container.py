"""What this process may use of its machine, without asking Ray.

Within a container, a process sees all CPUs and all memory of the machine; the limits are in the
files of its control group, of version 2 or 1.
"""

from __future__ import annotations

import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def own_cpus() -> int:
    """CPUs that this process may use, 1 or more."""
    allowed = len(os.sched_getaffinity(0))
    version_1 = [*_words("cpu/cpu.cfs_quota_us"), *_words("cpu/cpu.cfs_period_us")]
    for words in (_words("cpu.max"), version_1):
        # The first is `max`, or -1, where there is no limit.
        if len(words) == 2 and words[0].isdigit():
            return max(1, min(allowed, int(words[0]) // int(words[1])))
    return allowed


def own_memory_bytes() -> int:
    """Memory that this process may use."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = [*_words("memory.max"), *_words("memory/memory.limit_in_bytes")]
    return min([has, *(int(word) for word in words if word.isdigit())])


def _words(file: str) -> list[str]:
    try:
        return (_GROUP / file).read_text().split()
    except OSError:
        return []
