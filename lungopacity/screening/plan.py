"""The plan of a run: the objects to screen, kept under `_work/` so that a killed run can resume."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from lungopacity.runtime import versions
from lungopacity.screening.history import History, all_hide_names, is_of_kind
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
"""Identifies the columns and file names that this version writes under `_work/`, except the columns
of the model's classes. A version that writes others cannot merge its part files with older ones."""
_OPTIONS = {
    "accept": "--accept {}",
    "reject_quality": "--reject-quality {}",
    "hmac_key_fingerprint": "--hmac-key of fingerprint {}",
    "hash_keys": "--hash-keys",
    "operating_point": "--operating-point {}",
    "explain": "--explain",
    "precision": "--precision {}",
}
"""How a rule is given, by its name."""


@dataclass(frozen=True)
class RunStart:
    """What a run was started with. A later attempt with the same id must use the same archive,
    model and rules."""

    run_id: str
    model_id: str
    archive: str
    started_at: str
    """ISO 8601, UTC. Its date is the run's partition, even if the run ends after midnight."""
    objects: int
    """How many are planned."""
    files: tuple[str, ...]
    """Names of the files that hold the plan. A name contains the hash of the content, so two jobs
    that plan the same run never overwrite each other's files with different content."""
    rules: Rules
    nightly: bool = False
    """Whether a later night may resume the run."""
    columns: str = ""
    """`_COLUMNS` of the version that planned the run."""
    version: str = ""
    """The version of lungopacity that planned the run. The commit record names only one, and what
    that version failed at would not be tried again by a later one."""
    after: int = 0
    """`newest_sequence` at planning time. Runs published later may hold newer rows of the same
    objects."""
    published: bool = False
    """Whether the commit record was written. Deleting the record withdraws a run; work files that
    are left must not publish it again."""

    @property
    def screened_on(self) -> str:
        return self.started_at[:10]


@dataclass(frozen=True)
class Plan:
    """A run and its objects."""

    start: RunStart
    files: tuple[Path, ...]
    """Local files of `PLANNED_SCHEMA`, sorted by `image`, up to a million objects each."""
    resumed: bool

    @property
    def work(self) -> str:
        """Key prefix of everything that the run writes before it is published."""
        return work_prefix(self.start.run_id)


def new_run_id(model_id: str) -> str:
    """A new id. Ids sort by time; 32 random bits distinguish runs that start in the same second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model_id[:8]}-{uuid.uuid4().hex[:8]}"


def check_names_stay_hidden(
    results: Store, published: Sequence[Mapping[str, Any]], rules: Rules
) -> None:
    """Raises `UserError` if a run by these rules would show names of objects where all published
    runs hide them: an option that is forgotten once would show every name to whoever may query."""
    if not rules.hash_keys and all_hide_names(published):
        raise UserError(
            f"{results.uri}: all runs there hide the names of objects (--hash-keys), and this one "
            "would show them; give --hash-keys, or another place for the results"
        )


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
    """Plan the run, or load the plan of an earlier, unpublished attempt with this id.

    `folder`: a local folder for the plan's files. `limit`: at most so many objects, see `choose`.
    `history`: published runs, whose objects are left out. `nightly`: marks the run as one that a
    later night may resume. Raises `UserError` if the run is already published, if it was started
    with another archive, model or other `rules`, if it would show names in results that show none,
    or if the inventory names an object twice.
    """
    check_name(run_id, "run id")
    if read_run(results, run_id) is not None:
        raise UserError(
            f"run '{run_id}' is already published in {results.uri}; choose another --run-id"
        )
    start = read_start(results, run_id)
    if start is None:
        # Read before the objects are chosen, so that a run published meanwhile counts as later.
        published = read_runs(results) if history is None else history.published
        after = newest_sequence(published)
        check_names_stay_hidden(results, published, rules)
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
            version=versions()["lungopacity"],
            after=after,
        )
        for name, file in zip(start.files, files, strict=True):
            results.write(plan_key(run_id, name), file.path.read_bytes())
        try:
            # Written last: where it exists, the plan is complete.
            results.write(start_key(run_id), json.dumps(asdict(start)).encode(), if_absent=True)
            return Plan(start, tuple(file.path for file in files), resumed=False)
        except ConflictError:
            # Another job planned the same run at the same time and was first: its plan counts.
            start = read_start(results, run_id)
            if start is None:
                raise published_meanwhile(run_id) from None
    _check_same(start, inventory.uri, model_id, rules)
    later = published_later(results, start)
    if later is not None:
        log.warning(
            "run %s was published after run %s began; the rows of the resumed run will still count "
            "as the newer ones",
            later,
            run_id,
        )
    return Plan(start, tuple(_taken_up(results, start, folder)), resumed=True)


def read_start(results: Store, run_id: str) -> RunStart | None:
    """What an unpublished run was started with; None if no such run was planned.

    Raises `UserError` if this version cannot resume the run, or if it was published before.
    """
    key = start_key(run_id)
    if results.head(key) is None:
        return None
    start = _start_at(results, key)
    if start is None:
        raise UserError(
            f"run '{run_id}' cannot be resumed: {results.uri}/{key} is damaged or was written by "
            "another version of lungopacity; choose another --run-id"
        )
    if start.published:
        raise UserError(
            f"run '{run_id}' was published before, and its work files are still in "
            f"{results.uri}/{work_prefix(run_id)}; choose another --run-id"
        )
    return start


def mark_published(results: Store, start: RunStart) -> None:
    """Record beside the run's work files that the run was published, so that none resumes it."""
    key = start_key(start.run_id)
    results.write(key, json.dumps(asdict(replace(start, published=True))).encode())


