"""Screen an archive: inventory ▶ plan ▶ pipeline ▶ publish. All steps are called from here."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Unpack

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lungopacity import observe
from lungopacity.archive.inventory import Inventory, below, list_archive, without
from lungopacity.archive.inventory_report import read_inventory
from lungopacity.archive.stream import OBJECTS_PER_TASK, reason_of_loss
from lungopacity.errors import UserError
from lungopacity.models import TrainedModel
from lungopacity.models.compiled import loaded
from lungopacity.models.scorer import FLOAT32, check_precision
from lungopacity.progress import Progress
from lungopacity.results.folder import RESULTS_FILE, attempt_prefix
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.results.workbench import temporary_folder
from lungopacity.runtime import done_with_ray, end_if_told, ray_ahead, ray_session, resolve_gpu
from lungopacity.screening.explanations import Explainer
from lungopacity.screening.finish import ScreeningResult, publish_run
from lungopacity.screening.history import History
from lungopacity.screening.job import ScreeningJob, ScreeningOptions, screening_job
from lungopacity.screening.landed import Landed
from lungopacity.screening.parts import write_crashed
from lungopacity.screening.pipeline import screen_objects
from lungopacity.screening.plan import Plan, make_plan, new_run_id, read_start
from lungopacity.screening.publish import collect, remove_work
from lungopacity.screening.resources import ScoringResources, batch_size_for
from lungopacity.storage import open_store
from lungopacity.storage.probe import check_writable
from lungopacity.words import counted

log = logging.getLogger(__name__)

_FEWER_OBJECTS = 64
_ROUNDS = (OBJECTS_PER_TASK, _FEWER_OBJECTS, 1)
"""Loose objects per task, in each round of the pipeline. A later round reads what a lost node left
undone. It also isolates an object that kills every process that reads it: each round, that object
takes fewer others with it."""
_LOSSES = 100
"""Tasks that may be lost in each round after the first. If more are lost, no object is to blame."""
_FEW_OBJECTS = 10_000
"""At most so many objects get a task each in the last round; for more, that takes too long."""
_FOLDERS_REMEMBERED = 4096
_FIRST_IMPORTS = "ray.data", "lungopacity.screening.pipeline"
"""By each worker, while the plan is made."""


def screen(
    archive: str,
    model: str,
    output: str,
    *,
    inventory: str | None = None,
    run_id: str | None = None,
    limit: int | None = None,
    **options: Unpack[ScreeningOptions],
) -> ScreeningResult:
    """Score every image of an archive and publish one run to a results folder.

    archive, model, output: URIs. `inventory`: URI of a list that is read instead of listing the
    archive, see `read_inventory`. `run_id`: the id of a killed run resumes that run. `limit`:
    screen only the first `limit` objects by key. options: see `screening_job`. Raises `UserError`.
    Unreadable images raise nothing: they become rows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    began = time.monotonic()
    job = screening_job(model, output, **options)
    if run_id is not None and (limit or inventory) and read_start(job.results, run_id) is not None:
        log.warning(
            "run %s continues with the objects it was planned with; --limit and --inventory have "
            "no effect",
            run_id,
        )
    # This already looks for the first object, so a wrong archive is reported before Ray starts.
    listed = inventory_at(archive, inventory, job.written)
    # `nightly` does not start Ray ahead: a night with nothing to do needs no Ray.
    with ray_ahead(_FIRST_IMPORTS):
        return run_job(job, listed, began, run_id=run_id, limit=limit)


def inventory_at(
    archive: str, inventory: str | None = None, written: Sequence[str] = ()
) -> Inventory:
    """List the archive, or read the list at `inventory`, and show progress.

    `written`: URIs that screening writes to. Objects there are left out, and so are objects named
    like files of any other results folder. Raises `UserError`, also as `check_apart` does.
    """
    check_apart(archive, written)
    progress = Progress("Listing the archive", unit="objects")
    found = (
        list_archive(archive, progress.advance)
        if inventory is None
        else read_inventory(inventory, archive, progress.advance)
    )
    shown = Inventory(found.uri, progress.around(found.tables))
    for place in written:
        lie_there = _lie_in(place, found.uri)
        if lie_there is not None:
            shown = without(
                shown, lie_there, f"lie in {place}: what screening writes is not a film"
            )
    # By name, because looking into each folder would cost a request.
    return without(
        shown,
        partial(pc.match_substring_regex, pattern=RESULTS_FILE),
        "are named like files of a results folder",
    )


