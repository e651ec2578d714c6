"""Nightly screening: every object that no run has screened yet, once, even after failed nights."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Unpack

from lungopacity.archive.inventory import Inventory
from lungopacity.errors import NOTICE, Status, UserError, foreseen
from lungopacity.evaluation.drift import Shift
from lungopacity.results.folder import STATUS, read_runs
from lungopacity.results.workbench import temporary_folder
from lungopacity.runtime import code_of_signal, if_head_is_lost
from lungopacity.screening.finish import ScreeningResult
from lungopacity.screening.history import History, all_hide_names
from lungopacity.screening.job import ScreeningJob, ScreeningOptions, screening_job
from lungopacity.screening.plan import (
    RunStart,
    check_names_stay_hidden,
    choose,
    published_later,
    unfinished_runs,
)
from lungopacity.screening.screen import check_apart, inventory_at, run_job
from lungopacity.storage import Store, open_store
from lungopacity.storage.lease import Lease

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Night:
    """What a night did, or with `dry_run` would do."""

    results: str
    runs: tuple[ScreeningResult, ...]
    """First the finished runs of earlier nights, if any; then tonight's own."""
    planned: int | None = None
    """Only of a dry run: at most how many objects tonight's own run would screen. The objects of
    `unfinished` runs are counted, although those runs would screen them."""
    unfinished: tuple[str, ...] = ()
    """Only of a dry run: ids of runs that the night would finish first."""
    status_written: bool = True
    """False: `status.json` does not tell how the night ended, because it could not be written."""

    @property
    def exit_code(self) -> int:
        """The highest of the runs; at least 1 if `status.json` does not tell it."""
        return max([int(not self.status_written), *(run.exit_code for run in self.runs)])


def nightly(
    archive: str,
    model: str,
    results: str,
    *,
    inventory: str | None = None,
    max_images: int | None = None,
    dry_run: bool = False,
    **options: Unpack[ScreeningOptions],
) -> Night:
    """Screen what no published run has screened with this model, and report in `status.json`.

    archive, model, results: URIs. `inventory`: see `read_inventory`. `max_images`: at most so many
    objects tonight; the next night continues. options: see `screening_job`. Raises `UserError`,
    also if another night is working on these results.
    """
    if max_images is not None and max_images < 1:
        raise UserError(f"--max-images must be at least 1, not {max_images}")
    store = open_store(results)
    # Checked before the lease, because that already writes a file to the results.
    check_apart(archive, [store.uri])
    if dry_run:
        return _rehearsed(store, archive, model, results, inventory, max_images, options)
    # If names are hashed, readers of the results must not see them, and the URI of an archive that
    # is a single object is its name.
    may_quote_names = not options.get("hash_keys") and not _hides_all_names(store)
    shown = open_store(archive).uri if may_quote_names else None
    with (
        Lease(store, "nightly", f"nightly screening of {shown or 'an archive'}") as lease,
        if_head_is_lost(lambda why: status.write("failed", 2, runs, why)),
    ):
        status = _Status(store, shown, lease)
        runs: list[ScreeningResult] = []
        check = partial(_check, lease, runs)
        try:
            job = screening_job(model, results, **options)
            publish = partial(
                run_job,
                job,
                before_commit=check,
                go_on_or_raise=partial(_check_if_taken_over, lease, runs),
                on_published=runs.append,
                go_on="the next night continues run {}",
            )
            for start in _unfinished(job, inventory_at(archive, inventory, job.written).uri):
                if not _may_be_finished(job, start):
                    continue
                log.info("first finishing run %s of an earlier night", start.run_id)
                try:
                    objects = Inventory(start.archive, iter(()))
                    publish(
                        objects,
                        time.monotonic(),
                        run_id=start.run_id,
                        before_commit=partial(_check_newest, job, start, check),
                    )
                except Exception as error:
                    # A cause that stops all work will stop tonight's own run, too. One that stops
                    # only this run must not stop every night.
                    check()
                    log.warning(
                        "run %s could not be finished; tonight's own run screens its objects: %s",
                        start.run_id,
                        error if isinstance(error, UserError) else type(error).__name__,
                    )
            began = time.monotonic()
            listed = inventory_at(archive, inventory, job.written)
            status.archive = listed.uri
            history = _history(job, listed.uri)
            publish(listed, began, limit=max_images, history=history, nightly=True)
        except BaseException as error:
            exit_code, why = _ended(error, may_quote_names=may_quote_names)
            status.write("failed", exit_code, runs, why)
            raise
        night = Night(store.uri, tuple(runs))
        written = status.write("finished", night.exit_code, night.runs)
    return replace(night, status_written=written)


def _hides_all_names(store: Store) -> bool:
    """Whether the results must go on showing no name, although `--hash-keys` was forgotten."""
    try:
        return all_hide_names(read_runs(store))
    except UserError:
        return True  # nobody can say, and the night will stop at the same error


def _check(lease: Lease, runs: Sequence[ScreeningResult]) -> None:
    """Raises `UserError` if the lease was lost: nothing more may be published then."""
    try:
        lease.check()
    except UserError as error:
        published = f"only {' and '.join(run.run_id for run in runs)}" if runs else "nothing"
        raise UserError(
            f"{error}; {published} was published; the next night continues from there"
        ) from error


