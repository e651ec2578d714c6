"""On what the ways run: this machine, or for those of Ray the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lungopacity.errors import UserError
from lungopacity.runtime import capacity, ray_session
from lungopacity.words import counted

NO_GPU = "torch.cuda.is_available() is False"


@dataclass(frozen=True)
class Place:
    """Where ways run, and whether on GPUs."""

    cores: int
    """Of this machine."""
    gpus: int
    """Of this machine, if they are to be used."""
    ray_cores: int
    ray_gpus: int
    """Of the cluster, if they are to be used."""
    nodes: int = 1
    joined: bool = False
    """The cluster is another's: its processes are not among those that we start."""

    @staticmethod
    def found(use_gpu: bool | None) -> Place:
        """`use_gpu`: None uses what there is. Raises `UserError` where it is wanted in vain."""
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
            raise UserError(f"--use-gpu: there is none ({NO_GPU}); use --no-gpu")
        return place

    def on(self, ray: bool, most_gpus: int | None = None) -> str:
        """In words, for a table. `most_gpus`: that the way can use."""
        cores, gpus = (self.ray_cores, self.ray_gpus) if ray else (self.cores, self.gpus)
        if most_gpus is not None:
            gpus = min(gpus, most_gpus)
        return counted(cores, "core") + (f", {counted(gpus, 'GPU')}" if gpus else "")


def gpus_here() -> int:
    """That torch can use on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
