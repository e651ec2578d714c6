"""The results folder: its layout, and which runs count.

    predictions/screened_on=YYYY-MM-DD/<run_id>-<attempt>-NNNNN.parquet
    metrics/<run_id>-<attempt>.parquet
    explanations/<run_id>/<content_sha256>.png      with --explain, pictures of positive films;
                                                    <content_sha256>-<frame>.png of a frame
    runs/<run_id>.json                  the commit record, written last
    status.json                         how the newest night went
    _work/<run_id>/…                    work in progress; readers never look here
    _lock/run-NNNNNN                    the claim of a number, while its run is published

Readers ignore files that no commit record names. Runs are ordered by the `sequence` in their
records, not by a clock: clocks differ between machines, and can be set back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.results.schema import SCHEMA_VERSION
from lungopacity.storage import ConflictError, Store
from lungopacity.storage.lease import LOCKS

log = logging.getLogger(__name__)

RUNS = "runs"
PREDICTIONS = "predictions"
METRICS = "metrics"
EXPLANATIONS = "explanations"
WORK = "_work"
STATUS = "status.json"
"""How the newest night went, because `ray job submit` does not pass on the exit code."""

# Patterns of keys in the results folder. The first group, if any, is the run's id.
PREDICTIONS_FILE = (
    rf"{PREDICTIONS}/screened_on=\d{{4}}-\d\d-\d\d/([^/]+)-[0-9a-f]{{8}}-\d{{5}}\.parquet"
)
METRICS_FILE = rf"{METRICS}/([^/]+)-[0-9a-f]{{8}}\.parquet"
PICTURE_FILE = rf"{EXPLANATIONS}/([^/]+)/[0-9a-f]{{64}}(?:-\d+)?\.png"
WORK_FILE = (
    rf"{WORK}/([^/]+)/"
    r"(?:run\.json|plan-[0-9a-f]{32,64}-\d{5}\.parquet|attempt=[0-9a-f]{32}/.+)"
)
CLAIM_FILE = rf"{LOCKS}/run-\d{{6,}}"
RESULTS_FILE = (
    rf"(?:^|/)(?:{PREDICTIONS_FILE}|{METRICS_FILE}|{PICTURE_FILE}|{WORK_FILE}"
    rf"|{RUNS}/\d{{8}}T\d{{6}}Z-[0-9a-f]{{8}}-[0-9a-f]{{8}}\.json"
    rf"|{LOCKS}/nightly\.json|{CLAIM_FILE})$"
)
"""Pattern of keys in any results folder, wherever that is. It is so narrow that no film has such a
name by chance. It does not match status.json, or records of runs with a hand-made id."""

_READ_THREADS = 16
_CLAIM_S = 30.0
"""How long the claim of a number keeps other runs waiting: its job may have been killed."""
_ASK_S = 0.5


def refuse_other_folder(store: Store) -> None:
    """Raises `UserError` if the folder holds nothing that a results folder has. With a mistyped
    `--results`, a command must not report that all is well."""
    prefixes = (*(f"{folder}/" for folder in (RUNS, PREDICTIONS, METRICS, WORK, LOCKS)), STATUS)
    if all(next(iter(store.list(prefix)), None) is None for prefix in prefixes):
        raise UserError(f"{store.uri}: no results there; give the --output of `lungopacity screen`")


def run_key(run_id: str) -> str:
    """Key of the run's commit record."""
    return f"{RUNS}/{run_id}.json"


def claim_key(sequence: int) -> str:
    """Key of the claim of a run's number. Matches `CLAIM_FILE`."""
    return f"{LOCKS}/run-{sequence:06d}"


def work_prefix(run_id: str) -> str:
    """Key prefix of the files that the run writes before it is published."""
    return f"{WORK}/{run_id}/"


def predictions_key(screened_on: str, run_id: str, attempt: str, number: int) -> str:
    """Key of a predictions file. attempt: 8 hex digits. Matches `PREDICTIONS_FILE`."""
    return f"{PREDICTIONS}/screened_on={screened_on}/{run_id}-{attempt}-{number:05d}.parquet"


def metrics_key(run_id: str, attempt: str) -> str:
    """Key of a metrics file. attempt: 8 hex digits. Matches `METRICS_FILE`."""
    return f"{METRICS}/{run_id}-{attempt}.parquet"


