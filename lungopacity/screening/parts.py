"""Write scored rows to part files under `_work/`, and report each file to the driver."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pyarrow as pa

from lungopacity import observe
from lungopacity.archive.content import error_columns
from lungopacity.errors import ErrorCode, ImageError, Stage, Status, UserError
from lungopacity.results.folder import part_key, start_key_of
from lungopacity.results.schema import part_schema
from lungopacity.screening.explanations import write_pictures
from lungopacity.storage import Store
from lungopacity.storage.parquet import parquet_bytes
from lungopacity.storage.probe import check_node

OBJECTS = "objects"
ROWS_PER_PART = 512
"""The most finished rows that each writer of a killed job can lose. Publishing merges the small
files."""


class WriteParts:
    """Writes tables of `part_schema` to part files; returns a report of each for the driver."""

    def __init__(self, results: Store, attempt: str) -> None:
        self.results, self.attempt = results, attempt
        self.is_checked = False

    def __call__(self, rows: pa.Table) -> pa.Table:
        try:
            if not self.is_checked:
                # Otherwise the parts would stay on this node, unseen by the driver.
                check_node(self.results, "results are written", start_key_of(self.attempt))
                self.is_checked = True
        except UserError as error:
            return _part_report({}, error=str(error))
        try:
            rows = write_pictures(self.results, rows)
            data = parquet_bytes(rows)
            self.results.write(part_key(self.attempt, data), data)
        except UserError as error:
            # Reported as a row: of a worker's exception, Ray passes on only the traceback's text.
            return _part_report({}, error=f"{error} (on {socket.gethostname()})")
        images = rows.filter(pa.compute.is_null(rows["shard_rows"]))
        codes = images["error_code"].to_pylist()
        _count_images(Counter(zip(images["status"].to_pylist(), codes, strict=True)))
        counts = Counter(images["status"].to_pylist())
        # An object is finished with its only row, or with the row that closes the pass over it.
        ends = pa.compute.or_(
            pa.compute.is_valid(rows["shard_rows"]), pa.compute.is_null(rows["reading"])
        )
        objects = pa.compute.sum(ends).as_py()
        return _part_report({**counts, OBJECTS: objects})


def _count_images(found: Mapping[tuple[str, str | None], int]) -> None:
    """Report numbers of images by status and error code to Prometheus."""
    for (status, code), number in found.items():
        observe.count("images", number, {"status": status, "error_code": code or ""})


def _part_report(counts: Mapping[str, int], error: str | None = None) -> pa.Table:
    """The report of a part file for the driver; `error`: why the file could not be written."""
    columns = {name: [counts.get(name, 0)] for name in (*map(str, Status), OBJECTS)}
    return pa.table({**columns, "error": pa.array([error], pa.string())})


def write_crashed(
    results: Store, attempt: str, objects: pa.Table, class_names: Sequence[str]
) -> None:
    """Write failed rows for objects of `PLAN_SCHEMA` that killed every process that read them."""
    message = "each process that read it died, or was ended, before it was done"
    failed = error_columns(ImageError(ErrorCode.READER_CRASH, Stage.UNPACK, message))
    failed["screened_at"] = datetime.now(UTC)
    rows = [{**row, **failed} for row in objects.to_pylist()]
    _count_images({(failed["status"], failed["error_code"]): len(rows)})
    data = parquet_bytes(pa.Table.from_pylist(rows, schema=part_schema(class_names)))
    results.write(part_key(attempt, data), data)
