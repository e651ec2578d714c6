"""The CPUs, GPUs and actors that scoring uses on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from lungopacity.errors import UserError
from lungopacity.runtime import capacity, require_resources

_GPU_NAME = "accelerator_type:"
"""Prefix of the Ray resource that names the GPU of a node."""
_BATCH, _GPU_BATCH = 64, 256
"""Images per forward pass. On one H100, batches of 256 scored 1.2 to 3 times as many images a
second as batches of 64, depending on network and precision; they fit a GPU of 8 GiB. On a CPU,
larger batches do not fit the caches."""


def batch_size_for(use_gpu: bool) -> int:
    """The default number of images per forward pass."""
    return _GPU_BATCH if use_gpu else _BATCH


def check_actors(gpus_per_actor: float, model_actors: int | None) -> None:
    """Raises `UserError` for values that no cluster could satisfy."""
    if not 0 < gpus_per_actor <= 1:
        raise UserError(f"--gpus-per-actor must be above 0 and at most 1, not {gpus_per_actor:g}")
    if model_actors is not None and model_actors < 1:
        raise UserError(f"--model-actors must be at least 1, not {model_actors}")


@dataclass(frozen=True)
class ScoringResources:
    """The actors that hold the model, and what each of them takes."""

    first_actors: int
    """Actors started at once. Ray adds further ones one by one, each after the last has loaded."""
    max_actors: int
    actor_cpus: float
    actor_gpus: float
    threads: int | None
    """CPU threads of one actor's forward pass; None on a GPU."""
    apart: bool
    """Whether the model always has its own actors, instead of scoring in the tasks that read."""

    @property
    def use_gpu(self) -> bool:
        return self.actor_gpus > 0

    def devices(self) -> list[str]:
        """The devices for the commit record: `cpu`, or Ray's names of every kind of GPU in the
        cluster, whichever of them Ray chose."""
        import ray

        if not self.use_gpu:
            return ["cpu"]
        of_nodes = [name for name in ray.cluster_resources() if name.startswith(_GPU_NAME)]
        return sorted(name.removeprefix(_GPU_NAME) for name in of_nodes) or ["gpu"]

    @staticmethod
    def of_cluster(
        use_gpu: bool, gpus_per_actor: float = 1.0, model_actors: int | None = None
    ) -> ScoringResources:
        """Resources that fit the cluster as it is, or as large as it may autoscale to.

        `gpus_per_actor`: 0.5 puts two actors on one GPU. `model_actors`: the number of actors; None
        fills the GPUs. Without GPUs and `model_actors`, every CPU reads and scores, unless single
        shards are too large to share out evenly: then all CPUs but one get an actor. Both values
        must pass `check_actors`. Raises `UserError` if the cluster has too little, because Ray
        would wait silently.
        """
        import ray

        most = capacity()
        option = None if model_actors is None else "--model-actors"
        if use_gpu:
            # An actor cannot span two GPUs: two actors of 0.6 need two GPUs.
            a_gpu = int(1 / gpus_per_actor + 1e-9)
            wanted_gpus = 1 if model_actors is None else -(-model_actors // a_gpu)
            require_resources(cpus=1, gpus=wanted_gpus, what="screening", option=option)
            actors = model_actors or int(most["GPU"]) * a_gpu
            gpus_now = int(ray.cluster_resources().get("GPU", 0))
            first = min(actors, max(1, gpus_now * a_gpu))
            return ScoringResources(first, actors, 0.0, gpus_per_actor, None, True)
        # One CPU is left for reading. On a cluster of one CPU, the actor reserves none.
        wanted_cpus = 1 if model_actors in (None, 1) else model_actors + 1
        require_resources(cpus=wanted_cpus, gpus=0, what="screening", option=option)
        cpus = int(most["CPU"])
        largest_node = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
        # On a small machine the one actor computes with every core, because reading waits for it
        # meanwhile. `max`: a cluster that starts as a head alone has no node with cores yet.
        threads = max(1, largest_node) if cpus <= 2 else 1
        actors = model_actors or max(1, cpus - 1)
        return ScoringResources(
            1, actors, 1.0 if cpus >= 2 else 0.0, 0.0, threads, model_actors is not None
        )
