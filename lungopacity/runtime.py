"""The Ray that a command runs on: the cluster it was submitted to, or one of its own."""

from __future__ import annotations

import atexit
import importlib.metadata
import logging
import os
import platform
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from lungopacity.errors import UserError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

# Read by Ray when it is imported or started, in this process and in its workers.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Train looks for what its workers report this often; by default every 2 s, and each epoch,
    # however short, waits for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Ray warns, on every run, that a restarted actor may not find its arguments. Ours are the
    # driver's, and an actor does not outlive it.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of a process in which torch computes on a CPU, in a loop. glibc keeps what is freed
for the next step, where by default large tensors are fetched from the kernel, page by page, and
given back; and torch asks for huge pages. Other platforms ignore it."""


_told_by: int | None = None
"""The signal that told this process to end."""
_ends_on_signals = False
_ASK_AGAIN_S = 0.05


def end_on_signals() -> None:
    """Let SIGTERM, by which schedulers end a job, unwind as Ctrl-C does: leases are given back.

    And let neither raise in the middle of an import: Python drops such an exception, or worse,
    leaves the lock of all imports taken, and the thread that starts Ray waits for it for ever.
    """
    global _ends_on_signals
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _end)
    # A shell has what it runs in the background ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if not _ends_on_signals:
        # What Python no longer handles at its very end would kill it.
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    _ends_on_signals = True


def _end(number: int, frame: FrameType | None) -> None:
    global _told_by
    if number != signal.SIGALRM:
        _told_by = number
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, _ASK_AGAIN_S)
            return
        frame = frame.f_back
    end_if_told()


def end_if_told() -> None:
    """For long loops: Python drops what a signal handler raises in a destructor. Raises
    `SystemExit` after a SIGTERM, `KeyboardInterrupt` after Ctrl-C."""
    global _told_by
    if _told_by == signal.SIGINT:
        _told_by = None  # once: Python may go on to something else
        raise KeyboardInterrupt
    if _told_by is not None:
        raise SystemExit(128 + _told_by)


@contextmanager
def ray_session() -> Iterator[None]:
    """A running Ray for the block.

    In this order: one that this process has joined already, or that `ray_ahead` starts; the
    cluster that `RAY_ADDRESS` names (set by `ray job submit`); a private one on this machine, ended
    with the block. A cluster that merely happens to run here is never joined. Raises `UserError`
    where none can be had.
    """
    is_ours = False
    if _ahead is None:
        if _ending is not None:
            _ending.result()  # half ended, it would still look as if it ran
        is_ours = _start_ray()
    else:
        _, started = _ahead
        started.result()
    if _ends_on_signals:
        end_on_signals()  # Ray has put its own handler there
    try:
        yield
    finally:
        if is_ours:
            _end_ray()


@contextmanager
def ray_ahead() -> Iterator[None]:
    """Ray starts while the block goes on, until a `ray_session` in it waits for it, and ends with
    the block: it takes four seconds, most of them spent waiting. Until then the block must not
    import Ray: two threads that do so at once see half of it.

    That Ray cannot be had is raised by the `ray_session`, not here.
    """
    global _ahead
    with ThreadPoolExecutor(1) as thread:
        _ahead = thread, thread.submit(_start_ray)
        try:
            yield
        finally:
            done_with_ray()


def done_with_ray() -> None:
    """A block of `ray_ahead` has no more use for it: it ends while the block goes on."""
    global _ahead, _ending
    if _ahead is not None:
        (thread, started), _ahead = _ahead, None
        _ending = thread.submit(_end_if_ours, started)


def _end_if_ours(started: Future[bool]) -> None:
    if started.exception() is None and started.result():
        _end_ray()


_ahead: tuple[ThreadPoolExecutor, Future[bool]] | None = None
_ending: Future[None] | None = None


def _start_ray() -> bool:
    """False: it was running already, and is not ours to end."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS") or "local"
    if is_submission_address(address):
        raise UserError(
            f"RAY_ADDRESS is {address}, where jobs are submitted: run this with `ray job submit`, "
            "or unset it to run on this machine alone"
        )
    try:
        if address == "local":
            with environment(KEEP_FREED_MEMORY), _without_idle_servers():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Ray at '{address}' cannot be joined: {first_line(error)}; "
            "check RAY_ADDRESS, or unset it to run on this machine alone"
        ) from error
    global _is_private
    _is_private = address == "local"
    return True


_IDLE_SERVERS = ("start_monitor", "start_log_monitor", "start_api_server")


@contextmanager
def _without_idle_servers() -> Iterator[None]:
    """A Ray that starts in the block has no autoscaler, no reader of its logs, and no dashboard's
    server: three Python processes that do nothing for a Ray of one machine, whose dashboard is off
    and whose logs nobody reads. `ray.init` waits for the last of them, and `ray.shutdown` for each.
    And its agent takes any free port for what that dashboard would ask it: for the one that it
    takes by default, it waits 3 seconds wherever another Ray has it.
    There is no option for either; where another release calls them otherwise, all is as it was.
    """
    from ray._private.node import Node

    def with_any_agent_port(node: Any, *given: Any, **named: Any) -> Any:
        node._ray_params.dashboard_agent_listen_port = 0
        return before["start_raylet"](node, *given, **named)

    instead = {name: lambda *_, **__: None for name in _IDLE_SERVERS}
    instead["start_raylet"] = with_any_agent_port
    before = {name: vars(Node)[name] for name in instead if name in vars(Node)}
    for name in before:
        setattr(Node, name, instead[name])
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


