"""Screening beside the bare loop on the same machine, and beside what a user would write instead.

All ways run one after the other, again and again, each in processes of its own, over the same
images with the same model: a busy neighbour slows them all alike, and ratios of one run hold.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import psutil
import pyarrow.dataset as ds

from lungopacity.archive.inventory import take_inventory
from lungopacity.benchmark import bare_loop
from lungopacity.errors import UserError
from lungopacity.models import load_model
from lungopacity.progress import Progress
from lungopacity.results.schema import class_column
from lungopacity.runtime import KEEP_FREED_MEMORY

LIMIT = (bare_loop.WHOLE, bare_loop.READ_HALF, bare_loop.SCORE_HALF)
OURS = "lungopacity"
ALTERNATIVES = ("dataloader", "ray-read-images", "ray-download", "daft")
WAYS = (*LIMIT, OURS, *ALTERNATIVES)
_STEADY = (0.1, 0.9)
"""From the tenth to the ninetieth of a hundred images: start and end do not count."""
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class _Task:
    """What every way is given."""

    images: str
    model: str
    batch_size: int
    limit_s: float
    positive: str
    """The column whose probabilities are compared."""


@dataclass(frozen=True)
class _Run:
    images: int
    seconds: float
    steady: float
    busy: float
    memory_mib: float
    store_mib: float
    bytes_moved: float | None
    p: Mapping[str, float]
    """Of the positive class, by name."""


@dataclass(frozen=True)
class ScreenSpeed:
    """One way to score all images."""

    way: str
    images: int = 0
    """How many got a score: a way may lose some."""
    images_per_s: float = 0.0
    """Of the whole job, from the start of its process to its end; median over the repeats."""
    spread: float = 0.0
    """Half the range of that over the repeats, as a share of the median."""
    steady_per_s: float = 0.0
    """From the first tenth of the images to the last; median."""
    cpu_busy: float = 0.0
    """Share of the machine's CPU time, the storage server's on the same machine included."""
    memory_mib: float = 0.0
    """Largest private memory of all its processes together."""
    store_mib: float = 0.0
    """Largest growth of shared memory, where Ray's object store lies."""
    bytes_moved: float | None = None
    """Through Ray's object store, an image; None where there is no Ray."""
    differs: float | None = None
    """Largest difference of a film's probability from the bare loop's."""
    note: str = ""
    """Why it was not run."""


def screen_speeds(
    images: str,
    model: str,
    *,
    ways: Sequence[str] = WAYS,
    repeats: int = 3,
    batch_size: int = 64,
    limit_s: float = 3600.0,
) -> list[ScreenSpeed]:
    """Run every way `repeats` times, in turns.

    images, model: URIs. `limit_s`: a run that takes longer is ended: some ways hang where they have
    too few CPUs. Raises `UserError` for an unknown way, for nothing to read, and where one
    of ours fails; of the others the note says so.
    """
    unknown = sorted(set(ways) - set(WAYS))
    if unknown:
        raise UserError(f"--ways: '{unknown[0]}' is none of {', '.join(WAYS)}")
    if repeats < 1 or batch_size < 1:
        raise UserError("--repeats and --batch-size must be at least 1")
    positive = class_column("p", load_model(model).spec.positive_class)
    task = _Task(images, model, batch_size, limit_s, positive)
    shards = any(take_inventory(images).objects["is_shard"].to_pylist())
    notes = {way: _why_not(way, shards) for way in ways}
    runs: dict[str, list[_Run]] = {way: [] for way in ways}
    bytes_moved = None
    able = [way for way in ways if not notes[way]]
    with Progress("Screening", total=repeats * len(able), unit="runs") as progress:
        for _ in range(repeats):
            for way in able:
                if not notes[way]:
                    try:
                        runs[way].append(_run(way, task))
                    except _NoFiguresError as error:
                        notes[way] = str(error)
                progress.advance(1)
        if OURS in able:
            # Asking Ray needs a Ray that outlives the job: a run that is not timed.
            with TemporaryDirectory(prefix="lungopacity-") as folder:
                told, _ = _started("ours", task, Path(folder))
            bytes_moved = _moved(told)
    of_bare = runs.get(bare_loop.WHOLE)
    return [
        ScreenSpeed(way, note=notes[way])
        if notes[way]
        else _summed_up(way, runs[way], of_bare, bytes_moved if way == OURS else None)
        for way in ways
    ]


