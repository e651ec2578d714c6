"""What the Ray cluster has, and what a job asks of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lungopacity.errors import UserError, first_line
from lungopacity.words import counted

_RESOURCES = ("CPU", "GPU")
_limits: dict[str, float] = {}
"""Set by `grows_to`. A global, because threads that a block starts read it, too."""


@contextmanager
def grows_to(limits: Mapping[str, float]) -> Iterator[None]:
    """Say, for the block, what the cluster may autoscale to, such as `{"CPU": 80, "GPU": 4}`: Ray
    2.60 does not tell."""
    global _limits
    before, _limits = _limits, dict(limits)
    try:
        yield
    finally:
        _limits = before


def may_grow() -> bool:
    """Whether `grows_to` says so."""
    return bool(_limits)


def capacity() -> dict[str, float]:
    """CPUs and GPUs that the cluster has or, according to `grows_to`, may grow to."""
    import ray

    has = ray.cluster_resources()
    return {name: max(has.get(name, 0.0), _limits.get(name, 0.0)) for name in _RESOURCES}


def cpus_here() -> int:
    """CPUs of this Ray worker's node that it may use. Ray knows the limit of a container, within
    which a process sees all CPUs of the machine."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (of_ray,) = (node["Resources"]["CPU"] for node in ray.nodes() if node["NodeID"] == here)
    return min(len(os.sched_getaffinity(0)), int(of_ray))


def free_resources() -> str:
    """What the cluster has left for waiting tasks, in words."""
    import ray

    try:
        has, free = ray.cluster_resources(), ray.available_resources()
    except Exception as error:  # many types mean that the head is gone; the job itself reports it
        return f"the Ray cluster does not tell what is free ({first_line(error)})"
    parts = [
        f"{free.get(name, 0.0):g} of {counted(has[name], name)}"
        for name in _RESOURCES
        if name in has
    ]
    return f"free in the Ray cluster: {', '.join(parts) or 'nothing'}"


def require_resources(cpus: float, gpus: float, what: str, option: str | None = None) -> None:
    """Refuse what the cluster can never give: Ray itself would wait for it silently.

    `what`: the job, and `option`: the option that asked for so much, both for the message. Raises
    `UserError`.
    """
    import ray

    has, most = ray.cluster_resources(), capacity()
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > most[name]:
            now = has.get(name, 0.0)
            less = ["--no-gpu"] * (name == "GPU") + [f"fewer {option}"] * (option is not None)
            grown = f" and may grow to {most[name]:g}" if most[name] > now else ""
            raise UserError(
                f"{what} needs {counted(wanted, name)}, the Ray cluster has {now:g}{grown}; "
                f"use {''.join(f'{way}, or ' for way in less)}a larger cluster (if it "
                "autoscales, give --grows-to)"
            )


def resolve_gpu(use_gpu: bool | None) -> bool:
    """Whether to use GPUs. None: use them if the cluster has any, or may grow to have some."""
    return capacity()["GPU"] > 0 if use_gpu is None else use_gpu
