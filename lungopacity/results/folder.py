"""The results folder: where things lie in it, and which runs count.

    predictions/screened_on=YYYY-MM-DD/<run_id>-NNNNN.parquet
    metrics/<run_id>.parquet
    runs/<run_id>.json                  the commit record, written last
    _work/<run_id>/…                    what is being written; no reader looks here

A file that no commit record names does not exist for a reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lungopacity.errors import ImageError, UserError
from lungopacity.results.schema import SCHEMA_VERSION
from lungopacity.storage import AlreadyExistsError, Store

RUNS = "runs"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_run_id(run_id: str) -> None:
    """Raises `UserError` for a run id that cannot stand in a file name."""
    if not _RUN_ID.fullmatch(run_id):
        raise UserError(
            f"run id {run_id!r}: use up to 100 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


def run_key(run_id: str) -> str:
    """Key of the commit record."""
    return f"{RUNS}/{run_id}.json"


def work_prefix(run_id: str) -> str:
    """Key prefix of what the run writes before it is published."""
    return f"_work/{run_id}/"


def commit_run(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """Write the commit record: from this moment on readers see the run, whole.

    Raises `UserError` where a run of this id is already there.
    """
    document = {"schema_version": SCHEMA_VERSION, **record}
    data = json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
    try:
        store.write(run_key(run_id), data, if_absent=True)
    except AlreadyExistsError as error:
        raise UserError(
            f"run '{run_id}' was published by another job meanwhile; nothing of it was changed"
        ) from error


def read_run(store: Store, run_id: str) -> dict[str, Any] | None:
    """The commit record, or None where there is no such run."""
    if store.head(run_key(run_id)) is None:
        return None
    return _parsed(store, run_key(run_id))


def read_runs(store: Store) -> list[dict[str, Any]]:
    """All commit records, oldest first. Raises `UserError` for one that is damaged or too new."""
    keys = [item.key for item in store.list(f"{RUNS}/") if item.key.endswith(".json")]
    return sorted(
        (_parsed(store, key) for key in keys),
        key=lambda run: (run["started_at"], run["run_id"]),
    )


def _parsed(store: Store, key: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(store.read(key))
        version = record["schema_version"]
    except (ImageError, ValueError, KeyError) as error:
        raise UserError(
            f"{store.uri}/{key}: the commit record cannot be read; restore it"
        ) from error
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{store.uri}/{key}: results schema {version} is newer than this lungopacity reads "
            f"({SCHEMA_VERSION}); upgrade lungopacity"
        )
    return record
