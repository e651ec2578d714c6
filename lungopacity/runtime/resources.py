"""What the Ray cluster has, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lungopacity.errors import UserError, first_line
from lungopacity.words import counted

_RESOURCES = ("CPU", "GPU")
_told: dict[str, float] = {}
"""By `grows_to`. Threads that a block starts read it, too."""


@contextmanager
def grows_to(limits: Mapping[str, float]) -> Iterator[None]:
    """Tell, for the block, what the cluster may autoscale to, as `{"CPU": 80, "GPU": 4}`: Ray 2.60
    does not."""
    global _told
    before, _told = _told, dict(limits)
    try:
        yield
    finally:
        _told = before


def may_grow() -> bool:
    """Whether `grows_to` told so."""
    return bool(_told)


def capacity() -> dict[str, float]:
    """CPUs and GPUs that the cluster has, or as it was told by `grows_to`, may grow to."""
    import ray

    has = ray.cluster_resources()
    return {name: max(has.get(name, 0.0), _told.get(name, 0.0)) for name in _RESOURCES}


def free_resources() -> str:
    """What the cluster has left for tasks that wait, for people."""
    import ray

    try:
        has, free = ray.cluster_resources(), ray.available_resources()
    except Exception as error:  # a head that is gone: Ray has many for that, and the job tells it
        return f"the Ray cluster does not tell what is free ({first_line(error)})"
    told = [
        f"{free.get(name, 0.0):g} of {counted(has[name], name)}"
        for name in _RESOURCES
        if name in has
    ]
    return f"free in the Ray cluster: {', '.join(told) or 'nothing'}"


def require_resources(cpus: float, gpus: float, what: str, option: str | None = None) -> None:
    """Refuse what the cluster can never give: Ray itself would wait for it without a word.

    what: the job, and option: by which it asks for so much, for messages. Raises `UserError`.
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
                f"use {''.join(f'{way}, or ' for way in less)}a larger cluster (of one that "
                "grows, tell --grows-to)"
            )


def resolve_gpu(use_gpu: bool | None) -> bool:
    """None means: if the cluster has any, or may grow to have some."""
    return capacity()["GPU"] > 0 if use_gpu is None else use_gpu