def table(speeds: Sequence[ScreenSpeed]) -> str:
    """A line for each way; ratios are to the bare loop, where it was run."""
    bare = next((speed for speed in speeds if speed.way == bare_loop.WHOLE), None)
    titles = (
        "way", "images", "images/s", "spread", "/ bare", "steady", "/ bare", "CPU", "MiB",
        "store MiB", "bytes moved", "differs",
    )  # fmt: skip
    form = "{:<16}{:>8}{:>10}{:>8}{:>8}{:>9}{:>8}{:>6}{:>8}{:>11}{:>13}{:>9}"
    lines = [form.format(*titles)]
    for speed in speeds:
        if speed.note:
            lines.append(f"{speed.way:<16}{speed.note}")
            continue
        lines.append(
            form.format(
                speed.way,
                speed.images,
                f"{speed.images_per_s:.1f}",
                f"{speed.spread:.0%}",
                f"{speed.images_per_s / bare.images_per_s:.2f}" if bare else "",
                f"{speed.steady_per_s:.1f}",
                f"{speed.steady_per_s / bare.steady_per_s:.2f}" if bare else "",
                f"{speed.cpu_busy:.0%}",
                f"{speed.memory_mib:.0f}",
                f"{speed.store_mib:.0f}",
                "" if speed.bytes_moved is None else f"{speed.bytes_moved / speed.images:.0f}",
                "" if speed.differs is None else f"{speed.differs:.1g}",
            )
        )
    return "\n".join(lines)


def _why_not(way: str, shards: bool) -> str:
    if way in ALTERNATIVES and shards:
        return "reads no shards"
    if way == "daft" and find_spec("daft") is None:
        return "not installed: pip install daft"
    return ""


class _NoFiguresError(Exception):
    """A way cannot be timed, and why."""


def _run(way: str, task: _Task) -> _Run:
    """Raises `_NoFiguresError`; `UserError` where one of ours fails."""
    with TemporaryDirectory(prefix="lungopacity-") as name:
        folder = Path(name)
        try:
            told, taken = _started(way, task, folder)
        except subprocess.CalledProcessError as error:
            message = (error.stderr.strip().splitlines() or [""])[-1]
            if way not in ALTERNATIVES:
                raise UserError(f"{way} failed: {message}") from error
            raise _NoFiguresError(f"failed: {message[:100]}") from error
        rows = _scored_rows(way, folder / "output")
    if len(rows) < 2:
        raise _NoFiguresError(
            f"scored {len(rows)} images: too few to be timed; give more that can be read"
        )
    finished = np.sort(rows["at"])
    first, last = (int(share * len(finished)) for share in _STEADY)
    between = finished[last - 1] - finished[first]
    return _Run(
        images=len(finished),
        seconds=taken.seconds,
        # Batches that end at one moment are one event: count what ended after the first.
        steady=float(np.sum(finished[first:last] > finished[first]) / max(between, 1e-9)),
        busy=taken.busy,
        memory_mib=taken.memory_mib,
        store_mib=taken.store_mib,
        bytes_moved=_moved(told),
        p=dict(zip(rows["name"], rows[task.positive], strict=True))
        if task.positive in rows
        else {},
    )


def _scored_rows(way: str, output: Path) -> pd.DataFrame:
    """What it wrote of each image, with its `name`, and `at`, the second at which it was scored."""
    if way == OURS:
        output = output / "predictions"
    table = ds.dataset(output, format="parquet", exclude_invalid_files=True).to_table()
    rows: pd.DataFrame = table.to_pandas()
    if rows.empty:
        return rows
    if way == OURS:
        rows = rows[rows["status"] == "ok"]
        name = rows["member"].fillna(rows["image"]).str.rsplit("/", n=1).str[-1]
        return rows.assign(name=name, at=rows["screened_at"].dt.as_unit("us").astype("int64") / 1e6)
    # Some know an image by its path, some by its URI.
    return rows.assign(name=rows["image"].str.rsplit("/", n=1).str[-1], at=rows["scored_at"])


