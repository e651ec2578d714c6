"""The one Ray that this process uses, from starting or joining it to its end."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from threading import Event
from types import SimpleNamespace

from lungopacity.errors import UserError, first_line
from lungopacity.runtime.container import own_cpus
from lungopacity.runtime.head_watch import HeadWatch
from lungopacity.runtime.processes import KEEP_FREED_MEMORY, environment
from lungopacity.runtime.ray_internals import (
    close_session_folder,
    forget_token,
    without_idle_actors,
    without_idle_servers,
    without_idle_training_actors,
    without_signal_handlers,
)
from lungopacity.runtime.signals import (
    end_if_told,
    native_handlers_kept,
    signals_are_ours,
    signals_wait,
    take_signals_back,
)

# Read by Ray when it is imported or started, in this process and in its workers.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # How often Ray Train looks for reports of its workers. Each epoch, however short, waits for
    # that, and the default is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}
_WHERE_ALONE = {
    # Nobody announces to a private Ray that its node will be taken away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # What Ray Train sets for its controller, to which `lean_training` gives no variables.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    **KEEP_FREED_MEMORY,
}
"""Of the processes of a private Ray."""
SHORTER_FOLDER = "set RAY_TMPDIR to a folder with a shorter path, such as /tmp"
LONGEST_FOLDER = 39
"""Letters in the path of RAY_TMPDIR, or TMPDIR, so that those of Ray's sockets have at most 107."""
_WITH_ACTORS = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Silences Ray's warning that an actor, once restarted, may not find its arguments: our arguments
belong to the driver, which no actor outlives. Ray prints a line of its own that it has read this
variable, whatever the log format; so it is not set where the CPUs of one machine do all the work,
which takes no actors."""


class RaySession:
    """What `ray_session` and its like do, and the state they share. `RAY` is the only instance."""

    def __init__(self) -> None:
        self.is_private = False
        """Whether this is a private Ray, on this machine alone."""
        self._ahead: tuple[ThreadPoolExecutor, Future[bool]] | None = None
        self._wanted = Event()
        """Somebody waits until Ray runs, or no longer needs it."""
        self._launched = Event()
        """Ray's own processes were started, or will not be."""
        self._first_imports: tuple[str, ...] = ()
        self._head: HeadWatch | None = None
        self._ending: Future[None] | None = None
        self._without_idle_actors: ExitStack | None = None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """See `ray_session`."""
        self._wanted.set()
        is_ours = False
        if self._ahead is None:
            if self._ending is not None:
                self._ending.result()  # a Ray that is half ended still looks as if it ran
            is_ours = self._start()
        else:
            _, started = self._ahead
            started.result()
        take_signals_back()
        try:
            end_if_told()
            yield
        finally:
            if is_ours:
                self._end()

    @contextmanager
    def ahead(self, first_imports: Sequence[str]) -> Iterator[None]:
        """See `ray_ahead`."""
        self._wanted.clear()
        self._launched.clear()
        self._first_imports = tuple(first_imports)
        with ThreadPoolExecutor(1) as thread:
            self._ahead = thread, thread.submit(self._start)
            try:
                # What the block imports would hold up the import of Ray, and so its processes,
                # which have other cores to themselves.
                self._launched.wait()
                yield
            finally:
                self.done()

    def done(self) -> None:
        """See `done_with_ray`."""
        self._wanted.set()
        if self._ahead is not None:
            (thread, started), self._ahead = self._ahead, None
            self._ending = thread.submit(self._end_if_ours, started)

    def start_no_idle_actors(self) -> None:
        """If Ray is private, let Ray Data start no idle actors until Ray ends."""
        if self.is_private and self._without_idle_actors is None:
            self._without_idle_actors = ExitStack()
            self._without_idle_actors.enter_context(without_idle_actors())

    def _start(self) -> bool:
        """Start or join Ray. False: Ray was running already, and is not ours to end."""
        try:
            is_ours = self._start_or_join()
        finally:
            self._launched.set()
        if is_ours and self.is_private and self._ahead is not None:
            self._import_first()
        return is_ours

    def _start_or_join(self) -> bool:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        address = os.environ.get("RAY_ADDRESS") or "local"
        if address != "local" or _has_gpu():
            for name, value in _WITH_ACTORS.items():
                os.environ.setdefault(name, value)
        import ray

        if ray.is_initialized():
            return False
        if is_submission_address(address):
            raise UserError(
                f"RAY_ADDRESS is {address}, an address for submitting jobs; run this with `ray job "
                "submit`, or unset it to run on this machine alone"
            )
        forget_token()
        try:
            if address == "local":
                # Ray would keep its token in the home folder, which may be read-only, in a file
                # that others may be able to read.
                token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
                # Signals wait a few seconds: a Ray that is half started crashes when it ends.
                with (
                    environment(_WHERE_ALONE | token),
                    without_idle_servers(self._when_launched),
                    _signals_stay_ours(),
                    signals_wait(),
                ):
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
                close_session_folder()
            else:
                self._launched.set()
                with _signals_stay_ours():
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises this very type for a node that is not up in 30 s
            end_if_told()
            if address == "local":
                why = first_line(error)
                fix = "try again, or check its free space with `lungopacity doctor`"
                if "path length" in why:  # of a socket in Ray's folder
                    fix = SHORTER_FOLDER
                raise UserError(f"Ray cannot be started on this machine: {why}; {fix}") from error
            why = first_line(error)
            if why.endswith(":"):  # the versions of Ray and Python here and there follow
                why = " ".join(str(error).split())
            raise UserError(
                f"Ray at '{address}' cannot be joined: {why}; "
                "check RAY_ADDRESS, or unset it to run on this machine alone"
            ) from error
        self.is_private = address == "local"
        if not self.is_private:
            self._head = HeadWatch(ray.get_runtime_context().gcs_address)
            self._head.start()
        return True

    def _when_launched(self) -> None:
        self._launched.set()
        if self._ahead is None:
            import_module("ray.data")

    def _import_first(self) -> None:
        """Import `ray.data` here, and meanwhile in each worker what its first task needs."""
        import ray

        importing = ray.remote(num_cpus=1, max_retries=0)(_import_each)
        for _ in range(own_cpus()):
            importing.remote(self._first_imports)
        # In the thread that starts Ray: another could see half of its modules. And not while the
        # block of `ray_ahead` does other work: DuckDB uses pandas even if half of it is imported.
        self._wanted.wait()
        if self._ahead is not None:
            import_module("ray.data")

    def _end_if_ours(self, started: Future[bool]) -> None:
        if started.exception() is None and started.result():
            self._end()

    def _end(self) -> None:
        import ray

        self.is_private = False
        if self._head is not None:
            self._head.stop()
            self._head = None
        # Ray Data leaves object references behind in reference cycles. If the garbage collector, in
        # whichever thread it runs, drops one while Ray shuts down, Ray ends this process with exit
        # code 1 and unwritten results.
        gc.collect()
        ray.shutdown()
        if self._without_idle_actors is not None:
            self._without_idle_actors.close()
            self._without_idle_actors = None


