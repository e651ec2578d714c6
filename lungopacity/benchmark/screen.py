"""Screening beside the bare loop on the same machine, and beside what a user would write instead.

All ways run in turns, again and again, each in processes of its own, over the same images with the
same model. A busy neighbour slows them all alike, so the ratios within one benchmark hold.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from lungopacity.archive.inventory import take_inventory
from lungopacity.benchmark import alternatives, bare_loop
from lungopacity.benchmark.inputs import scratch_place
from lungopacity.benchmark.place import Place
from lungopacity.benchmark.screen_table import ScreenSpeed
from lungopacity.benchmark.watched import FailedError, Taken, last_words, run_watched
from lungopacity.errors import UserError
from lungopacity.models import load_model
from lungopacity.models.scorer import FLOAT32, check_precision
from lungopacity.progress import Progress
from lungopacity.results.schema import class_column
from lungopacity.runtime import KEEP_FREED_MEMORY
from lungopacity.screening.resources import batch_size_for
from lungopacity.storage import open_store

log = logging.getLogger(__name__)

LIMIT = (bare_loop.WHOLE, bare_loop.READ_HALF, bare_loop.SCORE_HALF)
OURS = "lungopacity"
ALTERNATIVES = ("dataloader", "ray-read-images", "ray-download", "daft")
WAYS = (*LIMIT, OURS, *ALTERNATIVES)
_OF_RAY = (OURS, "ours", "ray-read-images", "ray-download")
_STEADY = (0.1, 0.9)
"""Shares of the images between which the rate is steady: start and end do not count."""


@dataclass(frozen=True)
class _Task:
    """What every way is given."""

    images: str
    model: str
    batch_size: int
    limit_s: float
    positive: str
    """The column whose probabilities are compared."""
    place: Place
    output: str | None
    """URI of a place that the ways of Ray write to; None: a local folder."""
    precision: str = FLOAT32
    """Of the ways that run on a GPU."""


@dataclass(frozen=True)
class _Run:
    images: int
    taken: Taken
    steady: float | None
    bytes_moved: float | None
    p: Mapping[bare_loop.Name, float]
    """Probabilities of the positive class."""

    def in_words(self) -> str:
        whole = f"{self.images / self.taken.seconds:.1f} images/s in {self.taken.seconds:.1f} s"
        return whole if self.steady is None else f"{whole}, steady {self.steady:.1f} images/s"


def check_ways(ways: Sequence[str]) -> None:
    """Raises `UserError` for a name that is none of `WAYS`."""
    unknown = sorted(set(ways) - set(WAYS))
    if unknown:
        raise UserError(f"--ways: '{unknown[0]}' is none of {', '.join(WAYS)}")


def screen_speeds(
    images: str,
    model: str,
    *,
    ways: Sequence[str] = WAYS,
    repeats: int = 3,
    batch_size: int | None = None,
    limit_s: float = 3600.0,
    use_gpu: bool | None = None,
    precision: str = FLOAT32,
    output: str | None = None,
) -> list[ScreenSpeed]:
    """Run every way `repeats` times, in turns.

    images, model: URIs. `limit_s`: a run that takes longer is ended, because some ways hang if they
    have too few CPUs. `batch_size`: None: `batch_size_for` the device. `use_gpu`: None uses what
    there is. `precision`: of the forward pass, see `Scorer`. `output`: URI of a place that the ways
    of Ray write to, and which is emptied again; needed if the Ray cluster has several nodes. Raises
    `UserError` for an unknown way and if there is nothing to read; if a way fails, its note says
    so.
    """
    check_ways(ways)
    if repeats < 1 or (batch_size is not None and batch_size < 1):
        raise UserError("--repeats and --batch-size must be at least 1")
    positive = class_column("p", load_model(model).spec.positive_class)
    objects = take_inventory(images).objects
    place = Place.found(use_gpu)
    check_precision(precision, place.gpus > 0 or place.ray_gpus > 0)
    if place.nodes > 1 and output is None and set(ways) & set(_OF_RAY):
        raise UserError(
            f"the Ray cluster has {place.nodes} nodes; say with --output URI where all of them can "
            "write"
        )
    batch_size = batch_size or batch_size_for(place.gpus > 0 or place.ray_gpus > 0)
    task = _Task(images, model, batch_size, limit_s, positive, place, output, precision)
    shards = sum(objects["is_shard"].to_pylist())
    notes = {way: _why_not(way, shards > 0) for way in ways}
    able = [way for way in ways if not notes[way]]
    if bare_loop.WHOLE in able and objects.num_rows == shards < place.cores:
        notes[bare_loop.WHOLE] = "not the limit: there are fewer shards than cores"
    runs = _runs(task, able, repeats, notes)
    bytes_moved = None
    if runs.get(OURS):
        # Only a Ray that outlives the job can be asked, so this is another run, and not timed.
        try:
            with _scratch(task, OURS) as (folder, written):
                printed, _ = _started("ours", task, folder, written)
            bytes_moved = _moved(printed)
        except FailedError as error:
            notes[OURS] = notes[OURS] or f"bytes moved: failed: {error}"
    of_bare = runs.get(bare_loop.WHOLE)
    return [
        _summed_up(way, runs[way], of_bare, bytes_moved if way == OURS else None, place, notes[way])
        if runs.get(way)
        else ScreenSpeed(way, note=notes[way])
        for way in ways
    ]


def _runs(
    task: _Task, ways: Sequence[str], repeats: int, notes: dict[str, str]
) -> dict[str, list[_Run]]:
    """The runs of each way. A way that fails does not run again, and gets a note."""
    runs: dict[str, list[_Run]] = {way: [] for way in ways}
    failed: set[str] = set()
    films = 0
    with Progress("Screening", total=repeats * len(ways), unit="runs") as progress:
        for number in range(repeats):
            for way in ways:
                try:
                    if way == bare_loop.SCORE_HALF and not films:
                        films = _films_of(task, runs)
                    if way not in failed:
                        run = _run(way, task, films)
                        runs[way].append(run)
                        # Logged at once, because a run that is cut short prints no table.
                        log.info("%s: %s", way, run.in_words())
                except FailedError as error:
                    failed.add(way)
                    notes[way] = f"failed{f' in repeat {number + 1}' if number else ''}: {error}"
                progress.advance(1)
    return runs


def _films_of(task: _Task, runs: Mapping[str, Sequence[_Run]]) -> int:
    """How many films can be read, from a run that has read them, or from one that is not timed."""
    for way in (bare_loop.WHOLE, bare_loop.READ_HALF):
        if runs.get(way):
            return runs[way][0].images
    return _run(bare_loop.READ_HALF, task, 0).images


def _why_not(way: str, shards: bool) -> str:
    if way in ALTERNATIVES and shards:
        return "reads no shards"
    if way == "daft" and find_spec("daft") is None:
        return "not installed: pip install 'lungopacity[benchmark]'"
    return ""


def _run(way: str, task: _Task, films: int) -> _Run:
    """Raises `FailedError`."""
    with _scratch(task, way) as (folder, output):
        printed, taken = _started(way, task, folder, output, films)
        rows = _scored_rows(way, output)
        said = last_words(folder / "stderr")
    if not rows.num_rows:
        # Ours may end with 1 and no rows if Ray ends its process; its last words say why.
        raise FailedError(
            "scored no image; give some that can be read" + (f" (it said: {said})" if said else "")
        )
    return _Run(
        images=rows.num_rows,
        taken=taken,
        steady=steady_rate(rows["at"].to_numpy()),
        bytes_moved=_moved(printed),
        p=dict(zip(_names(rows), rows[task.positive].to_pylist(), strict=True))
        if task.positive in rows.column_names
        else {},
    )


def steady_rate(at_N: npt.NDArray[np.float64]) -> float | None:
    """Images a second without start and end. at_N: the seconds at which they were scored. None if
    all were scored at once, as in a single batch.
    """
    finished = np.sort(at_N)
    first, last = (finished[int(share * (len(finished) - 1))] for share in _STEADY)
    if not last > first:
        return None
    # The images of a batch share one time, and the interval before it belongs to all of them.
    return float(np.sum((finished > first) & (finished <= last)) / (last - first))


def _scored_rows(way: str, output: str) -> pa.Table:
    """What the way wrote for each image, with `at`, the second at which it was scored."""
    filesystem, root = open_store(output).arrow_filesystem()
    if way == OURS:
        root = f"{root}/predictions"
    try:
        rows = ds.dataset(
            root, filesystem=filesystem, format="parquet", exclude_invalid_files=True
        ).to_table()
    except FileNotFoundError:
        return pa.table({})
    if not rows.num_rows:
        return rows
    if way != OURS:
        return rows.append_column("at", rows["scored_at"])
    rows = rows.filter(pc.equal(rows["status"], "ok"))
    return rows.append_column("at", pc.divide(pc.cast(rows["screened_at"], pa.int64()), 1e6))


def _names(rows: pa.Table) -> Iterator[bare_loop.Name]:
    columns = (
        rows[name].to_pylist() if name in rows.column_names else repeat(None, rows.num_rows)
        for name in ("image", "member", "frame")
    )
    return zip(*columns, strict=True)


@contextmanager
def _scratch(task: _Task, way: str) -> Iterator[tuple[Path, str]]:
    """A local folder, and the URI of a place that the way writes to. Both are removed."""
    with TemporaryDirectory(prefix="lungopacity-") as name:
        if task.output is None or way not in _OF_RAY:
            folder = Path(name)
            (folder / "output").mkdir()
            yield folder, f"{name}/output"
            return
        with scratch_place(task.output) as output:
            yield Path(name), output


def _started(way: str, task: _Task, folder: Path, output: str, films: int = 0) -> tuple[str, Taken]:
    """Run the way to its end; return what it printed, and what it used. Raises `FailedError`."""
    place = task.place
    use_gpu = (place.ray_gpus if way in _OF_RAY else place.gpus) > 0
    precision = task.precision if use_gpu else FLOAT32
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0"}
    if way == OURS:
        arguments = ["-m", "lungopacity.cli", "screen", "--archive", task.images]
        arguments += ["--model", task.model, "--output", output]
        arguments += ["--batch-size", str(task.batch_size)]
        arguments += ["--use-gpu" if use_gpu else "--no-gpu", "--precision", precision]
        # Score what the others score, and succeed whatever cannot be read.
        arguments += ["--reject-quality", "none", "--max-failed-fraction", "1"]
        # 1: done, with images that could not be read.
        return run_watched(arguments, environment, task.limit_s, folder / "stderr", good=(0, 1))
    given: dict[str, Any] = {
        "way": way,
        "images": task.images,
        "model": task.model,
        "output": output,
        "batch_size": task.batch_size,
        "use_gpu": use_gpu,
        "precision": precision,
    }
    # As in the Ray workers that `lungopacity` starts.
    environment |= KEEP_FREED_MEMORY
    module = "alternatives"
    if way in LIMIT:
        module, given = "bare_loop", asdict(bare_loop.BareTask(**given, films=films))
        # BLAS's own threads spin for a while after each call, on the other process's core.
        environment |= {"OPENBLAS_NUM_THREADS": "1"}
    else:
        given = asdict(alternatives.Task(**given))
    spec = folder / "way.json"
    spec.write_text(json.dumps(given))
    arguments = ["-m", f"lungopacity.benchmark.{module}", str(spec)]
    return run_watched(arguments, environment, task.limit_s, folder / "stderr")


def _moved(printed: str) -> float | None:
    for line in printed.splitlines():
        if line.startswith('{"bytes_moved"'):
            return float(json.loads(line)["bytes_moved"])
    return None


def _summed_up(
    way: str,
    runs: Sequence[_Run],
    of_bare: Sequence[_Run] | None,
    bytes_moved: float | None,
    place: Place,
    note: str,
) -> ScreenSpeed:
    rates = [run.images / run.taken.seconds for run in runs]
    steady = [run.steady for run in runs if run.steady is not None]
    moved = [run.bytes_moved for run in runs if run.bytes_moved is not None]
    if moved:
        bytes_moved = statistics.median(moved)
    gpu = [share for run in runs for share in run.taken.gpu]
    bare_p = of_bare[0].p if of_bare else {}
    p = runs[0].p
    images = min(run.images for run in runs)
    ray = way in _OF_RAY
    unseen = ray and place.joined
    elsewhere = ray and place.nodes > 1
    return ScreenSpeed(
        way=way,
        on=place.on(ray, most_gpus=1 if way in (*LIMIT, "dataloader") else None),
        images=images,
        images_per_s=statistics.median(rates),
        spread=_spread(rates),
        steady_per_s=statistics.median(steady) if steady else None,
        steady_spread=_spread(steady) if steady else None,
        cpu_busy=None if elsewhere else statistics.median(run.taken.busy for run in runs),
        gpu_busy=None if elsewhere or not gpu else statistics.mean(gpu),
        memory_mib=None if unseen else max(run.taken.memory_mib for run in runs),
        store_mib=None if unseen else max(run.taken.store_mib for run in runs),
        bytes_moved=None if bytes_moved is None else bytes_moved / images,
        differs=max(
            (abs(bare_p[name] - p[name]) for name in bare_p.keys() & p.keys()), default=None
        ),
        note=note,
    )


def _spread(rates: Sequence[float]) -> float:
    return (max(rates) - min(rates)) / 2 / statistics.median(rates)