def check_apart(archive: str, written: Sequence[str]) -> None:
    """Raises `UserError` if one of the URIs that screening writes to is the archive itself."""
    root = open_store(archive).uri
    if _real(root) in map(_real, written):
        raise UserError(
            f"{root}: results cannot be written to the archive itself; choose another place for "
            "them"
        )


def _lie_in(place: str, root: str) -> Callable[[pa.ChunkedArray], pa.Array] | None:
    """A function from keys below `root` to whether they lie in the place; None if no key can."""
    if root.startswith("s3://"):
        prefix = below(place, root)
        return partial(pc.starts_with, pattern=prefix) if prefix else None
    place, root = _real(place), _real(root)
    if place.startswith("s3://") or below(root, place) is not None:
        return None  # an archive may itself lie in the results

    # By the real path, because a symbolic link in the archive may lead there. The keys of a folder
    # mostly follow each other, so few folders need be remembered.
    @lru_cache(maxsize=_FOLDERS_REMEMBERED)
    def is_there(folder: str) -> bool:
        try:
            return below(_real(f"{root}/{folder}"), place) is not None
        except ValueError:
            return False  # a NUL: the key, from an inventory, can name no file and gets a row

    return lambda keys: pa.array(
        [is_there(key.rpartition("/")[0]) for key in keys.to_pylist()], pa.bool_()
    )


def _real(uri: str) -> str:
    """The URI; of a local path the same place without symbolic links."""
    return uri if uri.startswith("s3://") else os.path.realpath(uri)


def run_job(
    job: ScreeningJob,
    inventory: Inventory,
    began: float,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    history: History | None = None,
    before_commit: Callable[[], None] = lambda: None,
    go_on_or_raise: Callable[[], None] = lambda: None,
    on_published: Callable[[ScreeningResult], None] | None = None,
    nightly: bool = False,
    go_on: str = "resume it with --run-id {} and the same options",
) -> ScreeningResult:
    """Plan, screen and publish one run over the objects of the inventory.

    `began`: `time.monotonic()` at the start. `run_id`, `limit`: see `screen`. `history`: published
    runs, whose objects need no screening. `go_on_or_raise` is called after each part file,
    `before_commit` just before publishing; if either raises, nothing is published. `on_published`
    is called as soon as the run is published, before its work files are removed. `nightly`: see
    `make_plan`. `go_on`: what to tell the user to do if the run does not finish; {} stands for
    its id. Raises `UserError`.
    """
    model_id = job.model.model_id
    run_id = run_id or new_run_id(model_id)
    observe.set_run(run_id)
    if job.key_map is not None:
        # The key map is written last. If that cannot work, say so before hours of screening.
        check_writable(job.key_map, private=True)
    if job.use_gpu or job.model_actors is not None or job.precision != FLOAT32:
        # Only the cluster knows what it has. Ask before a plan is written that could never be
        # screened.
        with ray_session():
            use_gpu = resolve_gpu(job.use_gpu)
            check_precision(job.precision, use_gpu)
            ScoringResources.of_cluster(use_gpu, job.gpus_per_actor, job.model_actors)
    with temporary_folder() as folder:
        plan = make_plan(
            job.results,
            inventory,
            model_id,
            run_id,
            folder,
            limit=limit,
            rules=job.rules,
            history=history,
            nightly=nightly,
        )
        log.info(
            "run %s: %s of %s, model %s%s",
            run_id,
            counted(plan.start.objects, "object"),
            plan.start.archive,
            model_id,
            " (resumed)" if plan.resumed else "",
        )
        go_on = go_on.format(run_id)
        try:
            devices = _screen_what_is_missing(job, plan, folder, go_on, go_on_or_raise)
            done_with_ray()
            job = replace(job, noted={**job.noted, "devices": devices})
            result = publish_run(job, plan, began, before_commit)
        except (KeyboardInterrupt, SystemExit):
            log.warning("stopped; %s", go_on)
            raise
    if on_published is not None:
        on_published(result)
    try:
        remove_work(job.results, plan)
    except (KeyboardInterrupt, SystemExit):
        log.warning(
            "stopped; run %s is published; `lungopacity clean` removes the rest of its work files",
            run_id,
        )
        raise
    return result


