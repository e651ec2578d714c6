"""The results folder: where things lie in it, and which runs count.

    predictions/screened_on=YYYY-MM-DD/<run_id>-<attempt>-NNNNN.parquet
    metrics/<run_id>-….parquet
    explanations/<run_id>/<content_sha256>.png      of positive films, where they were asked for;
                                                    of a frame <content_sha256>-<frame>.png
    runs/<run_id>.json                  the commit record, written last
    status.json                         how the newest night went
    _work/<run_id>/…                    what is being written; no reader looks here

A file that no commit record names does not exist for a reader. Runs follow each other by the
`sequence` in their records, not by any clock: clocks differ between machines, and are set back.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.results.schema import SCHEMA_VERSION
from lungopacity.storage import ConflictError, Store
from lungopacity.storage.lease import LOCKS

RUNS = "runs"
PREDICTIONS = "predictions"
METRICS = "metrics"
EXPLANATIONS = "explanations"
WORK = "_work"
STATUS = "status.json"
"""What became of the newest night. `ray job submit` tells no exit code."""

# Of keys below the results folder. The first group is the run's id.
PREDICTIONS_FILE = (
    rf"{PREDICTIONS}/screened_on=\d{{4}}-\d\d-\d\d/([^/]+)-[0-9a-f]{{8}}-\d{{5}}\.parquet"
)
METRICS_FILE = rf"{METRICS}/([^/]+)-[0-9a-f]{{8}}\.parquet"
PICTURE_FILE = rf"{EXPLANATIONS}/([^/]+)/[0-9a-f]{{64}}(?:-\d+)?\.png"
WORK_FILE = (
    rf"{WORK}/([^/]+)/"
    r"(?:run\.json|plan-[0-9a-f]{32,64}-\d{5}\.parquet|attempt=[0-9a-f]{32}/.+)"
)
RESULTS_FILE = (
    rf"(?:^|/)(?:{PREDICTIONS_FILE}|{METRICS_FILE}|{PICTURE_FILE}|{WORK_FILE}"
    rf"|{RUNS}/\d{{8}}T\d{{6}}Z-[0-9a-f]{{8}}-[0-9a-f]{{8}}\.json|{LOCKS}/nightly\.json)$"
)
"""Of keys below any results folder, wherever that lies. So narrow that no film of anybody bears
such a name by chance; status.json, and records of runs that were named by hand, are not told."""

_READ_THREADS = 16


def refuse_other_folder(store: Store) -> None:
    """Raises `UserError` where nothing lies that a folder of results has: a slip in `--results`,
    of which nobody is to be told that all is in order there."""
    prefixes = (*(f"{folder}/" for folder in (RUNS, PREDICTIONS, METRICS, WORK, LOCKS)), STATUS)
    if all(next(iter(store.list(prefix)), None) is None for prefix in prefixes):
        raise UserError(
            f"{store.uri}: no results lie there; give the --output of `lungopacity screen`"
        )


def run_key(run_id: str) -> str:
    """Key of the commit record."""
    return f"{RUNS}/{run_id}.json"


def work_prefix(run_id: str) -> str:
    """Key prefix of what the run writes before it is published."""
    return f"{WORK}/{run_id}/"


def predictions_key(screened_on: str, run_id: str, attempt: str, number: int) -> str:
    """Key of a file of rows. attempt: 8 hex digits. Matches `PREDICTIONS_FILE`."""
    return f"{PREDICTIONS}/screened_on={screened_on}/{run_id}-{attempt}-{number:05d}.parquet"


def metrics_key(run_id: str, attempt: str) -> str:
    """Key of a file of figures. attempt: 8 hex digits. Matches `METRICS_FILE`."""
    return f"{METRICS}/{run_id}-{attempt}.parquet"


def plan_name(number: int, file: Path) -> str:
    """Name of a file of a plan, see `plan_key`, by its place in the plan and its content."""
    return f"plan-{_sha256(file)}-{number:05d}"


def plan_key(run_id: str, name: str) -> str:
    """Key of a file of the run's plan. Matches `WORK_FILE`."""
    return f"{work_prefix(run_id)}{name}.parquet"


def attempt_prefix(run_id: str) -> str:
    """Key prefix of what one attempt at the run writes, a new one each time. Matches
    `WORK_FILE`."""
    return f"{work_prefix(run_id)}attempt={uuid.uuid4().hex}/"


def part_key(attempt: str, data: bytes) -> str:
    """Key of a part file, below an `attempt_prefix`, by its content. Matches `WORK_FILE`."""
    return f"{attempt}{hashlib.sha256(data).hexdigest()}.parquet"