RAY = RaySession()
"""Ray itself allows only one in a process."""


@contextmanager
def ray_session() -> Iterator[None]:
    """A running Ray for the block.

    It is the first of these: one that this process has already joined, or that `ray_ahead` starts;
    the cluster that `RAY_ADDRESS` names (set by `ray job submit`); a private one on this machine,
    which ends with the block. A cluster that merely happens to run here is never joined. Raises
    `UserError` if Ray cannot be started or joined.
    """
    with RAY.joined():
        yield


@contextmanager
def ray_ahead(first_imports: Sequence[str] = ()) -> Iterator[None]:
    """Start Ray in a thread while the block runs; Ray ends with the block.

    Starting takes a few seconds, most of them spent waiting. A `ray_session` in the block waits for
    it, and raises the error if Ray cannot be started or joined. Until then the block must not
    import Ray: two threads that import it at once see half of it. `first_imports`: modules that the
    workers of a private Ray import before their first task.
    """
    with RAY.ahead(first_imports):
        yield


def done_with_ray() -> None:
    """Say that a block of `ray_ahead` needs Ray no longer: Ray ends while the block goes on."""
    RAY.done()


@contextmanager
def _signals_stay_ours() -> Iterator[None]:
    """For `ray.init`. Where our handlers are not in place, Ray puts its own there: they end the
    processes that it has started."""
    if not signals_are_ours():
        yield
        return
    with without_signal_handlers(), native_handlers_kept():
        yield


def _import_each(modules: Sequence[str]) -> None:
    # An error is left to the task that needs the module, and is told there.
    for name in modules:
        with suppress(Exception):
            import_module(name)


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def is_submission_address(address: str) -> bool:
    """Whether it is the address of a dashboard, which accepts jobs but cannot be joined."""
    return address.startswith(("http://", "https://"))


def worker_environment(use_gpu: bool) -> dict[str, dict[str, str]]:
    """`runtime_env` of a worker in which torch computes. Empty on a GPU, and in a private Ray,
    whose workers have these variables from their start: a worker with an environment of its own
    would take seconds to start."""
    return {} if use_gpu or RAY.is_private else {"env_vars": KEEP_FREED_MEMORY}


@contextmanager
def lean_training() -> Iterator[None]:
    """For the block in which Ray Train trains. In a private Ray, it starts no actors for what only
    a cluster has: each takes a hundredth of a core while it waits."""
    if not RAY.is_private:
        yield
        return
    with without_idle_training_actors():
        yield


def quiet_ray_data() -> None:
    """Turn off Ray Data's bars and messages, for which we have our own, its idle actors, and its
    search for issues, whose modules every worker would import with the settings of its tasks."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config = SimpleNamespace(detectors=[])
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    RAY.start_no_idle_actors()


@contextmanager
def quiet_about_remote_arguments() -> Iterator[None]:
    """Silence a warning in the block: Ray 2.60 deprecates max_retries, max_restarts and
    max_task_retries of its data stages, and names no successor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        yield