def plan_name(number: int, file: Path) -> str:
    """Name of a plan file for `plan_key`, made of its content's hash and its number in the plan."""
    return f"plan-{_sha256(file)}-{number:05d}"


def plan_key(run_id: str, name: str) -> str:
    """Key of a plan file. Matches `WORK_FILE`."""
    return f"{work_prefix(run_id)}{name}.parquet"


def attempt_prefix(run_id: str) -> str:
    """Key prefix of the part files of one attempt at the run; each call returns a new one. Keys
    below it match `WORK_FILE`."""
    return f"{work_prefix(run_id)}attempt={uuid.uuid4().hex}/"


def part_key(attempt: str, data: bytes) -> str:
    """Key of a part file with this content. attempt: an `attempt_prefix`. Matches `WORK_FILE`."""
    return f"{attempt}{hashlib.sha256(data).hexdigest()}.parquet"


def work_file(store: Store, key: str, target: Path) -> Path | None:
    """A plan file or part file as a local file, see `Store.local_file`; None if its content does
    not match the hash in its name.

    A disk may lose the end of a file in a power failure, or a bit with age. DuckDB checks no
    checksums, so it would silently read another probability. Raises as `Store.local_file` does.
    """
    file = store.local_file(key, target)
    try:
        return file if _sha256(file) in key else None
    except OSError as error:
        message = error.strerror or type(error).__name__
        raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, message) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def start_key(run_id: str) -> str:
    """Key of the file that says how the run was started. The run is unfinished while it exists."""
    return f"{work_prefix(run_id)}run.json"


def start_key_of(attempt: str) -> str:
    """The same for the run of an `attempt_prefix`."""
    return f"{attempt.rpartition('attempt=')[0]}run.json"


def explanation_key(run_id: str, content_sha256: str, frame: int | None) -> str:
    """Key of a film's picture. It is named by the film's content, so that a second attempt writes
    the same file, and because the name of an object may be that of a patient."""
    suffix = "" if frame is None else f"-{frame}"
    return f"{EXPLANATIONS}/{run_id}/{content_sha256}{suffix}.png"