def _screen_what_is_missing(
    job: ScreeningJob,
    plan: Plan,
    folder: Path,
    go_on: str,
    go_on_or_raise: Callable[[], None],
) -> list[str]:
    """Run the pipeline until every object of the plan has rows in part files. Returns the devices
    that scored, see `ScoringResources.devices`.

    `folder`: for the lists of missing objects. `go_on`: what to do if some get no rows.
    `go_on_or_raise`: called after each part file.

    The pipeline takes up to a million objects at a time, so the driver's memory does not grow with
    the archive. The last round gives each object a task of its own, and so finds the object that
    kills every process that reads it.
    """
    class_names = job.model.spec.class_names
    todo = list(plan.files)
    if plan.resumed:
        with collect(job.results, plan, class_names) as collected:
            todo = collected.missing(folder, "resumed")
        log.info("%d of %d objects are left to screen", _rows(todo), plan.start.objects)
    devices: set[str] = set()
    for number, most in enumerate(_ROUNDS):
        if not todo:
            break
        if number:
            log.warning(
                "%d objects were lost with their task or node: reading them again", _rows(todo)
            )
        losses = _LOSSES if number else 0
        if most == 1 and _rows(todo) > _FEW_OBJECTS:
            most = _FEWER_OBJECTS
        interrupted = len(todo)
        with Landed(plan.start.objects, todo, go_on_or_raise) as landed:
            for path in todo:
                with _surviving_lost_nodes():
                    objects = pq.read_table(path, columns=PLAN_SCHEMA.names)
                    devices |= _run_pipeline(
                        job, plan, objects, losses=losses, most=most, landed=landed
                    )
                    interrupted -= 1
        with collect(job.results, plan, class_names) as collected:
            todo = collected.missing(folder, f"round-{number}")
    if todo and most == 1 and not interrupted:
        crashing = counted(_rows(todo), "object")
        log.warning("%s crashed every reader: error code reader_crash", crashing)
        for path in todo:
            attempt = attempt_prefix(plan.start.run_id)
            write_crashed(job.results, attempt, pq.read_table(path), class_names)
    elif todo:
        raise UserError(
            f"{_rows(todo)} of {plan.start.objects} objects have no result after "
            f"{len(_ROUNDS)} rounds; nothing was published; {go_on}"
        )
    return sorted(devices)


@contextmanager
def _surviving_lost_nodes() -> Iterator[None]:
    """Log a failure that comes from Ray, as when a lost node takes actors with it, and carry on:
    the next round reads what is missing. What our own code raised in a worker is raised here."""
    try:
        yield
    except Exception as error:
        log.warning("Ray lost the work in progress (%s)", reason_of_loss(error))


def _rows(files: Sequence[Path]) -> int:
    return sum(pq.read_metadata(path).num_rows for path in files)


def as_run(model: TrainedModel, use_gpu: bool | None) -> TrainedModel:
    """The model, without its compiled network if GPUs are asked for or this CPU cannot load it.
    The actors would notice too, but nobody reads their logs."""
    if use_gpu or loaded(model) is None:
        return replace(model, compiled=None)
    return model


def _run_pipeline(
    job: ScreeningJob, plan: Plan, todo: pa.Table, *, losses: int, most: int, landed: Landed
) -> set[str]:
    """Screen the objects `todo` of `PLAN_SCHEMA`; returns the devices that scored."""
    devices: set[str] = set()
    model = as_run(job.model, job.use_gpu)  # before `ray_session`: Ray starts meanwhile
    with ray_session():
        use_gpu = resolve_gpu(job.use_gpu)
        if use_gpu:
            model = replace(model, compiled=None)
        resources = ScoringResources.of_cluster(use_gpu, job.gpus_per_actor, job.model_actors)
        for part in screen_objects(
            plan.start.archive,
            todo,
            model,
            job.read_settings,
            job.results,
            plan.start.run_id,
            resources,
            job.batch_size or batch_size_for(use_gpu),
            Explainer(plan.start.run_id) if job.explain else None,
            job.precision,
            losses=losses,
            most=most,
        ):
            end_if_told()
            # Asked now, because an autoscaler may have removed the nodes by the end.
            devices = devices or set(resources.devices())
            landed.add(part)
        return devices
