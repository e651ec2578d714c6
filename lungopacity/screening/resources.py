"""What scoring takes of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from lungopacity.errors import UserError
from lungopacity.runtime import capacity, require_resources

_GPU_NAME = "accelerator_type:"
"""Begins a resource of nodes with GPUs."""
_BATCH, _GPU_BATCH = 64, 256
"""Images a forward pass. On one H100, 256 scored 1.2 to 3 times as many a second as 64, by network
and precision; a GPU of 8 GiB holds them. On a CPU larger batches leave its caches."""


def batch_size_for(use_gpu: bool) -> int:
    """Images a forward pass where none is asked for: as many as suit the device."""
    return _GPU_BATCH if use_gpu else _BATCH


def check_actors(gpus_per_actor: float, model_actors: int | None) -> None:
    """Raises `UserError` for what no cluster could give."""
    if not 0 < gpus_per_actor <= 1:
        raise UserError(f"--gpus-per-actor must be above 0 and at most 1, not {gpus_per_actor:g}")
    if model_actors is not None and model_actors < 1:
        raise UserError(f"--model-actors must be at least 1, not {model_actors}")


@dataclass(frozen=True)
class ScoringResources:
    """What the model takes of the cluster."""

    first_actors: int
    """Started at once: Ray adds others one by one, each when the last one has loaded."""
    max_actors: int
    actor_cpus: float
    actor_gpus: float
    threads: int | None
    """CPU threads of one actor's forward pass; None on a GPU."""
    apart: bool
    """Whether the model has actors of its own, whatever there is to screen."""

    @property
    def use_gpu(self) -> bool:
        return self.actor_gpus > 0

    def devices(self) -> list[str]:
        """What the model runs on, for the run's record: of GPUs every kind that the cluster
        has, by Ray's names for them, whichever of them Ray chose."""
        import ray

        if not self.use_gpu:
            return ["cpu"]
        of_nodes = [name for name in ray.cluster_resources() if name.startswith(_GPU_NAME)]
        return sorted(name.removeprefix(_GPU_NAME) for name in of_nodes) or ["gpu"]

    @staticmethod
    def of_cluster(
        use_gpu: bool, gpus_per_actor: float = 1.0, model_actors: int | None = None
    ) -> ScoringResources:
        """Fit the cluster, as it is or may autoscale to.

        `model_actors`: so many; None is one for each `gpus_per_actor` of the GPUs. Without GPUs and
        without `model_actors` every CPU reads and scores, but where single shards are too large to
        be shared: then there are as many actors as leave one CPU to reading. `gpus_per_actor`: 0.5
        puts two actors on one GPU. Both as `check_actors` has them.
        Raises `UserError` where the cluster has too little: Ray would wait without a word.
        """
        import ray

        most = capacity()
        option = None if model_actors is None else "--model-actors"
        if use_gpu:
            # An actor lies on one GPU whole: two of 0.6 do not share one.
            a_gpu = int(1 / gpus_per_actor + 1e-9)
            wanted_gpus = 1 if model_actors is None else -(-model_actors // a_gpu)
            require_resources(cpus=1, gpus=wanted_gpus, what="screening", option=option)
            actors = model_actors or int(most["GPU"]) * a_gpu
            gpus_now = int(ray.cluster_resources().get("GPU", 0))
            first = min(actors, max(1, gpus_now * a_gpu))
            return ScoringResources(first, actors, 0.0, gpus_per_actor, None, True)
        # One CPU reads; on a cluster of one CPU the actor must take none.
        wanted_cpus = 1 if model_actors in (None, 1) else model_actors + 1
        require_resources(cpus=wanted_cpus, gpus=0, what="screening", option=option)
        cpus = int(most["CPU"])
        largest_node = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
        # A small machine gives its one actor every core: while it computes, reading waits for it.
        # A cluster that grows from a head alone has no node with cores yet.
        threads = max(1, largest_node) if cpus <= 2 else 1
        actors = model_actors or max(1, cpus - 1)
        return ScoringResources(
            1, actors, 1.0 if cpus >= 2 else 0.0, 0.0, threads, model_actors is not None
        )