def _start_at(results: Store, key: str) -> RunStart | None:
    """The start at `key`; None if it is damaged or was written by another version. Raises
    `UserError` if the storage does not answer."""
    try:
        fields = json.loads(results.read(key))
        fields |= {"files": tuple(fields["files"]), "rules": Rules.of(fields["rules"])}
        start = RunStart(**fields)
    except (ImageError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, ImageError) and error.may_pass:
            # Not None, which would give up what may be hours of work.
            raise UserError(
                f"{results.uri}/{key}: cannot be read ({error.message}); try again"
            ) from error
        return None
    is_ours = (start.columns, start.version) == (_COLUMNS, versions()["lungopacity"])
    return start if is_ours else None


def unfinished_runs(results: Store) -> list[RunStart]:
    """Runs that were planned and are not published, oldest first.

    Runs that cannot be resumed are left out, with a warning: no run has published their objects, so
    the next plan includes them anyway.
    """
    starts = []
    for item in results.list(f"{WORK}/"):
        run_id = item.key.split("/")[1]
        if item.key != start_key(run_id) or read_run(results, run_id) is not None:
            continue
        start = _start_at(results, item.key)
        if start is None:
            log.warning(
                "%s/%s is damaged or was written by another version of lungopacity: this run "
                "cannot be resumed, its objects are screened again, and `lungopacity clean` will "
                "remove it",
                results.uri,
                item.key,
            )
        elif not start.published:
            starts.append(start)
    return sorted(starts, key=lambda start: start.started_at)


def published_later(results: Store, start: RunStart) -> str | None:
    """Id of the newest run of the same kind (see `is_of_kind`) that was published after this one
    was planned; None if there is none."""
    later = [
        run["run_id"]
        for run in read_runs(results)
        if run.get("sequence", 0) > start.after
        and is_of_kind(run, start.archive, start.model_id, start.rules)
    ]
    return later[-1] if later else None


def unfinished_table(results_uri: str) -> pa.Table:
    """`unfinished_runs` as a table, one row per run: the id, archive and model that `screen` needs
    to resume it. Raises `UserError` if the URI holds no results."""
    store = open_store(results_uri)
    refuse_other_folder(store)
    starts = unfinished_runs(store)
    columns = ("run_id", "model_id", "archive", "started_at", "objects", "nightly")
    return pa.table({name: [getattr(start, name) for start in starts] for name in columns})


def choose(
    inventory: Inventory, folder: Path, limit: int | None, history: History | None
) -> list[ExportedFile]:
    """Write the objects to screen to files in `folder`: `PLANNED_SCHEMA`, sorted by key.

    `limit` keeps untried objects first, then those tried longest ago, each group by key. Otherwise
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
                f"the inventory names {counted(twice, 'object')} more than once; make a new "
                "inventory"
            )
        chosen = "SELECT *, NULL AS tried FROM listed"
        if history is not None:
            if history.runs:
                runs = counted(len(history.runs), "published run")
                log.info("leaving out the objects that %s screened", runs)
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
                f"run '{start.run_id}' was started {_as_given(name, then)}, not "
                f"{_as_given(name, now)}; use the same, or choose another --run-id"
            )


def _as_given(name: str, value: Any) -> str:
    """A setting of a run as the option that sets it, where there is one."""
    if name not in _OPTIONS:
        return f"with {name} {value}"
    if value is None or value is False:
        return f"without {_OPTIONS[name].split()[0]}"
    words = (",".join(value) or "none") if isinstance(value, list) else value
    return f"with {_OPTIONS[name].format(words)}"


def _taken_up(results: Store, start: RunStart, folder: Path) -> Iterator[Path]:
    for name in start.files:
        key = plan_key(start.run_id, name)
        cannot = f"run '{start.run_id}' cannot be resumed: {results.uri}/{key}:"
        try:
            file = work_file(results, key, folder / f"{name}.parquet")
        except ImageError as error:
            if read_run(results, start.run_id) is not None:
                raise published_meanwhile(start.run_id) from error
            fix = "try again" if error.may_pass else "choose another --run-id"
            raise UserError(f"{cannot} {error.message}; {fix}") from error
        if file is None:
            raise UserError(f"{cannot} is damaged; choose another --run-id")
        yield file
