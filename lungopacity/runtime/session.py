"""The one Ray that this process is joined to: from its start, or from joining it, to its end."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lungopacity.errors import UserError, first_line
from lungopacity.runtime.processes import KEEP_FREED_MEMORY, environment
from lungopacity.runtime.ray_internals import (
    without_cleaner,
    without_idle_actors,
    without_idle_servers,
)
from lungopacity.runtime.signals import take_signals_back

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
}
_OF_ACTORS = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Ray warns of each actor that, once restarted, it may not find its arguments. Ours are the
driver's, and an actor does not outlive it. That Ray has read this, it tells by a line of its own,
whatever the format of the log: so not where CPUs of one machine do all, without actors."""


class RaySession:
    """What `ray_session` and its like do, and what they keep between them: `RAY` is the one."""

    def __init__(self) -> None:
        self.is_private = False
        """Whether it is a Ray of our own, on this machine alone."""
        self._ahead: tuple[ThreadPoolExecutor, Future[bool]] | None = None
        self._ending: Future[None] | None = None
        self._without_idle_actors: ExitStack | None = None

    @property
    def is_starting(self) -> bool:
        """Whether a `ray_ahead` is at it, in its thread."""
        return self._ahead is not None and not self._ahead[1].done()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """See `ray_session`."""
        is_ours = False
        if self._ahead is None:
            if self._ending is not None:
                self._ending.result()  # half ended, it would still look as if it ran
            is_ours = self._start()
        else:
            _, started = self._ahead
            started.result()
        take_signals_back()
        try:
            yield
        finally:
            if is_ours:
                self._end()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """See `ray_ahead`."""
        with ThreadPoolExecutor(1) as thread:
            self._ahead = thread, thread.submit(self._start)
            try:
                yield
            finally:
                self.done()

    def done(self) -> None:
        """See `done_with_ray`."""
        if self._ahead is not None:
            (thread, started), self._ahead = self._ahead, None
            self._ending = thread.submit(self._end_if_ours, started)

    def start_no_idle_actors(self) -> None:
        """Of Ray Data in a Ray of our own, until its end."""
        if self.is_private and self._without_idle_actors is None:
            self._without_idle_actors = ExitStack()
            self._without_idle_actors.enter_context(without_idle_actors())

    def _start(self) -> bool:
        """False: it was running already, and is not ours to end."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        address = os.environ.get("RAY_ADDRESS") or "local"
        if address != "local" or _has_gpu():
            for name, value in _OF_ACTORS.items():
                os.environ.setdefault(name, value)
        import ray

        if ray.is_initialized():
            return False
        if is_submission_address(address):
            raise UserError(
                f"RAY_ADDRESS is {address}, where jobs are submitted: run this with `ray job "
                "submit`, or unset it to run on this machine alone"
            )
        try:
            if address == "local":
                with environment(KEEP_FREED_MEMORY), without_idle_servers():
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray itself raises that, of a node that is not up in 30 s
            raise UserError(
                f"Ray at '{address}' cannot be joined: {first_line(error)}; "
                "check RAY_ADDRESS, or unset it to run on this machine alone"
            ) from error
        self.is_private = address == "local"
        return True

    def _end_if_ours(self, started: Future[bool]) -> None:
        if started.exception() is None and started.result():
            self._end()

    def _end(self) -> None:
        import ray

        self.is_private = False
        # Ray Data leaves references to objects behind in circles, and Ray ends this process, with 1
        # and unwritten results, where one of them is dropped while it shuts down: by whichever
        # thread the collector happens to run in.
        gc.collect()
        ray.shutdown()
        if self._without_idle_actors is not None:
            self._without_idle_actors.close()
            self._without_idle_actors = None


RAY = RaySession()
"""Ray itself allows a process one."""


@contextmanager
def ray_session() -> Iterator[None]:
    """A running Ray for the block.

    In this order: one that this process has joined already, or that `ray_ahead` starts; the
    cluster that `RAY_ADDRESS` names (set by `ray job submit`); a private one on this machine, ended
    with the block. A cluster that merely happens to run here is never joined. Raises `UserError`
    where none can be had.
    """
    with RAY.joined():
        yield


@contextmanager
def ray_ahead() -> Iterator[None]:
    """Ray starts while the block goes on, until a `ray_session` in it waits for it, and ends with
    the block: it takes four seconds, most of them spent waiting. Until then the block must not
    import Ray: two threads that do so at once see half of it.

    That Ray cannot be had is raised by the `ray_session`, not here.
    """
    with RAY.ahead():
        yield


def done_with_ray() -> None:
    """A block of `ray_ahead` has no more use for it: it ends while the block goes on."""
    RAY.done()


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def is_submission_address(address: str) -> bool:
    """Whether it is that of a dashboard, which takes jobs and joins nobody."""
    return address.startswith(("http://", "https://"))


def worker_environment(use_gpu: bool) -> dict[str, dict[str, str]]:
    """`runtime_env` of a worker in which torch computes. None in a Ray of our own, whose workers
    have it from their start: one with an environment of its own is started anew, for seconds."""
    return {} if use_gpu or RAY.is_private else {"env_vars": KEEP_FREED_MEMORY}


@contextmanager
def lean_training() -> Iterator[None]:
    """For the block in which Ray Train trains. In a Ray of our own it starts no actors for what can
    only befall a cluster: each takes a hundredth of a core, though it waits."""
    if not RAY.is_private:
        yield
        return
    with without_cleaner(), environment({"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}):
        yield


def quiet_ray_data() -> None:
    """Our own progress and errors stand in for Ray Data's bars and per-operator chatter."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    RAY.start_no_idle_actors()


@contextmanager
def quiet_about_remote_arguments() -> Iterator[None]:
    """Ray 2.60 deprecates max_retries, max_restarts and max_task_retries of its data stages,
    without a successor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        yield
