"""Decodes in a process of its own, so that no file can kill, hang or starve the task that reads it.

Image codecs are C libraries that are given whatever a stranger's file holds. In that process they
may crash (the file is tried once more, alone, and then gets `decoder_crash`), not return
(`decoder_timeout`) or take too much memory (the operating system's limit makes it `too_large`).
Only that file is affected, and its frames that were decoded before keep their rows. If the node was
the reason, and not the file, the code is `unavailable`.

Bytes go to the process through anonymous files, not through a pipe, which could fill up and block
both sides. Orders and rows go through a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import resource
import signal
import socket
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
"""Files that the process is given at once, so that it never waits for the next one."""
_BYTES_UNDER_WAY = 64 << 20
"""Size of those files together; a larger file goes alone."""
_PATIENCE = 5.0
"""The decoder may take this many times the CPU seconds of a file by the clock: the machine may be
busy, or the decoder may wait for ever."""
_MEMORY_FOR_THE_NEXT_FILM = {
    "MALLOC_MMAP_MAX_": "65536",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
"""Makes glibc keep memory from film to film, instead of returning it to the kernel and fetching it
again page by page. Larger pieces are still returned at once."""
_START_SECONDS = 60.0
"""The process must start within this time, even on a busy machine."""
_END_SECONDS = 2.0
"""Time for a process that closed its socket to end: killed earlier, it would not show what it died
of."""

Rows = list[dict[str, Any]]
Ticket = TypeVar("Ticket")


class DecoderStartError(RuntimeError):
    """The process does not start, for example because the node lacks memory."""


@dataclass
class _Job(Generic[Ticket]):
    ticket: Ticket
    data: bytes | None
    rows: Rows = field(default_factory=list)
    slot: int = -1
    number: int = -1
    """The number of its order, which each answer repeats."""
    crashes: int = 0


class Decoder:
    """The process, and the files that it was given. For use by one thread."""

    def __init__(self, settings: ReadSettings, command: Sequence[str] | None = None) -> None:
        """`command`: run this instead of the module, to test failures."""
        self._settings = settings
        self._command = list(command or (sys.executable, "-m", "lungopacity.archive.decoder"))
        self._files = [_anonymous_file() for _ in range(_SLOTS)]
        self.cpu_seconds = 0.0
        """CPU time of decoding so far, without files that crashed or hung."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._numbers = itertools.count()

    def rows(self, files: Iterable[tuple[Ticket, bytes | None]]) -> Iterator[tuple[Ticket, Rows]]:
        """Each ticket with the content rows of its file, in order; without rows if it has no
        bytes."""
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
        """Give the file to the process. If there is no space for its bytes, its row says so."""
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
            node = socket.gethostname()
            why = f"no space on {node} to pass it to the decoder: {error.strerror}"
            job.rows.append(_failed(job, ErrorCode.UNAVAILABLE, why))
            job.data = None
            return
        job.number = next(self._numbers)
        with contextlib.suppress(OSError):
            # If the process has just died, `_receive` notices.
            connection.send_bytes(pickle.dumps((job.number, job.slot, len(view))))

    def _finished(self, waiting: deque[_Job[Ticket]]) -> tuple[Ticket, Rows]:
        """Wait for the oldest file's rows."""
        job = waiting[0]
        if job.data is not None:
            try:
                self._receive(job)
            except (EOFError, OSError):
                self._recover(job, waiting)
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
                # The clock starts again with each frame: a file of many frames may take long.
                raise TimeoutError from error
            if number != job.number:
                raise EOFError  # rows of another file: the order of this one was lost
            job.rows += rows
        self.cpu_seconds += seconds

    def _recover(self, job: _Job[Ticket], waiting: deque[_Job[Ticket]]) -> None:
        """The process died or hangs, and `job` was its work: try `job` again, or write its error
        row, and order the other waiting files again from a new process. To be called while the
        exception of `_receive` is handled."""
        out_of_time = isinstance(sys.exc_info()[1], TimeoutError)
        returncode = self._end_process(at_once=out_of_time)
        job.crashes += 1
        limit = self._settings.limits.max_seconds
        if returncode == -signal.SIGPROF:
            why = f"took more than {limit:g} s of CPU time"
            job.rows.append(_failed(job, ErrorCode.DECODER_TIMEOUT, why))
        elif out_of_time:
            why = f"no answer in {_PATIENCE * limit:g} s, with less than {limit:g} s of CPU time"
            job.rows.append(_failed(job, ErrorCode.UNAVAILABLE, why))
        elif job.crashes > 1 and returncode == -signal.SIGKILL:
            why = "the decoder was killed, as happens on a node that is short of memory"
            job.rows.append(_failed(job, ErrorCode.UNAVAILABLE, why))
        elif job.crashes > 1:
            why = f"the decoder's process died ({_ended_by(returncode)})"
            job.rows.append(_failed(job, ErrorCode.DECODER_CRASH, why))
        else:
            # Alone, to be sure that it is the cause, and in its own slot: the others are taken.
            self._order(job)
            if job.data is not None:
                try:
                    self._receive(job)
                except (EOFError, OSError):
                    self._recover(job, deque())
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
        ours, theirs = socket.socketpair()
        # A timeout of the socket costs nothing; polling before each read would double its cost.
        patience = _PATIENCE * self._settings.limits.max_seconds
        whole, rest = divmod(patience, 1)
        ours.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(rest * 1e6))
        )
        environment = {
            **os.environ,
            # In a submitted job the package may be in a working directory that the cluster made.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # The task has reserved one core.
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            **_MEMORY_FOR_THE_NEXT_FILM,
        }
        with theirs:
            process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), *map(str, self._files)],
                env=environment,
                stdin=subprocess.DEVNULL,
                # Codecs write what they like to the terminal, even bytes of the file.
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
            # No file is the reason: the task must fail, and be tried elsewhere.
            raise DecoderStartError(
                f"the decoder's process does not start ({_ended_by(process.wait())})"
            ) from error
        return process, connection

    def _end_process(self, at_once: bool = True) -> int:
        """End the process, and return its exit code. `at_once`: kill it without giving it time to
        end by itself."""
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
    """A decoder that is kept for the next task of this process with the same settings: starting one
    takes a third of a second."""
    decoder = _idle.pop(settings, None) or Decoder(settings)
    try:
        yield decoder
    except BaseException:
        # A decoder in the middle of its work would answer the next task with rows of this one.
        decoder.close()
        raise
    for other in list(_idle):
        _idle.pop(other).close()
    _idle[settings] = decoder


