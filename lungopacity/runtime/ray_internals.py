"""What is reached for inside Ray 2.60, beside what it documents: to save seconds, and to count.

In another release a name may be gone: then that one thing is as Ray has it, and slower. A test asks
for each name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

_IDLE_SERVERS = ("start_monitor", "start_log_monitor", "start_api_server")
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
    takes by default, it waits 3 seconds wherever another Ray has it. There is no option for either.

    Gives the names that were found.
    """
    try:
        from ray._private.node import Node
    except ImportError:
        yield []
        return

    start_raylet: Any = getattr(Node, "start_raylet", None)

    def with_any_agent_port(node: Any, *given: Any, **named: Any) -> Any:
        node._ray_params.dashboard_agent_listen_port = 0
        return start_raylet(node, *given, **named)

    instead = {**dict.fromkeys(_IDLE_SERVERS, _nothing), "start_raylet": with_any_agent_port}
    with _replaced(Node, instead) as found:
        yield found


@contextmanager
def without_idle_actors() -> Iterator[list[str]]:
    """In the block Ray Data starts none of two actors that are of no use to a Ray of one machine.

    One is for what a dashboard would show: a process that takes a CPU for more than a second as the
    first films are read. The other asks for more nodes, and would take a process that was started
    for reading: another would have to start.

    Gives the names that were found.
    """
    with ExitStack() as both:
        yield [*both.enter_context(_no_statistics()), *both.enter_context(_no_growth())]


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
    except ImportError:
        yield []
        return

    class FixedCluster:
        """For `ray.data._internal.cluster_autoscaler.ClusterAutoscaler`."""

        def try_trigger_scaling(self) -> None: ...

        def on_executor_shutdown(self) -> None: ...

        def get_total_resources(self) -> Any:
            return ExecutionResources.from_resource_dict(ray.cluster_resources())

    def fixed(*_: object, **__: object) -> FixedCluster:
        return FixedCluster()

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
