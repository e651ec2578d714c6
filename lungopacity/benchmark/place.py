"""Where the ways run: on this machine; those of Ray, on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lungopacity.errors import UserError
from lungopacity.runtime import capacity, ray_session
from lungopacity.words import counted

NO_GPU = "torch.cuda.is_available() is False"


@dataclass(frozen=True)
class Place:
    """Where the ways run, and on how many GPUs."""

    cores: int
    """Of this machine."""
    gpus: int
    """Of this machine; 0 if they are not to be used."""
    ray_cores: int
    """Of the cluster."""
    ray_gpus: int
    """Of the cluster; 0 if they are not to be used."""
    nodes: int = 1
    joined: bool = False
    """Whether the cluster was running already: its processes are not among those that we start."""

    @staticmethod
    def found(use_gpu: bool | None) -> Place:
        """`use_gpu`: None uses what there is. Raises `UserError` if it is true and there is no
        GPU."""
        cores, gpus = len(os.sched_getaffinity(0)), 0 if use_gpu is False else gpus_here()
        place = Place(cores, gpus, cores, gpus)
        if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
            import ray

            with ray_session():
                has = capacity()
                nodes = sum(node["Alive"] for node in ray.nodes())
            ray_gpus = 0 if use_gpu is False else int(has["GPU"])
            place = Place(cores, gpus, int(has["CPU"]), ray_gpus, nodes, joined=True)
        if use_gpu and not (place.gpus or place.ray_gpus):
            raise UserError(f"--use-gpu: there is no GPU ({NO_GPU}); use --no-gpu")
        return place

    def on(self, ray: bool, most_gpus: int | None = None) -> str:
        """In words, for a table. `ray`: whether the way uses Ray. `most_gpus`: how many GPUs the
        way can use; None: all."""
        cores, gpus = (self.ray_cores, self.ray_gpus) if ray else (self.cores, self.gpus)
        if most_gpus is not None:
            gpus = min(gpus, most_gpus)
        return counted(cores, "core") + (f", {counted(gpus, 'GPU')}" if gpus else "")


def gpus_here() -> int:
    """How many GPUs torch can use on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
