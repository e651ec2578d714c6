"""The run itself: reads every input in another process, measures it, and prints tables."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import logging
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from lungopacity.archive import decoder
from lungopacity.archive.inventory import take_inventory
from lungopacity.errors import ErrorCode
from lungopacity.progress import Progress
from tests.fuzz.bombs import MIB
from tests.fuzz.fixtures import all_fixtures
from tests.fuzz.inputs import broken_conditions, input_of, outcome_of, rows_of

MAX_SECONDS = 10.0
MAX_MEMORY_BYTES = 2 << 30
_SLOW_SECONDS = 5.0
_HANGS_SECONDS = 120.0
_BATCH = 100


@dataclass
class Outcome:
    """What became of one input."""

    number: int
    kind: str
    mutation: str
    name: str
    size_bytes: int
    outcome: str = ""
    rows: int = 0
    seconds: float = 0.0
    """By the clock."""
    cpu_seconds: float = 0.0
    """Of both processes: what it would take on an otherwise idle machine."""
    own_bytes: int = 0
    """Peak memory of the process that reads."""
    decoder_bytes: int = 0
    """Peak memory of the decoder's process."""
    broken: list[str] = field(default_factory=list)


def resident_bytes(pid: int | str = "self", what: str = "VmRSS") -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak_bytes(pid: int | str) -> int:
    return resident_bytes(pid, "VmHWM")


def _forget_peak(pid: int | str) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _decoder_pids() -> list[int]:
    return [found._process.pid for found in decoder._idle.values() if found._process is not None]


def _cpu_seconds(pids: list[int]) -> float:
    """CPU time of this process, its children that have ended, and those still running (`pids`)."""
    used = sum(os.times()[:4])
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _read_alone(folder: Path, objects: pa.Table, outcome: Outcome) -> list[dict]:
    before = _decoder_pids()
    for pid in ("self", *before):
        _forget_peak(pid)
    started, cpu_started = time.monotonic(), _cpu_seconds(before)
    rows = rows_of(folder, objects)
    outcome.seconds = time.monotonic() - started
    outcome.cpu_seconds = _cpu_seconds(_decoder_pids()) - cpu_started
    outcome.own_bytes = _peak_bytes("self")
    after = _decoder_pids()
    outcome.decoder_bytes = max(map(_peak_bytes, after), default=0)
    if before and before != after:
        # The peak of a process that has died is known only to its parent.
        died = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        outcome.decoder_bytes = max(outcome.decoder_bytes, died)
    outcome.outcome = outcome_of(rows)
    outcome.rows = sum(row["shard_rows"] is None for row in rows)
    outcome.broken += broken_conditions(rows)
    timed_out = any(row["error_code"] == ErrorCode.DECODER_TIMEOUT for row in rows)
    if outcome.cpu_seconds > MAX_SECONDS or timed_out:
        outcome.broken.append(f"took {outcome.cpu_seconds:.1f} s of CPU")
    if max(outcome.own_bytes, outcome.decoder_bytes) > MAX_MEMORY_BYTES:
        outcome.broken.append("took more than 2 GiB")
    return rows


def _work(connection: Connection) -> None:
    """Read the objects of each folder that comes in, first each alone, then all as one task reads
    them: the rows must be the same, whatever the neighbours do to the decoder."""
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(EOFError):
        while True:
            folder, outcomes = connection.recv()
            objects = take_inventory(str(folder)).objects
            alone = []
            for index, outcome in enumerate(outcomes):
                connection.send(outcome.number)
                try:
                    alone.append(_read_alone(folder, objects.slice(index, 1), outcome))
                except Exception:
                    outcome.broken.append(f"raised {traceback.format_exc()}")
                    alone.append([])
                connection.send(outcome)
            connection.send(range(outcomes[0].number, outcomes[-1].number + 1))
            together: dict[str, list[dict]] = {outcome.name: [] for outcome in outcomes}
            for row in rows_of(folder, objects):
                together[row["image"]].append(row)
            for outcome, rows in zip(outcomes, alone, strict=True):
                if not outcome.broken and _without_reading(rows) != _without_reading(
                    together[outcome.name]
                ):
                    outcome.broken.append("other rows among others than alone")
                    connection.send(outcome)
            connection.send(None)


def _without_reading(rows: list[dict]) -> list[dict]:
    return [row | {"reading": None} for row in rows]


