"""Remove what killed jobs left in a results folder and in this machine's temporary folder. Files
that a commit record names are never removed."""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from lungopacity.errors import UserError
from lungopacity.results.folder import (
    CLAIM_FILE,
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
from lungopacity.results.query import files_of_runs, predictions_of
from lungopacity.storage import ObjectInfo, Store, open_store
from lungopacity.storage.lease import LEASE_S, LOCKS, remove_if_same
from lungopacity.storage.scratch import left_behind

log = logging.getLogger(__name__)

OLDER_THAN_DAYS = 7.0
_OLDEST_DAYS = 36500
_AT_WORK = timedelta(hours=1)
"""A run whose newest file is younger may still be at work."""
_PUBLISHED_WORK = "work of published runs"
_LOCK = "locks"
# Only names that we give: a mistake in --results must not delete anybody else's files.
_ROWS_OR_FIGURES = (re.compile(PREDICTIONS_FILE), re.compile(METRICS_FILE))
_PICTURE = re.compile(PICTURE_FILE)
_WORK = (re.compile(WORK_FILE), re.compile(rf"{WORK}/([^/]+)/(?:.*/)?\.tmp-[^/]+"))
_HALF_WRITTEN = re.compile(
    rf"(?:(?:{PREDICTIONS}|{METRICS}|{EXPLANATIONS}|{RUNS}|{LOCKS})/(?:.*/)?)?\.tmp-[^/]+"
)


@dataclass(frozen=True)
class Swept:
    """What was removed, or with `dry_run` would be."""

    results: str
    files: Counter[str] = field(default_factory=Counter)
    """Number of files by kind: `work of published runs`, `work of unfinished runs`, …"""
    size_bytes: int = 0
    dry_run: bool = False


def clean(
    results: str, *, older_than_days: float = OLDER_THAN_DAYS, dry_run: bool = False
) -> Swept:
    """Remove the work files of published runs, and these if they are older than `older_than_days`:
    unfinished runs, files that no commit record names, locks, and half-written files.

    Also removes folders that killed jobs left in this machine's temporary folder a day ago or
    earlier.

    An unfinished run that is removed can no longer be resumed. A run that wrote anything within the
    last hour may be at work, and stays; so does a lease that may still be held. Raises `UserError`
    if the URI holds no results, and if some files could not be removed, after removing the others.
    """
    if not 0 <= older_than_days <= _OLDEST_DAYS:
        raise UserError(
            f"--older-than must be from 0 to {_OLDEST_DAYS} days, not {older_than_days:g}"
        )
    store = open_store(results)
    refuse_other_folder(store)
    # Files are listed before the records are read: a run published in between keeps its files.
    found = list(store.list())
    files, size_bytes = _temporary_folders(dry_run)
    records = read_runs(store)
    kept: list[str] = []
    for kind, item in _left_over(found, records, store, timedelta(days=older_than_days)):
        try:
            if dry_run:
                pass
            elif kind != _LOCK:
                store.delete(item.key)
            elif not remove_if_same(store, item.key, item.etag):
                continue  # a night has taken it over since it was listed
        except UserError as error:
            kept.append(f"{item.key} ({error})")
            continue
        files[kind] += 1
        size_bytes += item.size_bytes
    if kept:
        raise UserError(
            f"{len(kept)} files could not be removed, the first being {kept[0]}; "
            f"{files.total()} others were removed"
        )
    return Swept(store.uri, files, size_bytes, dry_run)


def _temporary_folders(dry_run: bool) -> tuple[Counter[str], int]:
    """Clean this machine's temporary folder. Returns the number of folders removed, by kind, and
    their size in bytes."""
    files: Counter[str] = Counter()
    size_bytes = 0
    for folder in left_behind():
        files["temporary folders of killed jobs"] += 1
        with suppress(FileNotFoundError):  # `clean` of other results may be removing it, too
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
    """Yields the kind and the object of everything that may be removed. found: all objects in the
    results. records: commit records of the published runs. age: the least age of what is removed,
    except for work of published runs."""
    now = store.now()
    published = {run["run_id"] for run in records}
    named = {file["key"] for run in records for file in (*run["files"], run["metrics_file"])}
    of_no_row = _pictures_of_no_row(found, records, store)
    # A running job keeps writing part files, so the age of a run is that of its newest file.
    newest: dict[str, datetime] = {}
    for item in found:
        run_id = _run_of(item.key)
        if run_id is not None:
            newest[run_id] = max(newest.get(run_id, item.modified_at), item.modified_at)
    for item in found:
        kind = _PUBLISHED_WORK if item.key in of_no_row else _kind(item, published, named)
        touched = newest.get(_run_of(item.key) or "", item.modified_at)
        least = timedelta(seconds=LEASE_S) if kind == _LOCK else _AT_WORK
        if kind == _PUBLISHED_WORK or (kind is not None and now - touched >= max(age, least)):
            yield kind, item


def _pictures_of_no_row(
    found: Sequence[ObjectInfo], records: Sequence[Mapping[str, Any]], store: Store
) -> set[str]:
    """Keys of pictures of published runs that no row names: a killed attempt drew them, of objects
    that had changed when the run went on. Arguments: see `_left_over`."""
    pictures: set[str] = {item.key for item in found if _PICTURE.fullmatch(item.key)}
    drew = {_run_of(key) for key in pictures}
    # Rows are read only of runs that were resumed, the only ones that have no speed.
    resumed = [run for run in records if run["run_id"] in drew and run.get("images_per_s") is None]
    of_no_row: set[str] = set()
    for run in resumed:
        try:
            with files_of_runs(store):
                rows = predictions_of(store, [run]).to_table(columns=["explanation"])
        except UserError as error:
            log.warning("the pictures of run %s are kept: %s", run["run_id"], error)
            continue
        of_run = {key for key in pictures if _run_of(key) == run["run_id"]}
        of_no_row |= of_run.difference(rows["explanation"].to_pylist())
    return of_no_row


def _kind(item: ObjectInfo, published: set[str], named: set[str]) -> str | None:
    """The kind of a leftover; None if the object is not ours, or is in use."""
    run_id = _run_named(item.key, _WORK)
    if run_id is not None:
        return _PUBLISHED_WORK if run_id in published else "work of unfinished runs"
    # Only if there are published runs: otherwise this may not be a results folder at all.
    if published and _run_named(item.key, _ROWS_OR_FIGURES) is not None:
        return None if item.key in named else "files of runs that were never published"
    run_id = _run_named(item.key, [_PICTURE])
    if published and run_id is not None:
        return None if run_id in published else "files of runs that were never published"
    if re.fullmatch(CLAIM_FILE, item.key):
        return "files of runs that were never published"
    if re.fullmatch(rf"{LOCKS}/[^/.]+\.json", item.key):
        return _LOCK
    return "half-written files" if _HALF_WRITTEN.fullmatch(item.key) else None


def _run_of(key: str) -> str | None:
    """Id of the run that a file of work, pictures, predictions or metrics belongs to."""
    return _run_named(key, [*_WORK, *_ROWS_OR_FIGURES, _PICTURE])


def _run_named(key: str, patterns: Iterable[re.Pattern[str]]) -> str | None:
    """The run id in the key, if the key matches one of the patterns."""
    found = filter(None, (pattern.fullmatch(key) for pattern in patterns))
    return next((match[1] for match in found), None)