def commit_run(
    store: Store,
    run_id: str,
    record: Mapping[str, Any],
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Write the commit record: from then on, readers see the whole run, as the newest.

    `before_commit` is called last before that; if it raises, nothing is published. Raises
    `UserError` if a run with this id is already published, or if a file that the record names is
    gone.
    """
    _check_files(store, run_id, record)
    attempt = uuid.uuid4().hex
    with _next_number(store) as sequence:
        before_commit()
        document = {
            "schema_version": SCHEMA_VERSION,
            "sequence": sequence,
            "attempt": attempt,
            **record,
        }
        data = json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
        try:
            store.write(run_key(run_id), data, if_absent=True)
        except ConflictError as error:
            # If the answer to our own write was lost, the retry finds our own record.
            if _parsed(store, run_key(run_id)).get("attempt") != attempt:
                raise published_meanwhile(run_id) from error


@contextmanager
def _next_number(store: Store) -> Iterator[int]:
    """The `sequence` of the next run. No other run gets it.

    In the block, other runs wait, so what was checked there still holds when the run is published.
    If the block takes longer than `_CLAIM_S`, they go on, and count as newer.
    """
    ours = uuid.uuid4().hex.encode()
    number, until = 0, 0.0
    read: dict[str, int] = {}

    def newest() -> int:
        runs = read_runs(store, except_for=read)
        read.update((run_key(run["run_id"]), newest_sequence([run])) for run in runs)
        return max(read.values(), default=0)

    while True:
        last = newest()
        if last >= number:
            number, until = last + 1, time.monotonic() + _CLAIM_S
        elif time.monotonic() > until:
            log.warning("a run that was to be published before this one has not appeared")
            number, until = number + 1, time.monotonic() + _CLAIM_S
        try:
            store.write(claim_key(number), ours, if_absent=True)
        except ConflictError:
            # If the answer to our own write was lost, the retry finds our own claim.
            if _content(store, claim_key(number)) != ours:
                time.sleep(_ASK_S)
                continue
        try:
            # Who had claimed the number before may have published, and have removed the claim.
            if newest() < number:
                yield number
                return
        finally:
            # Some users may write and not delete. A claim that stays keeps nobody waiting once a
            # run of this number, or of a higher one, is published.
            with suppress(UserError):
                store.delete(claim_key(number))


def _content(store: Store, key: str) -> bytes | None:
    """The content of a claim; None if it is gone, or cannot be read now."""
    try:
        return store.read(key)
    except ImageError:
        return None


def _check_files(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """Raises `UserError` if a file that the record names is gone, as `clean` may have removed it:
    such a record would break every later query."""
    files = [*record.get("files", ()), *filter(None, [record.get("metrics_file")])]
    with ThreadPoolExecutor(_READ_THREADS) as threads:
        found = list(threads.map(lambda file: store.head(file["key"]), files))
    for file, there in zip(files, found, strict=True):
        if there is None:
            raise UserError(
                f"{store.uri}/{file['key']}: is gone, so run '{run_id}' cannot be published; "
                "screen again"
            )


def published_meanwhile(run_id: str) -> UserError:
    """The error if two jobs worked on one run, and the other was first."""
    return UserError(
        f"run '{run_id}' was published by another job meanwhile; that run was not changed"
    )


def read_run(store: Store, run_id: str) -> dict[str, Any] | None:
    """The commit record, or None if no such run is published. Raises as `read_runs` does."""
    if store.head(run_key(run_id)) is None:
        return None
    return _parsed(store, run_key(run_id))


def read_runs(store: Store, *, except_for: Collection[str] = ()) -> list[dict[str, Any]]:
    """All commit records, oldest first; those with the keys `except_for` are not read. Raises
    `UserError` for one that is damaged or too new."""
    keys = [
        item.key
        for item in store.list(f"{RUNS}/")
        if item.key.endswith(".json") and item.key not in except_for
    ]
    with ThreadPoolExecutor(_READ_THREADS) as threads:
        records = list(threads.map(lambda key: _parsed(store, key), keys))
    # The earliest runs have no sequence; they come first.
    return sorted(
        records, key=lambda run: (run.get("sequence", 0), run["started_at"], run["run_id"])
    )


def newest_sequence(runs: Iterable[Mapping[str, Any]]) -> int:
    """The highest `sequence` of the commit records; 0 if there are none."""
    return max((run.get("sequence", 0) for run in runs), default=0)


def _parsed(store: Store, key: str) -> dict[str, Any]:
    try:
        record = json.loads(store.read(key))
        version = record["schema_version"]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{store.uri}/{key}: results schema {version} is newer than this lungopacity can "
                f"read ({SCHEMA_VERSION}); upgrade lungopacity"
            )
        _check_record(record)
        if "positive_class" not in record:
            # Not in the earliest records. Runs then used what is still the default of `train`.
            names = record["class_names"]
            record["positive_class"] = "Lung_Opacity" if "Lung_Opacity" in names else names[-1]
    except (ImageError, ValueError, TypeError, LookupError) as error:
        fix = error.advice if isinstance(error, ImageError) else "restore it"
        raise UserError(
            f"{store.uri}/{key}: the commit record cannot be read ({_reason(error)}); {fix}"
        ) from error
    return dict(record)


_FIELDS: dict[str, type | UnionType] = {
    "run_id": str,
    "model_id": str,
    "archive": str,
    "started_at": str,
    "finished_at": str,
    "class_names": list,
    "counts": dict,
    "files": list,
    "metrics_file": dict,
}
_MORE_FIELDS: dict[str, type | UnionType] = {
    "sequence": int,
    "positive_class": str,
    "synthetic": bool,
    "images": int,
    "positive": int,
    "review": int,
    "images_per_s": float | int | None,
    "settings": dict,
    "versions": dict,
}
"""Fields that records of older versions may lack."""


def _check_record(record: Mapping[str, Any]) -> None:
    """Check the fields and types that readers of a record rely on. Raises `ValueError`,
    `LookupError` or `TypeError`."""
    present = {name: kind for name, kind in _MORE_FIELDS.items() if name in record}
    for name, kind in {**_FIELDS, **present}.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"'{name}' is {json.dumps(record[name])[:40]}")
    for name in ("started_at", "finished_at"):
        datetime.fromisoformat(record[name])
    texts = [file["key"] for file in (*record["files"], record["metrics_file"])]
    if not all(isinstance(text, str) for text in (*texts, *record["class_names"])):
        raise ValueError("a name is not a text")
    if not all(isinstance(count, int) for count in record["counts"].values()):
        raise ValueError("a count is not a whole number")


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return error.message
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return "it is not a commit record" if isinstance(error, TypeError) else str(error)
