"""Sweep what killed jobs left in a results folder, and nothing that a commit record names; and what
they left in the temporary folder of this machine."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from lungopacity.errors import UserError
from lungopacity.results.folder import (
    EXPLANATIONS,
    METRICS,
    METRICS_FILE,
    PICTURE_FILE,
    PREDICTIONS,
    PREDICTIONS_FILE,
    RUNS,
    WORK,
    WORK_FILE,
    read_runs,
    refuse_other_folder,
)
from lungopacity.storage import ObjectInfo, Store, open_store
from lungopacity.storage.lease import LEASE_S, LOCKS
from lungopacity.storage.scratch import left_behind

OLDER_THAN_DAYS = 7.0
_OLDEST_DAYS = 36500
_AT_WORK = timedelta(hours=1)
"""What a run has written so recently, it may be about to publish."""
_PUBLISHED_WORK = "work of published runs"
_LOCK = "locks"
# The names that we give, and nothing else: a slip in --results must not cost anybody's files.
_ROWS_OR_FIGURES = (re.compile(PREDICTIONS_FILE), re.compile(METRICS_FILE))
_PICTURE = re.compile(PICTURE_FILE)
_WORK = (re.compile(WORK_FILE), re.compile(rf"{WORK}/([^/]+)/(?:.*/)?\.tmp-[^/]+"))
_HALF_WRITTEN = re.compile(
    rf"(?:(?:{PREDICTIONS}|{METRICS}|{EXPLANATIONS}|{RUNS}|{LOCKS})/(?:.*/)?)?\.tmp-[^/]+"
)


@dataclass(frozen=True)
class Swept:
    """What was removed, or on a dry run would be."""

    results: str
    files: Counter[str] = field(default_factory=Counter)
    """By kind: `work of published runs`, `work of unfinished runs`, …"""
    size_bytes: int = 0
    dry_run: bool = False


def clean(
    results: str, *, older_than_days: float = OLDER_THAN_DAYS, dry_run: bool = False
) -> Swept:
    """Remove work of published runs, and what is older than so many days of: unfinished runs,
    files that no commit record names, locks, and half-written files.

    On this machine also folders that killed jobs left a day ago in the temporary folder.

    An unfinished run that is removed can no longer be taken up. What was written within the last
    hour may be of a job that is at work, and stays, as does a lease that may still be held. Raises
    `UserError`, as where no results lie; also where something cannot be removed, after all else
    was.
    """
    if not 0 <= older_than_days <= _OLDEST_DAYS:
        raise UserError(
            f"--older-than must be from 0 to {_OLDEST_DAYS} days, not {older_than_days:g}"
        )
    store = open_store(results)
    refuse_other_folder(store)
    # The files first, the records after: a run that is published meanwhile keeps its files.
    found = list(store.list())
    files, size_bytes = _temporary_folders(dry_run)
    records = read_runs(store)
    kept: list[str] = []
    for kind, item in _left_over(found, records, store, timedelta(days=older_than_days)):
        try:
            if not dry_run:
                store.delete(item.key)
        except UserError as error:
            kept.append(f"{item.key} ({error})")
            continue
        files[kind] += 1
        size_bytes += item.size_bytes
    if kept:
        raise UserError(
            f"{len(kept)} files cannot be removed, as {kept[0]}; {files.total()} others were"
        )
    return Swept(store.uri, files, size_bytes, dry_run)


def _temporary_folders(dry_run: bool) -> tuple[Counter[str], int]:
    """Sweep this machine; what was removed, by kind, and its bytes."""
    files: Counter[str] = Counter()
    size_bytes = 0
    for folder in left_behind():
        files["temporary folders of killed jobs"] += 1
        size_bytes += sum(item.lstat().st_size for item in folder.rglob("*") if item.is_file())
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    return files, size_bytes


def _left_over(
    found: Sequence[ObjectInfo],
    records: Sequence[Mapping[str, Any]],
    store: Store,
    age: timedelta,
) -> Iterator[tuple[str, ObjectInfo]]:
    """Kind, and object, of what may be removed. found: all objects of the results. records: of the
    published runs."""
    now = store.now()
    published = {run["run_id"] for run in records}
    named = {file["key"] for run in records for file in (*run["files"], run["metrics_file"])}
    # A run that is at work writes part files all the time: its youngest file tells its age.
    newest: dict[str, datetime] = {}
    for item in found:
        run_id = _run_of(item.key)
        if run_id is not None:
            newest[run_id] = max(newest.get(run_id, item.modified_at), item.modified_at)
    for item in found:
        kind = _kind(item, published, named)
        touched = newest.get(_run_of(item.key) or "", item.modified_at)
        least = timedelta(seconds=LEASE_S) if kind == _LOCK else _AT_WORK
        if kind == _PUBLISHED_WORK or (kind is not None and now - touched >= max(age, least)):
            yield kind, item


def _kind(item: ObjectInfo, published: set[str], named: set[str]) -> str | None:
    """What the object is left over from; None where it is none of ours, or in use."""
    run_id = _run_named(item.key, _WORK)
    if run_id is not None:
        return _PUBLISHED_WORK if run_id in published else "work of unfinished runs"
    # Only beside published runs: without one, this may be no results folder at all.
    if published and _run_named(item.key, _ROWS_OR_FIGURES) is not None:
        return None if item.key in named else "files of runs that were never published"
    run_id = _run_named(item.key, [_PICTURE])
    if published and run_id is not None:
        return None if run_id in published else "files of runs that were never published"
    if re.fullmatch(rf"{LOCKS}/[^/.]+\.json", item.key):
        return _LOCK
    return "half-written files" if _HALF_WRITTEN.fullmatch(item.key) else None


def _run_of(key: str) -> str | None:
    """The run that a file is of: of its work, a picture, predictions or metrics."""
    return _run_named(key, [*_WORK, *_ROWS_OR_FIGURES, _PICTURE])


def _run_named(key: str, patterns: Iterable[re.Pattern[str]]) -> str | None:
    """The run's id in the key, where it is of one of the patterns."""
    found = filter(None, (pattern.fullmatch(key) for pattern in patterns))
    return next((match[1] for match in found), None)