def _started(way: str, task: _Task, folder: Path) -> tuple[str, _Taken]:
    """Run it to its end; what it printed, and what it took."""
    output = folder / "output"
    settings = {"way": way, "images": task.images, "model": task.model, "output": str(output)}
    spec = folder / "way.json"
    spec.write_text(json.dumps({**settings, "batch_size": task.batch_size}))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0"}
    if way == OURS:
        command = ["-m", "lungopacity.cli", "screen", "--archive", task.images]
        command += ["--model", task.model, "--output", str(output)]
        command += ["--batch-size", str(task.batch_size)]
    else:
        output.mkdir()
        module = "bare_loop" if way in LIMIT else "alternatives"
        command = ["-m", f"lungopacity.benchmark.{module}", str(spec)]
        if way in LIMIT:
            # BLAS's own threads spin for a while after each call, on the other process's core.
            environment |= KEEP_FREED_MEMORY | {"OPENBLAS_NUM_THREADS": "1"}
    log = folder / "stderr"
    with log.open("wb") as errors:
        process = psutil.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=errors
        )
        with _watched(process) as taken:
            try:
                printed, _ = process.communicate(timeout=task.limit_s)
            except subprocess.TimeoutExpired as error:
                for member in _family(process):
                    with suppress(psutil.Error):
                        member.kill()
                process.wait()
                raise subprocess.CalledProcessError(
                    -9, way, stderr=f"did not end in {task.limit_s:g} s"
                ) from error
    # 1: done, with images that could not be read.
    if process.returncode not in ((0, 1) if way == OURS else (0,)):
        raise subprocess.CalledProcessError(
            process.returncode, way, stderr=log.read_text(errors="replace")
        )
    return printed.decode(errors="replace"), taken


def _moved(printed: str) -> float | None:
    for line in printed.splitlines():
        if line.startswith('{"bytes_moved"'):
            return float(json.loads(line)["bytes_moved"])
    return None


@dataclass
class _Taken:
    """Seconds, CPU and memory of a process and all that it starts."""

    seconds: float = 0.0
    busy: float = 0.0
    memory_mib: float = 0.0
    store_mib: float = 0.0


@contextmanager
def _watched(process: psutil.Process) -> Iterator[_Taken]:
    """Watch it for the block."""
    taken, ended = _Taken(), threading.Event()
    shared, cpu, began = _shared_bytes(), psutil.cpu_times(), time.monotonic()

    def look() -> None:
        while not ended.wait(_SAMPLE_S):
            memory = sum(map(_private_bytes, _family(process))) / 2**20
            taken.memory_mib = max(taken.memory_mib, memory)
            taken.store_mib = max(taken.store_mib, (_shared_bytes() - shared) / 2**20)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        taken.seconds = time.monotonic() - began
        spent = [now - then for now, then in zip(psutil.cpu_times(), cpu, strict=True)]
        of = dict(zip(cpu._fields, spent, strict=True))
        taken.busy = 1 - (of["idle"] + of.get("iowait", 0.0)) / max(sum(spent), 1e-9)
        ended.set()
        thread.join()


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _private_bytes(process: psutil.Process) -> int:
    # What smaps would tell exactly takes the kernel so long that it slows down what is measured.
    try:
        told = process.memory_info()
    except psutil.Error:
        return 0
    return int(told.rss - getattr(told, "shared", 0))


def _shared_bytes() -> int:
    return shutil.disk_usage("/dev/shm").used if Path("/dev/shm").is_dir() else 0


def _summed_up(
    way: str, runs: Sequence[_Run], of_bare: Sequence[_Run] | None, bytes_moved: float | None
) -> ScreenSpeed:
    rates = [run.images / run.seconds for run in runs]
    median = statistics.median(rates)
    moved = [run.bytes_moved for run in runs if run.bytes_moved is not None]
    bare_p = of_bare[0].p if of_bare else {}
    p = runs[0].p
    return ScreenSpeed(
        way=way,
        images=min(run.images for run in runs),
        images_per_s=median,
        spread=(max(rates) - min(rates)) / 2 / median,
        steady_per_s=statistics.median(run.steady for run in runs),
        cpu_busy=statistics.median(run.busy for run in runs),
        memory_mib=max(run.memory_mib for run in runs),
        store_mib=max(run.store_mib for run in runs),
        bytes_moved=statistics.median(moved) if moved else bytes_moved,
        differs=max(
            (abs(bare_p[name] - p[name]) for name in bare_p.keys() & p.keys()), default=None
        ),
    )