def work_file(store: Store, key: str, target: Path) -> Path | None:
    """A file of a plan, or a part file, on this machine, see `Store.local_file`; None where its
    content is not the one that it is named by.

    A disk may lose the end of a file with its power, or a bit with its age, and DuckDB compares no
    checksum: another probability would be read without a word. Raises as `Store.local_file` does.
    """
    file = store.local_file(key, target)
    try:
        return file if _sha256(file) in key else None
    except OSError as error:
        told = error.strerror or type(error).__name__
        raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, told) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def start_key(run_id: str) -> str:
    """Key of what the run was started with: it is unfinished while this lies there."""
    return f"{work_prefix(run_id)}run.json"


def explanation_key(run_id: str, content_sha256: str, frame: int | None) -> str:
    """Key of a film's picture. Named by its content: whoever writes it again writes the same, and
    an object's name, which may be that of a patient, does not come out by it."""
    of = "" if frame is None else f"-{frame}"
    return f"{EXPLANATIONS}/{run_id}/{content_sha256}{of}.png"


def commit_run(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """Write the commit record: from this moment on readers see the run, whole, as the newest.

    Raises `UserError` where a run of this id is already there, and where a file that the record
    names is gone.
    """
    attempt = uuid.uuid4().hex
    sequence = 1 + newest_sequence(read_runs(store))
    document = {
        "schema_version": SCHEMA_VERSION,
        "sequence": sequence,
        "attempt": attempt,
        **record,
    }
    _check_files(store, run_id, record)
    data = json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    try:
        store.write(run_key(run_id), data, if_absent=True)
    except ConflictError as error:
        # An answer that was lost on its way is asked for again, and then finds our own record.
        if _parsed(store, run_key(run_id)).get("attempt") == attempt:
            return
        raise published_meanwhile(run_id) from error


def _check_files(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """A record that names files which somebody has swept away would break every later query."""
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
    """Two jobs worked on one run, and the other one was first."""
    return UserError(
        f"run '{run_id}' was published by another job meanwhile; nothing of it was changed"
    )


def read_run(store: Store, run_id: str) -> dict[str, Any] | None:
    """The commit record, or None where there is no such run."""
    if store.head(run_key(run_id)) is None:
        return None
    return _parsed(store, run_key(run_id))


def read_runs(store: Store) -> list[dict[str, Any]]:
    """All commit records, oldest first. Raises `UserError` for one that is damaged or too new."""
    keys = [item.key for item in store.list(f"{RUNS}/") if item.key.endswith(".json")]
    with ThreadPoolExecutor(_READ_THREADS) as threads:
        records = list(threads.map(lambda key: _parsed(store, key), keys))
    # The first runs ever had no sequence; they come first.
    return sorted(
        records, key=lambda run: (run.get("sequence", 0), run["started_at"], run["run_id"])
    )


def newest_sequence(runs: Iterable[Mapping[str, Any]]) -> int:
    """The highest `sequence` of commit records; 0 where there is none."""
    return max((run.get("sequence", 0) for run in runs), default=0)


def _parsed(store: Store, key: str) -> dict[str, Any]:
    try:
        record = json.loads(store.read(key))
        version = record["schema_version"]
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{store.uri}/{key}: results schema {version} is newer than this lungopacity reads "
                f"({SCHEMA_VERSION}); upgrade lungopacity"
            )
        _check_record(record)
        if "positive_class" not in record:
            # The first runs ever did not tell; it was what `train` still takes where none is given.
            names = record["class_names"]
            record["positive_class"] = "Lung_Opacity" if "Lung_Opacity" in names else names[-1]
    except (ImageError, ValueError, TypeError, LookupError) as error:
        mend = error.mend if isinstance(error, ImageError) else "restore it"
        raise UserError(
            f"{store.uri}/{key}: the commit record cannot be read ({_said(error)}); {mend}"
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
"""Those that records of older versions may lack."""


def _check_record(record: Mapping[str, Any]) -> None:
    """Whatever reads a record relies on this. Raises `ValueError` and `LookupError`."""
    there = {name: kind for name, kind in _MORE_FIELDS.items() if name in record}
    for name, kind in {**_FIELDS, **there}.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"'{name}' is {json.dumps(record[name])[:40]}")
    for name in ("started_at", "finished_at"):
        datetime.fromisoformat(record[name])
    texts = [file["key"] for file in (*record["files"], record["metrics_file"])]
    if not all(isinstance(text, str) for text in (*texts, *record["class_names"])):
        raise ValueError("names that are no text")
    if not all(isinstance(count, int) for count in record["counts"].values()):
        raise ValueError("counts that are no numbers")


def _said(error: Exception) -> str:
    if isinstance(error, ImageError):
        return error.message
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return "it is no JSON object of ours" if isinstance(error, TypeError) else str(error)