def _check_newest(job: ScreeningJob, start: RunStart, check: Callable[[], None]) -> None:
    """`check`, and raises `UserError` if a newer run was published while this one was finished."""
    check()
    later = published_later(job.results, start)
    if later is not None:
        raise UserError(f"run {later} was published meanwhile, and its rows must stay the newest")


def _check_if_taken_over(lease: Lease, runs: Sequence[ScreeningResult]) -> None:
    """As `_check`, but only if another job is known to hold the lease: going on for hours would be
    in vain."""
    if lease.taken_over:
        _check(lease, runs)


def _rehearsed(
    store: Store,
    archive: str,
    model: str,
    results: str,
    inventory: str | None,
    max_images: int | None,
    options: ScreeningOptions,
) -> Night:
    job = screening_job(model, results, **options)
    listed = inventory_at(archive, inventory, job.written)
    history = _history(job, listed.uri)
    check_names_stay_hidden(job.results, history.published, job.rules)
    with temporary_folder() as folder:
        files = choose(listed, folder, max_images, history)
    return Night(
        store.uri,
        (),
        planned=sum(file.rows for file in files),
        unfinished=tuple(
            start.run_id for start in _unfinished(job, listed.uri) if _may_be_finished(job, start)
        ),
    )


def _history(job: ScreeningJob, archive: str) -> History:
    return History.read(job.results, archive, job.model.model_id, job.rules, job.pseudonyms)


def _unfinished(job: ScreeningJob, archive: str) -> list[RunStart]:
    """Unfinished runs of earlier nights over this archive, with this model and positive class.

    archive: `Inventory.uri`.
    """
    return [
        start
        for start in unfinished_runs(job.results)
        if start.nightly
        and (start.archive, start.model_id, start.rules.positive_class)
        == (archive, job.model.model_id, job.model.spec.positive_class)
    ]


def _may_be_finished(job: ScreeningJob, start: RunStart) -> bool:
    """Whether the run can be published with the rules it was started with, as the newest run. If
    not, a warning says why."""
    others = job.rules.that_differ(start.rules.settings())
    later = published_later(job.results, start)
    if others:
        why = f"it was started with another {', '.join(others)}"
    elif later is not None:
        why = f"run {later} was published since then"
    else:
        return True
    log.warning(
        "run %s of an earlier night will not be finished, and its objects are screened again: %s",
        start.run_id,
        why,
    )
    return False


def _ended(error: BaseException, *, may_quote_names: bool) -> tuple[int, str]:
    """The exit code of a night that does not finish, and the reason."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "ended by Ctrl-C; the next night continues"
    if isinstance(error, SystemExit):
        # Ray exits with 1 by itself, and also if a SIGTERM arrives while it gets an object.
        if 143 in (error.code, code_of_signal()):
            return 143, "ended by SIGTERM; the next night continues"
        return 2, f"Ray ended this command (exit code {error.code}); the next night continues"
    message = foreseen(error)
    if message is not None:
        # If names are hashed, readers of the results must not see them in a message.
        return 2, message if may_quote_names else "stopped; the job's log says why"
    return 2, f"unforeseen {type(error).__name__}; see the job's log"


class _Status:
    """`status.json`: written when a night begins, and when it ends.

    A night that has lost its lease does not write: the file belongs to the night that took over.
    """

    def __init__(self, store: Store, archive: str | None, lease: Lease) -> None:
        self.store = store
        self.lease = lease
        self.archive = archive
        """URI of the archive; None if it must not be shown."""
        self.started_at = _now()
        self.write("running", None, [])

    def write(
        self,
        state: str,
        exit_code: int | None,
        runs: Sequence[ScreeningResult],
        message: str | None = None,
    ) -> bool:
        """Returns False if the file could not be written; a log line says why."""
        counts = {
            status.value: sum(getattr(run, status.value) for run in runs) for status in Status
        }
        document = {
            "notice": NOTICE,
            "archive": self.archive,
            "started_at": self.started_at,
            "state": state,
            "exit_code": exit_code,
            "finished_at": None if state == "running" else _now(),
            "message": message,
            "runs": [run.run_id for run in runs],
            "images": sum(run.images for run in runs),
            "counts": counts,
            "failed_again": sum(run.failed_again for run in runs),
            "positive": sum(run.positive for run in runs),
            "review": sum(run.review for run in runs),
            "broken": any(run.broken for run in runs),
            "nothing_scored": [run.run_id for run in runs if run.nothing_scored],
            "drift": {run.run_id: [_entry(shift) for shift in run.drift] for run in runs},
        }
        try:
            if self.lease.held():
                self.store.write(STATUS, json.dumps(document, indent=2, allow_nan=False).encode())
        except UserError as error:
            # The night's results count; the status file is only a report.
            log.warning("%s could not be written: %s", STATUS, error)
            return False
        return True


def _entry(shift: Shift) -> dict[str, Any]:
    return {
        "of": shift.name,
        "verdict": shift.verdict,
        "psi": None if shift.verdict == "too_few" else round(shift.psi, 4),
        "images": shift.n,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
