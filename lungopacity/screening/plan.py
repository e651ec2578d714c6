"""What a run has to screen, kept under `_work/` so that a killed run can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from lungopacity.archive.inventory import Inventory
from lungopacity.errors import ImageError, UserError
from lungopacity.results.folder import (
    WORK,
    newest_sequence,
    plan_key,
    plan_name,
    published_meanwhile,
    read_run,
    read_runs,
    refuse_other_folder,
    start_key,
    work_file,
    work_prefix,
)
from lungopacity.results.schema import PLAN_SCHEMA, PLANNED_SCHEMA, part_schema
from lungopacity.results.workbench import ExportedFile, export, spool, view_of_files, workbench
from lungopacity.screening.history import History, is_of_kind
from lungopacity.screening.rules import Rules
from lungopacity.storage import ConflictError, Store, check_name, open_store
from lungopacity.words import counted

log = logging.getLogger(__name__)

_COLUMNS = hashlib.sha256(
    repr(
        [
            "named by SHA-256",
            *((field.name, str(field.type)) for field in (*PLANNED_SCHEMA, *part_schema(()))),
        ]
    ).encode()
).hexdigest()[:16]
"""What this version writes below `_work/`, but for the model's classes. A version with a column
more, or with other names of files, could not put its part files and those of before together."""


@dataclass(frozen=True)
class RunStart:
    """What a run was started with; a later attempt under the same id must be given the same."""

    run_id: str
    model_id: str
    archive: str
    started_at: str
    """ISO 8601, UTC. Its date is the run's partition, also when the run ends after midnight."""
    objects: int
    """How many are planned."""
    files: tuple[str, ...]
    """Names of the files that hold the plan, each by its content: two jobs that plan one run write
    none of one name that differ."""
    rules: Rules
    nightly: bool = False
    """Whether a later night may take it up by itself."""
    columns: str = ""
    """Of its files, see `_COLUMNS`."""
    after: int = 0
    """`newest_sequence` when it was planned: what was published later may be of the same objects,
    and newer."""
    published: bool = False
    """Its commit record was written. Whoever withdraws the run deletes the record: what is left of
    the work must not publish it once more."""

    @property
    def screened_on(self) -> str:
        return self.started_at[:10]


@dataclass(frozen=True)
class Plan:
    """A run and its objects."""

    start: RunStart
    files: tuple[Path, ...]
    """On this machine: `PLANNED_SCHEMA`, sorted by `image`, up to a million objects each."""
    resumed: bool

    @property
    def work(self) -> str:
        """Key prefix of everything that the run writes before it is published."""
        return work_prefix(self.start.run_id)


