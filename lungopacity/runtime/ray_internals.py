"""Uses of undocumented parts of Ray 2.60, to save seconds and to measure.

If another release lacks a name, Ray does that one thing its own, slower way. A test checks that
each name is there.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from lungopacity.runtime import waiting_agent

_IDLE_SERVERS = ("start_monitor", "start_log_monitor", "start_api_server")
_LOOK_S, _START_S = 0.05, 30.0
_PORTS_IN_FILES = "2.60."
"""The releases of Ray in which `waiting_agent` is known to work."""
_DASHBOARD_AGENT, _AGENT = "--dashboard_agent_command=", "--runtime_env_agent_command="
_SESSION = "--session_dir="
_REQUESTS = ("_maybe_send_resource_request", "_send_resource_request", "_cancel_resource_request")
_IGNORING = "ray.data._internal.execution.streaming_executor_state"
"""The logger to which Ray Data tells what it ignores."""
_STATISTICS = (
    "register_dataset_to_stats_actor",
    "update_execution_metrics",
    "update_iteration_metrics",
)


@contextmanager
def without_idle_servers(
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[list[str]]:
    """In the block, Ray starts faster, for which it has no options.

    It starts without its autoscaler, its log reader and its dashboard server. These three Python
    processes do nothing for a Ray of one machine whose dashboard is off and whose logs nobody
    reads; `ray.init` waits for the last of them, and `ray.shutdown` for each. In place of its two
    agents, a `waiting_agent` starts. `ray.init` learns within 0.05 seconds, instead of 1, that the
    node is up. `meanwhile` is called before it looks.

    Yields the names that were found.
    """
    try:
        import ray
        from ray._private import services, utils
        from ray._private.node import Node
        from ray._private.state import GlobalState
    except ImportError:
        yield []
        return

    get_node: Any = getattr(services, "get_node", None)
    start_process: Any = getattr(services, "start_ray_process", None)

    def with_waiting_agents(command: list[str], *given: Any, **named: Any) -> Any:
        return start_process(_with_waiting_agents(command), *given, **named)

    def once_it_is_up(gcs_address: str, node_id: str) -> Any:
        meanwhile()
        # Ray's own check sleeps a second if it comes too early, as it always does.
        until = time.monotonic() + _START_S
        state = GlobalState()
        state._initialize_global_state(services._get_gcs_client_options(gcs_address))
        while time.monotonic() < until:
            if any(node["NodeID"] == node_id for node in state.node_table()):
                break
            time.sleep(_LOOK_S)
        return get_node(gcs_address, node_id)

    with ExitStack() as replaced:
        found = replaced.enter_context(_replaced(Node, dict.fromkeys(_IDLE_SERVERS, _nothing)))
        found += replaced.enter_context(_replaced(services, {"get_node": once_it_is_up}))
        if ray.__version__.startswith(_PORTS_IN_FILES):
            agents = {"start_ray_process": with_waiting_agents}
            found += replaced.enter_context(_replaced(services, agents))
            # Ray imports all that the dashboard needs, to learn whether its agent can use it.
            unneeded = {"get_dashboard_dependency_error": ImportError}
            found += replaced.enter_context(_replaced(utils, unneeded))
        yield found


def _with_waiting_agents(command: list[str]) -> list[str]:
    """The command that starts a raylet, with a `waiting_agent` in place of each agent."""
    session = "".join(part.removeprefix(_SESSION) for part in command if part.startswith(_SESSION))
    waiting = subprocess.list2cmdline([sys.executable, "-I", "-S", waiting_agent.__file__, session])
    return [
        _DASHBOARD_AGENT + waiting
        if part.startswith(_DASHBOARD_AGENT)
        else f"{_AGENT}{waiting} {part.removeprefix(_AGENT)}"
        if part.startswith(_AGENT)
        else part
        for part in command
    ]


def forget_token() -> None:
    """Let Ray look for its token anew: it keeps the first that it finds, also for the next Ray that
    this process starts or joins."""
    with suppress(ImportError, AttributeError, KeyError):
        from ray import _raylet

        loader: Any = vars(_raylet)["AuthenticationTokenLoader"]
        loader.instance().reset_cache()


def close_session_folder() -> None:
    """Let no other user of this machine into the folder of the Ray that this process has started:
    Ray opens it to everybody, with its sockets, its logs and the films that it spills."""
    with suppress(ImportError, AttributeError):
        from ray._private import worker

        node: Any = worker._global_node
        os.chmod(node.get_session_dir_path(), 0o700)


@contextmanager
def without_signal_handlers() -> Iterator[list[str]]:
    """In the block, Ray leaves the handler of SIGTERM alone. From the start of `ray.init` on it has
    three of its own, which end this process with 15 or 1 instead of 143.

    Yields the names that were found.
    """
    try:
        from ray._private import utils
    except ImportError:
        yield []
        return
    with _replaced(utils, {"set_sigterm_handler": _nothing}) as found:
        yield found


class _Kept(logging.Handler):
    """Keeps the errors that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.errors.append(record.exc_info[1])