def serve(
    arguments: Sequence[str],
    rows_of: Callable[[bytes, ReadSettings], Iterator[dict[str, Any]]] = content_rows,
) -> None:
    """The process's side: takes orders and sends rows until the other side is gone.

    arguments: the socket's file descriptor, then those of the anonymous files, one for each slot.
    rows_of: `content_rows`, or what replaces it in tests.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
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
            # The thread's time: while the alarm below runs, Linux counts a process's time in ticks,
            # and misses what fits between two of them.
            began = time.thread_time()
            last: Rows = []
            while True:
                # An alarm of CPU time, so that a busy machine fails no film. SIGPROF ends the
                # process even inside a codec.
                signal.setitimer(signal.ITIMER_PROF, settings.limits.max_seconds)
                row = next(rows, None)
                signal.setitimer(signal.ITIMER_PROF, 0)
                if row is None:
                    break
                if row.get("frame") is None:
                    last.append(row)
                else:
                    # At once, because the next frame may kill the process.
                    connection.send_bytes(pickle.dumps((number, [row], None)))
            # The seconds mark the end. They go with the row of a single image, so that most files
            # need one message.
            connection.send_bytes(pickle.dumps((number, last, time.thread_time() - began)))


def _limit_memory(size_bytes: int) -> None:
    # Limits private memory, not addresses: libraries map far more than they ever touch.
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size_bytes, hard))


def _read(file: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length:
        piece = os.pread(file, length, sum(map(len, pieces)))
        if not piece:
            raise EOFError  # waiting would never end: no timeout applies here
        pieces.append(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lungopacity")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _failed(job: _Job[Any], code: ErrorCode, message: str) -> dict[str, Any]:
    """The error row of a file, or of its first frame without a row."""
    facts: dict[str, object] = {"content_sha256": hashlib.sha256(job.data or b"").hexdigest()}
    if job.rows:
        facts["frame"] = len(job.rows)
        message = f"{message}; later frames were not tried"
    return error_columns(ImageError(code, Stage.DECODE, message, facts))


def _ended_by(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"


if __name__ == "__main__":
    serve(sys.argv[1:])
