"""Decoding in a process of its own, so that no file can end, hang or starve the task that reads it.

Image codecs are C libraries that take whatever a stranger's file holds. Here they may crash (the
file is tried once more, alone, and then has `decoder_crash`), not return (`decoder_timeout`) or
take memory (a limit of the operating system makes it `too_large`): that file alone pays for it,
and of several frames those that came before keep their rows. What the node did to it, and not the
file itself, is `unavailable`.

Bytes go to the process through anonymous files, never through a pipe that could fill up and block
both sides; orders and rows go through a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from lungopacity.archive.content import ReadSettings, content_rows, error_columns
from lungopacity.errors import ErrorCode, ImageError, Stage

_SLOTS = 4
"""Files under way at once: the process must find the next one when it is done with one."""
_BYTES_UNDER_WAY = 64 << 20
"""Of them; a larger file goes alone."""
_PATIENCE = 5.0
"""Times the CPU seconds of a file that its decoder may take by the clock, on a machine with much to
do, or waiting for what never comes."""
_MEMORY_FOR_THE_NEXT_FILM = {
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
"""Kept by glibc from film to film: it would be given back to the kernel and be fetched again, page
by page. What is larger still goes back at once."""
_START_SECONDS = 60.0
"""For the process to come up, on a machine with much to do."""
_END_SECONDS = 2.0
"""For one that has hung up to be gone: killed before, it would not tell what it died of."""

Rows = list[dict[str, Any]]
Ticket = TypeVar("Ticket")


class DecoderStartError(RuntimeError):
    """The process does not come up, as on a node without memory for it."""


@dataclass
class _Job(Generic[Ticket]):
    ticket: Ticket
    data: bytes | None
    rows: Rows = field(default_factory=list)
    slot: int = -1
    number: int = -1
    """Of its order, which each answer repeats."""
    crashes: int = 0


class Decoder:
    """The process, and the files that are with it. Used by one thread."""

    def __init__(self, settings: ReadSettings, command: Sequence[str] | None = None) -> None:
        """`command`: what to run instead of this module, for tests of what can go wrong."""
        self._settings = settings
        self._command = list(command or (sys.executable, "-m", "lungopacity.archive.decoder"))
        self._files = [_anonymous_file() for _ in range(_SLOTS)]
        self.cpu_seconds = 0.0
        """Of decoding, so far; what crashed or hung is not counted."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._numbers = itertools.count()

    def rows(self, files: Iterable[tuple[Ticket, bytes | None]]) -> Iterator[tuple[Ticket, Rows]]:
        """The content rows of each file, in order; a ticket without bytes comes without rows."""
        waiting: deque[_Job[Ticket]] = deque()
        for ticket, data in files:
            job = _Job(ticket, data)
            while data is not None and not self._has_room(waiting, len(data)):
                yield self._finished(waiting)
            if data is not None:
                self._start(job, waiting)
            waiting.append(job)
            while waiting and waiting[0].data is None:
                done = waiting.popleft()
                yield done.ticket, done.rows
        while waiting:
            yield self._finished(waiting)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._end_process()
        for file in self._files:
            os.close(file)
        self._files = []

    @staticmethod
    def _has_room(waiting: deque[_Job[Ticket]], size: int) -> bool:
        under_way = [len(job.data) for job in waiting if job.data is not None]
        return not under_way or (
            len(under_way) < _SLOTS and sum(under_way) + size <= _BYTES_UNDER_WAY
        )

    def _start(self, job: _Job[Ticket], waiting: Iterable[_Job[Ticket]]) -> None:
        taken = {other.slot for other in waiting if other.data is not None}
        job.slot = next(slot for slot in range(_SLOTS) if slot not in taken)
        self._order(job)

    def _order(self, job: _Job[Ticket]) -> None:
        """Hand the file to the process; where there is no room for its bytes, that is its row."""
        assert job.data is not None
        connection = self._running()
        file = self._files[job.slot]
        view = memoryview(job.data)
        written = 0
        try:
            while written < len(view):
                written += os.pwrite(file, view[written:], written)
        except OSError as error:
            os.ftruncate(file, 0)
            told = f"no room to hand it to its decoder: {error.strerror}"
            job.rows.append(_failed(job, ErrorCode.UNAVAILABLE, told))
            job.data = None
            return
        job.number = next(self._numbers)
        with contextlib.suppress(OSError):
            # A process that has just died is noticed when its rows are awaited.
            connection.send_bytes(pickle.dumps((job.number, job.slot, len(view))))

    def _finished(self, waiting: deque[_Job[Ticket]]) -> tuple[Ticket, Rows]:
        """Wait for the oldest file's rows."""
        job = waiting[0]
        if job.data is not None:
            try:
                self._receive(job)
            except (EOFError, OSError):
                self._mend(job, waiting)
            if job.data is not None and len(job.data) > _BYTES_UNDER_WAY // _SLOTS:
                os.ftruncate(self._files[job.slot], 0)
        waiting.popleft()
        return job.ticket, job.rows

    def _receive(self, job: _Job[Ticket]) -> None:
        if self._connection is None:
            raise EOFError
        job.rows = []
        seconds = None
        while seconds is None:
            try:
                number, rows, seconds = pickle.loads(self._connection.recv_bytes())
            except BlockingIOError as error:
                # The clock starts anew with each frame: a long film is no hanging decoder.
                raise TimeoutError from error
            if number != job.number:
                raise EOFError  # another file's rows: this one's order was lost
            job.rows += rows
        self.cpu_seconds += seconds

    def _mend(self, job: _Job[Ticket], waiting: deque[_Job[Ticket]]) -> None:
        """The process is gone, or hangs, and `job` was its work. Start another for what waits."""
        out_of_time = isinstance(sys.exc_info()[1], TimeoutError)
        returncode = self._end_process(at_once=out_of_time)
        job.crashes += 1
        limit = self._settings.limits.max_seconds
        if returncode == -signal.SIGPROF:
            told = f"took more than {limit:g} CPU seconds"
            job.rows.append(_failed(job, ErrorCode.DECODER_TIMEOUT, told))
        elif out_of_time:
            told = f"no answer in {_PATIENCE * limit:g} s, nor {limit:g} s of CPU time in them"
            job.rows.append(_failed(job, ErrorCode.UNAVAILABLE, told))
        elif job.crashes > 1 and returncode == -signal.SIGKILL:
            told = "its decoder was killed, as a node does that is short of memory"
            job.rows.append(_failed(job, ErrorCode.UNAVAILABLE, told))
        elif job.crashes > 1:
            told = f"its process died ({_told(returncode)})"
            job.rows.append(_failed(job, ErrorCode.DECODER_CRASH, told))
        else:
            # Alone, to be sure that it is the cause; what waits is ordered again after it. In its
            # own slot: the others' are not free.
            self._order(job)
            if job.data is not None:
                try:
                    self._receive(job)
                except (EOFError, OSError):
                    self._mend(job, deque())
        for other in waiting:
            if other is not job and other.data is not None:
                self._order(other)

    def _running(self) -> Connection:
        if self._connection is None:
            try:
                self._process, self._connection = self._started()
            except OSError as error:
                raise DecoderStartError(
                    f"the decoder's process does not start ({error.strerror})"
                ) from error
        return self._connection

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        import socket

        ours, theirs = socket.socketpair()
        # The system's own clock on a read costs nothing; to poll before each costs as much as it.
        patience = _PATIENCE * self._settings.limits.max_seconds
        whole, rest = divmod(patience, 1)
        ours.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(rest * 1e6))
        )
        environment = {
            **os.environ,
            # In a submitted job the package may lie in a working directory of the cluster's making.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # One core is what the task has asked the cluster for.
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            **_MEMORY_FOR_THE_NEXT_FILM,
        }
        with theirs:
            process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), *map(str, self._files)],
                env=environment,
                stdin=subprocess.DEVNULL,
                # Codecs write to the terminal as they like, bytes of the file included.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *self._files),
            )
        connection = Connection(ours.detach())
        try:
            connection.send(self._settings)
            if not connection.poll(_START_SECONDS) or connection.recv() != "ready":
                raise EOFError
        except (EOFError, OSError) as error:
            connection.close()
            process.kill()
            # Nothing to do with any file: the task must fail, and be tried elsewhere.
            raise DecoderStartError(
                f"the decoder's process does not start ({_told(process.wait())})"
            ) from error
        return process, connection

    def _end_process(self, at_once: bool = True) -> int:
        """Its exit code. `at_once`: do not wait for a process that is ending by itself."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is None:
            return 0
        try:
            self._process.wait(0 if at_once else _END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        returncode = self._process.wait()
        self._process = None
        return returncode


_idle: dict[ReadSettings, Decoder] = {}


@contextlib.contextmanager
def borrowed_decoder(settings: ReadSettings) -> Iterator[Decoder]:
    """A decoder of this process, kept for the next task: starting one takes a third of a second."""
    decoder = _idle.pop(settings, None) or Decoder(settings)
    try:
        yield decoder
    except BaseException:
        # Left in the middle of its work, it would answer the next task with this one's rows.
        decoder.close()
        raise
    previous = _idle.pop(settings, None)
    if previous is not None:
        previous.close()
    for other in list(_idle):
        _idle.pop(other).close()
    _idle[settings] = decoder


def serve(
    arguments: Sequence[str],
    rows_of: Callable[[bytes, ReadSettings], Iterator[dict[str, Any]]] = content_rows,
) -> None:
    """The process's side: orders in, rows out, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection = Connection(int(arguments[0]))
    files = [int(argument) for argument in arguments[1:]]
    with contextlib.suppress(EOFError, OSError):
        settings: ReadSettings = connection.recv()
        _limit_memory(settings.limits.max_memory_bytes)
        connection.send("ready")
        while True:
            number, slot, length = pickle.loads(connection.recv_bytes())
            rows = rows_of(_read(files[slot], length), settings)
            # Of the thread: while the alarm below runs, Linux tells a process's time by ticks, and
            # forgets what fits between two of them.
            began = time.thread_time()
            last: Rows = []
            while True:
                # Of CPU time, so that a busy neighbour fails no film; SIGPROF ends the process even
                # inside a codec.
                signal.setitimer(signal.ITIMER_PROF, settings.limits.max_seconds)
                row = next(rows, None)
                signal.setitimer(signal.ITIMER_PROF, 0)
                if row is None:
                    break
                if row.get("frame") is None:
                    last.append(row)
                else:
                    # At once: the next frame may end the process.
                    connection.send_bytes(pickle.dumps((number, [row], None)))
            # With the last row, that it is the last: most files have one, and need one message.
            connection.send_bytes(pickle.dumps((number, last, time.thread_time() - began)))


def _limit_memory(size_bytes: int) -> None:
    # Of private memory, not of addresses: libraries map far more than they ever touch.
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size_bytes, hard))


def _read(file: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length:
        piece = os.pread(file, length, sum(map(len, pieces)))
        if not piece:
            raise EOFError  # no clock runs here that would end a wait for what never comes
        pieces.append(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lungopacity")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _failed(job: _Job[Any], code: ErrorCode, message: str) -> dict[str, Any]:
    """The row of a file, or of its first frame that did not come."""
    facts: dict[str, object] = {"content_sha256": hashlib.sha256(job.data or b"").hexdigest()}
    if job.rows:
        facts["frame"] = len(job.rows)
        message = f"{message}; frames behind this one were not tried"
    return error_columns(ImageError(code, Stage.DECODE, message, facts))


def _told(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


if __name__ == "__main__":
    serve(sys.argv[1:])