def new_run_id(model_id: str) -> str:
    """Sorts by time. 32 random bits keep apart the runs that start in one second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model_id[:8]}-{uuid.uuid4().hex[:8]}"


def make_plan(
    results: Store,
    inventory: Inventory,
    model_id: str,
    run_id: str,
    folder: Path,
    *,
    rules: Rules,
    limit: int | None = None,
    history: History | None = None,
    nightly: bool = False,
) -> Plan:
    """Plan the run, or take up the plan of an attempt under this id that was not published.

    `folder`: on this machine, for the plan's files. `limit`: only so many objects, see `choose`.
    `history`: leaves out what published runs have screened. `nightly`: marks the run as one
    that a later night may take up. Raises `UserError` where the run
    is published already, or was started with another archive, model or other `rules`, and where
    the inventory names an object twice.
    """
    check_name(run_id, "run id")
    if read_run(results, run_id) is not None:
        raise UserError(
            f"run '{run_id}' is published already in {results.uri}; choose another --run-id"
        )
    start = read_start(results, run_id)
    if start is None:
        # Before the objects are chosen: what is published meanwhile counts as later.
        after = newest_sequence(read_runs(results)) if history is None else history.newest
        files = choose(inventory, folder, limit, history)
        start = RunStart(
            run_id=run_id,
            model_id=model_id,
            archive=inventory.uri,
            started_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            objects=sum(file.rows for file in files),
            files=tuple(plan_name(number, file.path) for number, file in enumerate(files)),
            rules=rules,
            nightly=nightly,
            columns=_COLUMNS,
            after=after,
        )
        for name, file in zip(start.files, files, strict=True):
            results.write(plan_key(run_id, name), file.path.read_bytes())
        try:
            # Last: whoever finds it finds the whole plan.
            results.write(start_key(run_id), json.dumps(asdict(start)).encode(), if_absent=True)
            return Plan(start, tuple(file.path for file in files), resumed=False)
        except ConflictError:
            # Another job plans the same run at this moment, and was first: its plan counts.
            start = read_start(results, run_id)
            if start is None:
                raise published_meanwhile(run_id) from None
    _check_same(start, inventory.uri, model_id, rules)
    later = published_later(results, start)
    if later is not None:
        log.warning(
            "run %s was published since run %s was begun; what this one has screened will count as "
            "newer all the same",
            later,
            run_id,
        )
    return Plan(start, tuple(_taken_up(results, start, folder)), resumed=True)


def read_start(results: Store, run_id: str) -> RunStart | None:
    """What an unpublished run was started with; None where no such run was planned.

    Raises `UserError` where this version cannot go on with it, and where it was published before.
    """
    key = start_key(run_id)
    if results.head(key) is None:
        return None
    start = _start_at(results, key)
    if start is None:
        raise UserError(
            f"run '{run_id}' cannot be taken up again: {results.uri}/{key} is damaged or of "
            "another version of lungopacity; choose another --run-id"
        )
    if start.published:
        raise UserError(
            f"run '{run_id}' was published before, and {results.uri}/{work_prefix(run_id)} still "
            "has its work; choose another --run-id"
        )
    return start


def mark_published(results: Store, start: RunStart) -> None:
    """Note, where the work of a run lies, that nobody is to go on with it."""
    key = start_key(start.run_id)
    results.write(key, json.dumps(asdict(replace(start, published=True))).encode())


def _start_at(results: Store, key: str) -> RunStart | None:
    """None where it is damaged or of another version. Raises `UserError` where the storage does not
    tell."""
    try:
        told = json.loads(results.read(key))
        told |= {"files": tuple(told["files"]), "rules": Rules.of(told["rules"])}
        start = RunStart(**told)
    except (ImageError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, ImageError) and error.may_pass:
            # It may hold the work of hours.
            raise UserError(
                f"{results.uri}/{key}: cannot be read ({error.message}); try again"
            ) from error
        return None
    return start if start.columns == _COLUMNS else None


def unfinished_runs(results: Store) -> list[RunStart]:
    """Runs that were planned and are not published, oldest first.

    Without those that cannot be taken up: no run has published their objects, so that the next
    plan holds them anyway. A warning names them.
    """
    starts = []
    for item in results.list(f"{WORK}/"):
        run_id = item.key.split("/")[1]
        if item.key != start_key(run_id) or read_run(results, run_id) is not None:
            continue
        start = _start_at(results, item.key)
        if start is None:
            log.warning(
                "%s/%s is damaged or of another version of lungopacity: this run is not finished, "
                "its objects are screened anew, and `lungopacity clean` will remove it",
                results.uri,
                item.key,
            )
        elif not start.published:
            starts.append(start)
    return sorted(starts, key=lambda start: start.started_at)


def published_later(results: Store, start: RunStart) -> str | None:
    """Id of the newest run of the same kind (see `is_of_kind`) that was published after this one
    was planned; None where there is none."""
    later = [
        run["run_id"]
        for run in read_runs(results)
        if run.get("sequence", 0) > start.after
        and is_of_kind(run, start.archive, start.model_id, start.rules)
    ]
    return later[-1] if later else None


def unfinished_table(results_uri: str) -> pa.Table:
    """`unfinished_runs`, a row each: with what id, archive and model `screen` may go on. Raises
    `UserError` where no results lie."""
    store = open_store(results_uri)
    refuse_other_folder(store)
    starts = unfinished_runs(store)
    columns = ("run_id", "model_id", "archive", "started_at", "objects", "nightly")
    return pa.table({name: [getattr(start, name) for start in starts] for name in columns})


def choose(
    inventory: Inventory, folder: Path, limit: int | None, history: History | None
) -> list[ExportedFile]:
    """Files in `folder` of the objects to screen: `PLANNED_SCHEMA`, sorted by key.

    Where `limit` leaves some out, these are what was tried most recently, then the last by key: or
    objects that fail every night would keep all others waiting for ever.
    """
    listed = folder / "inventory.parquet"
    spool(inventory.tables, PLAN_SCHEMA, listed)
    with workbench() as (connection, _):
        view_of_files(connection, "listed", [listed], PLAN_SCHEMA)
        ((twice,),) = connection.execute(
            "SELECT count(*) FROM "
            "(SELECT 1 FROM listed GROUP BY md5_number(image) HAVING count(*) > 1)"
        ).fetchall()
        if twice:
            raise UserError(
                f"the inventory names {counted(twice, 'object')} more than once; take it again"
            )
        chosen = "SELECT *, NULL AS tried FROM listed"
        if history is not None:
            if history.runs:
                runs = counted(len(history.runs), "published run")
                log.info("leaving out what was screened by %s", runs)
            history.load(connection)
            chosen = history.to_screen("listed")
        if limit is not None:
            limit = min(limit, sys.maxsize)
            chosen = f"SELECT * FROM ({chosen}) ORDER BY tried NULLS FIRST, image LIMIT {limit}"
        files = export(
            connection,
            f"SELECT *, tried IS NOT NULL AS repeated FROM ({chosen}) ORDER BY image",
            PLANNED_SCHEMA,
            folder,
            "plan",
        )
    listed.unlink()
    return files


def _check_same(start: RunStart, archive: str, model_id: str, rules: Rules) -> None:
    before = start.rules.settings()
    for name, then, now in (
        ("archive", start.archive, archive),
        ("model", start.model_id, model_id),
        *((name, before[name], value) for name, value in rules.settings().items()),
    ):
        if then != now:
            raise UserError(
                f"run '{start.run_id}' was begun with {name} {then}, not {now}; "
                "give the same, or choose another --run-id"
            )


def _taken_up(results: Store, start: RunStart, folder: Path) -> Iterator[Path]:
    for name in start.files:
        key = plan_key(start.run_id, name)
        cannot = f"run '{start.run_id}' cannot be taken up again: {results.uri}/{key}:"
        try:
            file = work_file(results, key, folder / f"{name}.parquet")
        except ImageError as error:
            if read_run(results, start.run_id) is not None:
                raise published_meanwhile(start.run_id) from error
            mend = "try again" if error.may_pass else "choose another --run-id"
            raise UserError(f"{cannot} {error.message}; {mend}") from error
        if file is None:
            raise UserError(f"{cannot} is damaged; choose another --run-id")
        yield file
