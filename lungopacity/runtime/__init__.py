"""The Ray that a command runs on, and this process and those that it starts.

The Ray is the cluster that the command was submitted to, or a private one. Nothing here imports Ray
before it is needed: `--help` must not wait for it.
"""

from __future__ import annotations

from lungopacity.runtime.container import own_cpus, own_memory_bytes
from lungopacity.runtime.head_watch import if_head_is_lost
from lungopacity.runtime.installed import check_same_code, code_digest, versions
from lungopacity.runtime.processes import (
    KEEP_FREED_MEMORY,
    alone,
    environment,
    have_a_home,
    leave_no_core,
    open_closed_streams,
)
from lungopacity.runtime.resources import (
    capacity,
    cpus_here,
    free_resources,
    grows_to,
    may_grow,
    require_resources,
    resolve_gpu,
)
from lungopacity.runtime.session import (
    LONGEST_FOLDER,
    SHORTER_FOLDER,
    done_with_ray,
    is_submission_address,
    lean_training,
    quiet_about_remote_arguments,
    quiet_ray_data,
    ray_ahead,
    ray_session,
    worker_environment,
)
from lungopacity.runtime.signals import code_of_signal, end_if_told, end_on_signals

__all__ = [
    "KEEP_FREED_MEMORY",
    "LONGEST_FOLDER",
    "SHORTER_FOLDER",
    "alone",
    "capacity",
    "check_same_code",
    "code_digest",
    "code_of_signal",
    "cpus_here",
    "done_with_ray",
    "end_if_told",
    "end_on_signals",
    "environment",
    "free_resources",
    "grows_to",
    "have_a_home",
    "if_head_is_lost",
    "is_submission_address",
    "lean_training",
    "leave_no_core",
    "may_grow",
    "open_closed_streams",
    "own_cpus",
    "own_memory_bytes",
    "quiet_about_remote_arguments",
    "quiet_ray_data",
    "ray_ahead",
    "ray_session",
    "require_resources",
    "resolve_gpu",
    "versions",
    "worker_environment",
]
