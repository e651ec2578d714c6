"""Part files of all attempts to one published run: each image of the plan once, or nothing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lungopacity.results.schema import part_schema, predictions_schema
from lungopacity.screening.plan import Plan, parquet_bytes
from lungopacity.screening.pseudonyms import Pseudonyms, write_key_map
from lungopacity.storage import Store

log = logging.getLogger(__name__)

_ROWS_PER_FILE = 1_000_000


@dataclass(frozen=True)
class Finished:
    """What the attempts have written so far, without repeats."""

    rows: pa.Table
    """`part_schema`, no shard markers, sorted by image and member; complete objects only."""
    objects: frozenset[str]
    """Keys of the plan whose every image is in `rows`."""


def collect(results: Store, plan: Plan, class_names: Sequence[str]) -> Finished:
    """Read every part file of the run.

    An object of one image is complete with its row, one of several with all rows of one pass over
    it: the passes of two attempts are never mixed, for they may have met different content.
    """
    schema = part_schema(class_names)
    parts = [
        pq.read_table(pa.BufferReader(results.read(item.key)), schema=schema)
        for item in results.list(f"{plan.work}attempt=")
        if item.key.endswith(".parquet")
    ]
    written = pa.concat_tables([schema.empty_table(), *parts])
    is_marker = pc.is_valid(written["shard_rows"])
    rows = _without_repeats(
        written.filter(pc.invert(is_marker)), ["image", "reading", "member_index", "frame"]
    )
    readings = _whole_readings(rows, written.filter(is_marker))
    # An object that one attempt could not read, and another read as several images, is the latter.
    rows = rows.filter(
        pc.or_(
            pc.and_(
                pc.is_null(rows["reading"]),
                pc.invert(pc.is_in(rows["image"], pa.array(sorted(readings), pa.string()))),
            ),
            pc.is_in(rows["reading"], value_set=pa.array(sorted(readings.values()), pa.string())),
        )
    )
    # A shard without a member has no row, and is done all the same.
    done = set(rows["image"].to_pylist()) | set(readings)
    return Finished(rows=rows, objects=frozenset(done & set(plan.objects["image"].to_pylist())))


def _without_repeats(rows: pa.Table, key: list[str]) -> pa.Table:
    """Sorted, one row for each key: of repeats a readable one, then the earliest."""
    ranked = rows.append_column("_rank", pc.not_equal(rows["status"], "ok").cast(pa.int8()))
    order = [(name, "ascending") for name in (*key, "_rank", "screened_at")]
    rows = ranked.sort_by(order).drop_columns("_rank").combine_chunks()
    if rows.num_rows < 2:
        return rows
    same = pa.array([True] * (rows.num_rows - 1))
    for name in key:
        before = rows[name].slice(0, rows.num_rows - 1).combine_chunks()
        after = rows[name].slice(1).combine_chunks()
        # Null equals null here: a loose image has no reading, member index or frame.
        equal = pc.or_(
            pc.fill_null(pc.equal(before, after), False),
            pc.and_(pc.is_null(before), pc.is_null(after)),
        )
        same = pc.and_(same, equal)
    return rows.filter(pa.concat_arrays([pa.array([True]), pc.invert(same)]))


def _whole_readings(rows: pa.Table, markers: pa.Table) -> dict[str, str]:
    """For each shard that was read to its end at least once: the first such pass."""
    counted = rows.group_by("reading").aggregate([([], "count_all")]).to_pylist()
    found = {row["reading"]: row["count_all"] for row in counted}
    whole: dict[str, str] = {}
    for marker in markers.sort_by("screened_at").to_pylist():
        if found.get(marker["reading"], 0) == marker["shard_rows"]:
            whole.setdefault(marker["image"], marker["reading"])
    return whole


def missing_objects(plan: Plan, finished: Finished) -> pa.Table:
    """Objects of the plan that still have to be screened."""
    done = pa.array(sorted(finished.objects), pa.string())
    return plan.objects.filter(pc.invert(pc.is_in(plan.objects["image"], value_set=done)))


def write_predictions(
    results: Store,
    plan: Plan,
    rows: pa.Table,
    class_names: Sequence[str],
    *,
    synthetic_model: bool,
    label_of: Mapping[str, str],
    pseudonyms: Pseudonyms | None = None,
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Write the compact, sorted files. Returns the table, and each file's key, rows and hash.

    rows: complete; see `collect`. `label_of`: by image key, or member name inside a shard.
    `pseudonyms`: with a key map, names of objects are hashed in the files and in the table.
    """
    start = plan.start
    count = rows.num_rows
    names = pc.coalesce(rows["member"], rows["image"]).to_pylist()
    constant = {
        "run_id": start.run_id,
        "model_id": start.model_id,
        "archive": start.archive,
    }
    columns = {name: pa.repeat(pa.scalar(value), count) for name, value in constant.items()}
    columns |= {name: rows[name] for name in rows.column_names}
    if synthetic_model:
        columns["synthetic"] = pa.repeat(pa.scalar(True), count)
    columns["label"] = pa.array([label_of.get(name) for name in names], pa.string())
    schema = predictions_schema(class_names)
    table = pa.table({name: columns[name] for name in schema.names}).cast(schema)
    if pseudonyms is not None and pseudonyms.key_map is not None:
        table, hashed = pseudonyms.hash_names(table)
        # Before the results: hashes without a map would be of no use to anyone.
        write_key_map(pseudonyms.key_map, start.run_id, hashed)
    files = []
    for number, offset in enumerate(range(0, count, _ROWS_PER_FILE)):
        piece = table.slice(offset, _ROWS_PER_FILE)
        data = parquet_bytes(piece)
        key = f"predictions/screened_on={start.screened_on}/{start.run_id}-{number:05d}.parquet"
        results.write(key, data)
        files.append(
            {"key": key, "rows": piece.num_rows, "sha256": hashlib.sha256(data).hexdigest()}
        )
    return table, files


def remove_work(results: Store, plan: Plan) -> None:
    """Delete what the attempts wrote; the run is published."""
    for item in list(results.list(plan.work)):
        results.delete(item.key)