@contextmanager
def errors_ray_data_ignores() -> Iterator[list[BaseException]]:
    """In the block, errors of tasks that Ray Data goes on without, up to `max_errored_blocks`, are
    added to the list: it only logs them."""
    kept, logger = _Kept(), logging.getLogger(_IGNORING)
    level, passes_on = logger.level, logger.propagate
    logger.addHandler(kept)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield kept.errors
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)
        logger.propagate = passes_on


@contextmanager
def without_idle_actors() -> Iterator[list[str]]:
    """In the block, Ray Data starts without two actors that are of no use to a Ray of one machine.

    One collects statistics for the dashboard, and takes a CPU for more than a second while the
    first films are read. The other asks for more nodes; it would take a process that was started
    for reading, and another one would have to start. Without the second, a pipeline that has only
    tasks is told of twice the CPUs. The additional tasks wait at the raylet, which knows at once
    when a CPU is free; Ray Data's loop hears of it up to 0.2 s later.

    Yields the names that were found.
    """
    with ExitStack() as both:
        yield [*both.enter_context(_no_statistics()), *both.enter_context(_no_growth())]


@contextmanager
def without_idle_training_actors() -> Iterator[list[str]]:
    """In the block, a training starts without three actors that are of no use to a Ray of one
    machine, each a process of two seconds of CPU time.

    One cleans up after a dead controller. A private Ray ends with the controller's process, so
    nothing is left to clean up. The actor asks a dashboard whether the controller is alive; without
    a dashboard it keeps asking for 40 s, and a training that ends meanwhile waits 12 s for it.
    Another one deals out Ray Data's datasets, of which our trainings have none. The third asks for
    more nodes; an elastic training keeps it, because it is told there what it may grow to.

    The controller and its workers start without environment variables of their own. Ray Train would
    give them those of the driver, which all processes of a private Ray have anyway. A process with
    variables of its own takes none of those that Ray keeps ready, and imports Ray twice: it is
    started by a program that does so to set them.

    Yields the names that were found.
    """
    try:
        from ray.train.v2._internal.execution.callback import ControllerCallback
        from ray.train.v2._internal.execution.controller import TrainController
        from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
        from ray.train.v2._internal.execution.worker_group import WorkerGroup
        from ray.train.v2.api import data_parallel_trainer
    except ImportError:
        yield []
        return
    create: Any = getattr(data_parallel_trainer, "create_scaling_policy", None)

    def asks_for_nothing(scaling_config: object) -> Any:
        policy = create(scaling_config)
        if isinstance(policy, FixedScalingPolicy):
            for name in _REQUESTS:
                if hasattr(policy, name):
                    setattr(policy, name, _nothing)
        return policy

    class OfPlainWorkers(WorkerGroup):  # type: ignore[misc]  # ray ships no types
        @staticmethod
        def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
            return custom_runtime_env

    class OfPlainProcesses(TrainController):  # type: ignore[misc]
        worker_group_cls = OfPlainWorkers

    OfPlainProcesses.__name__ = TrainController.__name__  # of the process, in `ps`

    instead = {
        "TrainController": OfPlainProcesses,
        "get_env_vars_to_propagate": _Nothing,
        "PlacementGroupCleanerCallback": ControllerCallback,
        "DatasetsCallback": lambda **_: ControllerCallback(),
        "create_scaling_policy": asks_for_nothing,
    }
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
        """Stands in for `ray.data._internal.cluster_autoscaler.ClusterAutoscaler`."""

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
    """Bytes that went through the object stores of all nodes since the Ray cluster was started.
    None if this release does not tell."""
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
    """Replace attributes of a class or module for the block. Those that it does not have are left
    out; yields the names of the others."""
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


class _Nothing(dict[str, str]):
    """Stays empty where Ray Train adds what it sets by default."""

    def setdefault(self, *_: str) -> Any: ...
