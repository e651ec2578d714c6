"""What is reached for inside Ray 2.60, beside what it documents: to save seconds, and to count.

In another release a name may be gone: then that one thing is as Ray has it, and slower. A test asks
for each name.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

_IDLE_SERVERS = ("start_monitor", "start_log_monitor", "start_api_server")
_LOOK_S, _START_S = 0.05, 30.0
_STATISTICS = (
    "register_dataset_to_stats_actor",
    "update_execution_metrics",
    "update_iteration_metrics",
)


@contextmanager
def without_idle_servers() -> Iterator[list[str]]:
    """A Ray that starts in the block has no autoscaler, no reader of its logs, and no dashboard's
    server: three Python processes that do nothing for a Ray of one machine, whose dashboard is off
    and whose logs nobody reads. `ray.init` waits for the last of them, and `ray.shutdown` for each.
    And its agent takes any free port for what that dashboard would ask it: for the one that it
    takes by default, it waits 3 seconds wherever another Ray has it. `ray.init` learns within a
    twentieth of a second that the node is up, instead of a second. There is no option for these.

    Gives the names that were found.
    """
    try:
        from ray._private import services
        from ray._private.node import Node
        from ray._private.state import GlobalState
    except ImportError:
        yield []
        return

    start_raylet: Any = getattr(Node, "start_raylet", None)

    def with_any_agent_port(node: Any, *given: Any, **named: Any) -> Any:
        node._ray_params.dashboard_agent_listen_port = 0
        return start_raylet(node, *given, **named)

    instead = {**dict.fromkeys(_IDLE_SERVERS, _nothing), "start_raylet": with_any_agent_port}
    get_node: Any = getattr(services, "get_node", None)

    def once_it_is_up(gcs_address: str, node_id: str) -> Any:
        # Ray's own look sleeps a second where it comes too early, as it always does.
        until = time.monotonic() + _START_S
        state = GlobalState()
        state._initialize_global_state(services._get_gcs_client_options(gcs_address))
        while time.monotonic() < until:
            if any(node["NodeID"] == node_id for node in state.node_table()):
                break
            time.sleep(_LOOK_S)
        return get_node(gcs_address, node_id)

    with _replaced(Node, instead) as found, _replaced(services, {"get_node": once_it_is_up}) as own:
        yield [*found, *own]


@contextmanager
def without_idle_actors() -> Iterator[list[str]]:
    """In the block Ray Data starts none of two actors that are of no use to a Ray of one machine.

    One is for what a dashboard would show: a process that takes a CPU for more than a second as the
    first films are read. The other asks for more nodes, and would take a process that was started
    for reading: another would have to start. Without it, a pipeline of tasks alone is told of twice
    the CPUs: so many more tasks wait at the raylet, which knows at once that a CPU is free. Ray
    Data's loop hears of it up to 0.2 s later.

    Gives the names that were found.
    """
    with ExitStack() as both:
        yield [*both.enter_context(_no_statistics()), *both.enter_context(_no_growth())]


@contextmanager
def without_cleaner() -> Iterator[list[str]]:
    """A training in the block starts no actor that cleans up where its controller dies: in a Ray of
    one process, there is nobody left then. It asks a dashboard whether the controller lives; where
    there is none, it asks for 40 s, and a training that ends meanwhile waits 12 s for it.

    Gives the names that were found.
    """
    try:
        from ray.train.v2._internal.execution.callback import ControllerCallback
        from ray.train.v2.api import data_parallel_trainer
    except ImportError:
        yield []
        return
    instead = {"PlacementGroupCleanerCallback": ControllerCallback}
    with _replaced(data_parallel_trainer, instead) as found:
        yield found


@contextmanager
def _no_statistics() -> Iterator[list[str]]:
    try:
        from ray.data._internal.stats import _StatsManager
    except ImportError:
        yield []
        return
    with _replaced(_StatsManager, dict.fromkeys(_STATISTICS, staticmethod(_nothing))) as found:
        yield found


@contextmanager
def _no_growth() -> Iterator[list[str]]:
    import ray

    try:
        from ray.data._internal.execution import streaming_executor
        from ray.data._internal.execution.interfaces import ExecutionResources
        from ray.data._internal.execution.operators.actor_pool_map_operator import (
            ActorPoolMapOperator,
        )
    except ImportError:
        yield []
        return

    class FixedCluster:
        """For `ray.data._internal.cluster_autoscaler.ClusterAutoscaler`."""

        def __init__(self, has_actors: bool) -> None:
            self.times = 1 if has_actors else 2

        def try_trigger_scaling(self) -> None: ...

        def on_executor_shutdown(self) -> None: ...

        def get_total_resources(self) -> Any:
            resources = ray.cluster_resources()
            cpus = self.times * resources.get("CPU", 0)
            return ExecutionResources.from_resource_dict({**resources, "CPU": cpus})

    def fixed(topology: Iterable[object], *_: object, **__: object) -> FixedCluster:
        return FixedCluster(any(isinstance(stage, ActorPoolMapOperator) for stage in topology))

    with _replaced(streaming_executor, {"create_cluster_autoscaler": fixed}) as found:
        yield found


def bytes_moved() -> int | None:
    """Through the object stores of all nodes, since the Ray cluster was started. None where this
    release does not tell."""
    import ray

    try:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address
    except ImportError:
        return None
    # Any node asks all the others.
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.cumulative_created_bytes)


@contextmanager
def _replaced(owner: Any, instead: Mapping[str, Any]) -> Iterator[list[str]]:
    """In the block a class or a module has others in place of these, of those that it has at all:
    whose names it gives."""
    before = {name: vars(owner)[name] for name in instead if name in vars(owner)}
    for name in before:
        setattr(owner, name, instead[name])
    try:
        yield list(before)
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _nothing(*_: object, **__: object) -> None:
    return None