def is_submission_address(address: str) -> bool:
    """Whether it is that of a dashboard, which takes jobs and joins nobody."""
    return address.startswith(("http://", "https://"))


def _end_ray() -> None:
    import ray

    global _is_private
    _is_private = False
    ray.shutdown()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that are set for the block: for the processes that it starts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_is_private = False


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a new process. Whatever ends the wait for it, ends it."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BaseException:
            # The pool itself would wait for its end.
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def worker_environment(use_gpu: bool) -> dict[str, dict[str, str]]:
    """`runtime_env` of a worker in which torch computes. None in a Ray of our own, whose workers
    have it from their start: one with an environment of its own is started anew, for seconds."""
    return {} if use_gpu or _is_private else {"env_vars": KEEP_FREED_MEMORY}


def quiet_ray_data() -> None:
    """Our own progress and errors stand in for Ray Data's bars and per-operator chatter."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if _is_private:
        _tell_no_statistics()
        _never_grow()


def _tell_no_statistics() -> None:
    """Ray Data starts an actor for what a dashboard would show, a process that takes a CPU for more
    than a second as the first films are read; a Ray of our own has no dashboard."""
    from ray.data._internal.stats import _StatsManager

    for name in _STATISTICS:
        if name in vars(_StatsManager):
            setattr(_StatsManager, name, staticmethod(lambda *_, **__: None))


def _never_grow() -> None:
    """Ray Data starts an actor that asks for more nodes. In a Ray of our own there are none to be
    had, and it would take a process that was started for reading: another would have to start."""
    import ray
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources

    class FixedCluster:
        """For `ray.data._internal.cluster_autoscaler.ClusterAutoscaler`."""

        def try_trigger_scaling(self) -> None: ...

        def on_executor_shutdown(self) -> None: ...

        def get_total_resources(self) -> Any:
            return ExecutionResources.from_resource_dict(ray.cluster_resources())

    if hasattr(streaming_executor, "create_cluster_autoscaler"):
        streaming_executor.create_cluster_autoscaler = lambda *_, **__: FixedCluster()


_STATISTICS = (
    "register_dataset_to_stats_actor",
    "update_execution_metrics",
    "update_iteration_metrics",
)


@contextmanager
def quiet_about_remote_arguments() -> Iterator[None]:
    """Ray 2.60 deprecates max_retries, max_restarts and max_task_retries of its data stages,
    without a successor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        yield


_grows_to: dict[str, float] = {}


def grows_to(limits: Mapping[str, float]) -> None:
    """Tell what the cluster may autoscale to, as `{"CPU": 80, "GPU": 4}`: Ray 2.60 does not."""
    _grows_to.clear()
    _grows_to.update(limits)


def may_grow() -> bool:
    """Whether `grows_to` told so."""
    return bool(_grows_to)


def capacity() -> dict[str, float]:
    """CPUs and GPUs that the cluster has, or as it was told by `grows_to`, may grow to."""
    import ray

    has = ray.cluster_resources()
    return {name: max(has.get(name, 0.0), _grows_to.get(name, 0.0)) for name in ("CPU", "GPU")}


def require_resources(cpus: float, gpus: float, what: str) -> None:
    """Refuse what the cluster can never give: Ray itself would wait for it without a word.

    Raises `UserError`.
    """
    import ray

    has, most = ray.cluster_resources(), capacity()
    for name, wanted, mend in (
        (
            "CPU",
            cpus,
            "use fewer --workers or --model-actors, or a larger cluster (of one that grows, tell "
            "--grows-to)",
        ),
        (
            "GPU",
            gpus,
            "use --no-gpu, fewer --workers or --model-actors, or a larger cluster (of one that "
            "grows, tell --grows-to)",
        ),
    ):
        if wanted > most[name]:
            now = has.get(name, 0.0)
            grown = f" and may grow to {most[name]:g}" if most[name] > now else ""
            raise UserError(
                f"{what} needs {wanted:g} {name}s, the Ray cluster has {now:g}{grown}; {mend}"
            )


def resolve_gpu(use_gpu: bool | None) -> bool:
    """None means: if the cluster has any, or may grow to have some."""
    return capacity()["GPU"] > 0 if use_gpu is None else use_gpu


def versions() -> dict[str, str]:
    """Of what decides a result; for the model folder and a run's record."""
    found = {"python": platform.python_version()}
    for name in ("lungopacity", "ray", "torch", "ncnn", "numpy", "pillow", "pydicom", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A submitted job may run from its uploaded working directory, not installed.
            found[name] = "source"
    return found