class _Reader:
    """The reading process, and its replacement when it has died. Inputs are made outside it, so
    that its memory is that of reading."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._worker: Any = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self, folder: Path, outcomes: list[Outcome]) -> Iterator[Outcome]:
        """Yield the outcomes, filled in. One comes again if reading the whole batch adds to it."""
        while outcomes:
            if self._worker is None:
                self._start()
            self._ours.send((folder, outcomes))
            at: int | range = outcomes[0].number
            try:
                while True:
                    patience = 1 if isinstance(at, int) else 10
                    if not self._ours.poll(_HANGS_SECONDS * patience):
                        raise TimeoutError
                    found = self._ours.recv()
                    if found is None:
                        return
                    if isinstance(found, Outcome):
                        yield found
                    else:
                        at = found
            except (EOFError, OSError, TimeoutError) as error:
                exit_code = self._end()
                ended = "hangs" if isinstance(error, TimeoutError) else f"died ({exit_code})"
                lost = at if isinstance(at, int) else at.stop - 1
                (guilty,) = (outcome for outcome in outcomes if outcome.number == lost)
                guilty.outcome = "ended the process"
                what = "" if isinstance(at, int) else f" while {at} were read together"
                guilty.broken.append(f"the reading process {ended}{what}")
                yield guilty
                for outcome in outcomes:
                    if outcome.number <= lost:
                        (folder / outcome.name).unlink()
                outcomes = [outcome for outcome in outcomes if outcome.number > lost]

    def _start(self) -> None:
        self._ours, theirs = self._context.Pipe()
        self._worker = self._context.Process(target=_work, args=(theirs,))
        self._worker.start()
        theirs.close()

    def _end(self) -> int | None:
        if self._worker is None:
            return None
        self._ours.close()
        self._worker.join(2)
        self._worker.kill()
        self._worker.join()
        exit_code: int | None = self._worker.exitcode
        self._worker = None
        return exit_code


def _outcomes(seed: int, numbers: range, scratch: Path) -> Iterator[Outcome]:
    with _Reader() as reader:
        for first in range(numbers.start, numbers.stop, _BATCH):
            folder = scratch / f"{first:06d}"
            folder.mkdir(parents=True)
            outcomes = []
            for number in range(first, min(first + _BATCH, numbers.stop)):
                made = input_of(seed, number)
                name = f"{number:06d}-{made.name}"
                (folder / name).write_bytes(made.data)
                outcomes.append(Outcome(number, made.kind, made.mutation, name, len(made.data)))
            yield from reader.read(folder, outcomes)
            shutil.rmtree(folder)


def _is_kept(outcome: Outcome) -> bool:
    crashed = outcome.outcome in (ErrorCode.DECODER_CRASH, ErrorCode.DECODER_TIMEOUT)
    return bool(outcome.broken or crashed or outcome.cpu_seconds > _SLOW_SECONDS)


def _table(outcomes: list[Outcome]) -> Iterator[str]:
    counts = Counter((outcome.kind, outcome.outcome) for outcome in outcomes)
    kinds = sorted({kind for kind, _ in counts})
    yield "| outcome | " + " | ".join(kinds) + " | all |"
    yield "|---|" + "---:|" * (len(kinds) + 1)
    for code in sorted({code for _, code in counts}):
        row = [counts[kind, code] for kind in kinds]
        yield f"| {code} | " + " | ".join(str(count or "") for count in row) + f" | {sum(row)} |"
    totals = [sum(outcome.kind == kind for outcome in outcomes) for kind in kinds]
    yield "| all | " + " | ".join(map(str, totals)) + f" | {len(outcomes)} |"


def _listed(title: str, outcomes: list[Outcome]) -> Iterator[str]:
    yield f"\n{title}"
    for found in outcomes:
        yield (
            f"  {found.number}: {found.seconds:.2f} s ({found.cpu_seconds:.2f} of CPU), "
            f"reader {found.own_bytes // MIB} MiB, decoder {found.decoder_bytes // MIB} MiB, "
            f"{found.size_bytes} bytes, {found.kind}, "
            f"{found.mutation}, {found.name}: {found.outcome} ({found.rows} rows)"
            + "".join(f"\n      {line}" for line in found.broken)
        )


def report(outcomes: list[Outcome]) -> str:
    crashed = [found for found in outcomes if found.outcome == ErrorCode.DECODER_CRASH]
    timed_out = [found for found in outcomes if found.outcome == ErrorCode.DECODER_TIMEOUT]

    def top(key: Callable[[Outcome], float]) -> list[Outcome]:
        return sorted(outcomes, key=key, reverse=True)[:10]

    return "\n".join(
        (
            *_table(outcomes),
            f"\n{sum(found.rows for found in outcomes)} rows",
            *_listed("Slowest", top(lambda found: found.cpu_seconds)),
            *_listed("Most memory of the reading process", top(lambda found: found.own_bytes)),
            *_listed("Most memory of the decoder", top(lambda found: found.decoder_bytes)),
            *_listed(f"Decoder crashed: {len(crashed)}", crashed[:50]),
            *_listed(f"Decoder timed out: {len(timed_out)}", timed_out[:50]),
            *_listed("Broken conditions", [found for found in outcomes if found.broken]),
        )
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where odd inputs are kept")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fixtures = all_fixtures()
    digest = hashlib.sha256(b"".join(fixture.data for fixture in fixtures)).hexdigest()
    print(
        f"seed {options.seed}, {len(set(fixtures))} fixtures with digest {digest[:16]}", flush=True
    )
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "kept").mkdir(parents=True, exist_ok=True)
    found: dict[int, Outcome] = {}
    numbers = range(options.first, options.first + options.inputs)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        Progress("Fuzzing", total=len(numbers), unit="inputs") as progress,
    ):
        for outcome in _outcomes(options.seed, numbers, Path(scratch)):
            progress.advance(outcome.number not in found, outcome.outcome)
            found[outcome.number] = outcome
            if _is_kept(outcome):
                name = f"{outcome.number:06d}-{outcome.outcome.replace(' ', '-')}"
                suffix = Path(outcome.name).suffix
                (folder / "kept" / f"{name}{suffix}").write_bytes(
                    input_of(options.seed, outcome.number).data
                )
                logging.info("kept: %s", "\n".join(_listed("", [outcome])))
    print(report(list(found.values())))
    print(f"\nkept inputs: {folder / 'kept'}")
    return int(any(outcome.broken for outcome in found.values()))
