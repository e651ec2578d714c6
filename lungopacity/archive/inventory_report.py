"""Reads inventories that others have made: S3 Inventory reports, and lists in Parquet.

Listing 10 million objects takes an hour of requests; S3 writes the same list to files every night.
Format: https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.orc
import pyarrow.parquet as pq

from lungopacity.archive.containers import SHARD_SUFFIXES
from lungopacity.archive.inventory import Inventory
from lungopacity.errors import ImageError, UserError, first_line
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.results.workbench import temporary_folder
from lungopacity.storage import open_store, split_uri

log = logging.getLogger(__name__)

_NAMES = {
    "image": ("image", "key", "name"),
    "source_etag": ("source_etag", "etag", "e_tag"),
    "source_size_bytes": ("source_size_bytes", "size_bytes", "size"),
    "source_modified_at": ("source_modified_at", "last_modified_date", "last_modified"),
}
"""Columns of `PLAN_SCHEMA`, and their names in such files, in any case."""
_LATEST, _DELETED = "is_latest", "is_delete_marker"
_NEEDED_FIELDS = "a report needs the fields Size, LastModifiedDate and ETag of every object"
_SHARD_ENDINGS = "|".join(map(re.escape, SHARD_SUFFIXES))
_CSV_BLOCK_BYTES = 16 << 20
_ROWS_PER_TABLE = 50_000
_MANIFEST_OF_A_DAY = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\dZ/manifest\.json")
_OLD = timedelta(days=3)


def read_inventory(
    inventory_uri: str, archive_uri: str, on_listed: Callable[[int], None] | None = None
) -> Inventory:
    """The objects of the archive according to an inventory.

    inventory_uri: the `manifest.json` of an S3 Inventory report (CSV, ORC or Parquet; only the
    latest version of each object counts); the folder of a report's configuration, for its newest
    report; or a Parquet file with the columns `image` (the key, relative to the archive),
    `source_etag`, `source_size_bytes` and `source_modified_at`. While it is read, raises
    `UserError` if it cannot be read, is of another bucket, names nothing of the archive, or lacks a
    column, or a value in a row.
    """
    uri = open_store(archive_uri).uri
    of = _of_report if inventory_uri.endswith(".json") else _of_list
    return Inventory(uri, _counted(of(inventory_uri, uri), on_listed, inventory_uri, uri))


def _counted(
    tables: Iterator[pa.Table],
    on_listed: Callable[[int], None] | None,
    inventory_uri: str,
    archive: str,
) -> Iterator[pa.Table]:
    objects = 0
    for table in tables:
        objects += table.num_rows
        if on_listed is not None:
            on_listed(table.num_rows)
        if table.num_rows:
            yield table
    if not objects:
        # As for a listing: a mistake in one of the two must not pass for a night without work.
        raise UserError(
            f"{inventory_uri}: names nothing below {archive}; check --archive, and the prefix "
            "of the report"
        )


def _of_list(uri: str, archive_uri: str) -> Iterator[pa.Table]:
    manifest = _newest_manifest(uri)
    if manifest is not None:
        yield from _of_report(manifest, archive_uri)
        return
    fix = "make it again; for an S3 Inventory report give its manifest.json"
    with _local(uri, None, fix) as path:
        for table in _parquet(path, ()):
            planned = _planned(table, uri, "")
            # On disk such a key would lead to the film, too, and give it two names.
            if pc.any(pc.starts_with(planned["image"], f"{archive_uri}/")).as_py():
                raise UserError(
                    f"{uri}: its column image holds whole URIs; give keys relative to {archive_uri}"
                )
            yield planned


def _newest_manifest(uri: str) -> str | None:
    """The newest manifest in the folder of a report's configuration, where S3 makes a folder for
    each report; None if `uri` is a file. Raises `UserError` if it is neither."""
    parent, name = split_uri(uri)
    # Not by listing: the user may be allowed to read the file, but not to list.
    if open_store(parent).head(name) is not None:
        return None
    store = open_store(uri)
    found = [item.key for item in store.list() if _MANIFEST_OF_A_DAY.fullmatch(item.key)]
    if not found:
        raise UserError(
            f"{uri}: no list lies there, and no report in folders such as 2026-03-04T01-00Z; give "
            "a Parquet list, a report's manifest.json, or the folder of its configuration"
        )
    return f"{store.uri}/{max(found)}"


def _of_report(manifest_uri: str, archive_uri: str) -> Iterator[pa.Table]:
    with _local(manifest_uri, None) as path:
        try:
            manifest = json.loads(path.read_bytes())
            bucket, kind = manifest["sourceBucket"], manifest["fileFormat"].upper()
            columns = [name.strip() for name in manifest["fileSchema"].split(",")]
            files = [(item["key"], item["MD5checksum"]) for item in manifest["files"]]
            # An ARN, whose first parts name the partition: aws, aws-cn, aws-us-gov.
            destination = manifest["destinationBucket"].rpartition(":::")[2]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{manifest_uri}: this is not the manifest of an S3 Inventory report "
                f"({type(error).__name__}: {error}); give its manifest.json, or a Parquet list"
            ) from error
    _warn_of_age(manifest_uri, manifest)
    parts = urlsplit(archive_uri, allow_fragments=False)
    if parts.scheme != "s3" or parts.netloc != bucket:
        raise UserError(
            f"{manifest_uri}: the report is of bucket '{bucket}', not of {archive_uri}; "
            f"give --archive s3://{bucket}/…"
        )
    prefix = archive_uri.removeprefix(f"s3://{bucket}").strip("/")
    read = {"CSV": _csv, "PARQUET": _parquet, "ORC": _orc}.get(kind)
    if read is None:
        raise UserError(
            f"{manifest_uri}: no reader for reports in {kind}; choose CSV, ORC or Parquet"
        )
    for key, md5 in files:
        uri = f"s3://{destination}/{key}"
        with _local(uri, md5) as path:
            for table in read(path, columns):
                yield _planned(table, uri, f"{prefix}/" if prefix else "")


def _warn_of_age(manifest_uri: str, manifest: Mapping[str, Any]) -> None:
    try:
        made = datetime.fromtimestamp(int(manifest["creationTimestamp"]) / 1000, UTC)
    except (KeyError, ValueError, TypeError, OverflowError, OSError):
        return
    if datetime.now(UTC) - made > _OLD:
        log.warning(
            "%s: the report was made on %s, and names nothing newer; for the newest report give "
            "the folder of its configuration as --inventory",
            manifest_uri,
            made.date(),
        )


@contextmanager
def _local(uri: str, md5: str | None, fix: str = "make it again") -> Iterator[Path]:
    """The file at `uri` on this machine. Errors of reading it in the block become a `UserError`
    about it. `fix`: what to do if it cannot be parsed."""
    parent, name = split_uri(uri)
    try:
        with temporary_folder() as folder:
            path = open_store(parent).local_file(name, folder / "file")
            if md5 is not None:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "md5").hexdigest() != md5.lower():
                        raise UserError(
                            f"{uri}: differs from the MD5 in the manifest; wait for the next report"
                        )
            yield path
    except ImageError as error:
        raise UserError(f"{uri}: the inventory cannot be read: {error.message}") from error
    # Arrow raises OSError for damaged files, too; only those of the system have an errno.
    except (pa.ArrowException, EOFError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{uri}: the inventory cannot be read: {error.strerror}") from error
        raise UserError(f"{uri}: the inventory is damaged ({first_line(error)}); {fix}") from error


def _parquet(path: Path, _columns: Sequence[str]) -> Iterator[pa.Table]:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    wanted = {name for names in _NAMES.values() for name in names} | {_LATEST, _DELETED}
    columns = [name for name in file.schema_arrow.names if _snake(name) in wanted]
    for batch in file.iter_batches(_ROWS_PER_TABLE, columns=columns):
        yield pa.Table.from_batches([batch])


def _orc(path: Path, _columns: Sequence[str]) -> Iterator[pa.Table]:
    file = pyarrow.orc.ORCFile(path)
    for stripe in range(file.nstripes):
        yield pa.Table.from_batches([file.read_stripe(stripe)])


def _csv(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """In gzip, without a header line. Only in CSV are the keys URL-encoded."""
    with gzip.open(path) as unzipped:
        batches = pyarrow.csv.open_csv(
            unzipped,
            pyarrow.csv.ReadOptions(column_names=list(columns), block_size=_CSV_BLOCK_BYTES),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                # Delete markers have no size.
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        for batch in batches:
            table = pa.Table.from_batches([batch])
            for place, name in enumerate(columns):
                if name.lower() == "key":
                    keys = [key and unquote_plus(key) for key in table[name].to_pylist()]
                    table = table.set_column(place, name, pa.array(keys, pa.string()))
            yield table


def _planned(table: pa.Table, uri: str, prefix: str) -> pa.Table:
    """The rows under `prefix` as `PLAN_SCHEMA`, with `prefix` removed from their keys."""
    table = table.rename_columns([_snake(name) for name in table.column_names])
    columns = {}
    for field, names in _NAMES.items():
        found = next((name for name in names if name in table.column_names), None)
        if found is None:
            raise UserError(
                f"{uri}: the inventory has no column {' or '.join(names)}; {_NEEDED_FIELDS}"
            )
        columns[field] = table[found]
    keys = columns["image"] = _cast(columns["image"], "image")
    if keys.null_count:
        raise UserError(f"{uri}: a row of the inventory has no key; {_NEEDED_FIELDS}")
    keep = pc.starts_with(keys, prefix)
    if _LATEST in table.column_names:
        # Null if the bucket keeps no versions.
        keep = pc.and_(keep, pc.fill_null(_true(table[_LATEST]), True))
    if _DELETED in table.column_names:
        keep = pc.and_not(keep, pc.fill_null(_true(table[_DELETED]), False))
    # Before the checks below: objects outside the archive may lack values.
    rows = pa.table(columns).filter(keep)
    sizes = _cast(rows["source_size_bytes"], "source_size_bytes")
    # Consoles create empty objects to mark folders.
    marker = pc.and_(pc.ends_with(rows["image"], "/"), pc.fill_null(pc.equal(sizes, 0), False))
    rows = rows.filter(pc.invert(marker))
    for field in _NAMES:
        if rows[field].null_count:
            key = rows["image"].filter(pc.is_null(rows[field]))[0]
            raise UserError(
                f"{uri}: the inventory has no {_NAMES[field][-1]} for '{key}'; {_NEEDED_FIELDS}"
            )
    rows = pa.table({field: _cast(rows[field], field) for field in _NAMES})
    keys = pc.utf8_slice_codeunits(rows["image"], len(prefix))
    shard = pc.match_substring_regex(keys, f"(?i)({_SHARD_ENDINGS})$")
    return pa.table(
        {
            "image": keys,
            "source_etag": pc.utf8_trim(rows["source_etag"], '"'),
            "source_size_bytes": rows["source_size_bytes"],
            "source_modified_at": rows["source_modified_at"],
            "is_shard": shard,
        }
    ).cast(PLAN_SCHEMA)


def _cast(column: pa.ChunkedArray, field: str) -> pa.ChunkedArray:
    kind = PLAN_SCHEMA.field(field).type
    if field == "source_modified_at" and pa.types.is_integer(column.type):
        column = column.cast(pa.timestamp("ms"))  # since 1970, as in Parquet reports
    if field == "source_modified_at" and getattr(column.type, "tz", "UTC") is None:
        column = pc.assume_timezone(column.cast(pa.timestamp("us")), "UTC")
    return column.cast(kind)


def _snake(name: str) -> str:
    """From `LastModifiedDate`, as in CSV reports, to `last_modified_date`, as in Parquet."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _true(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.bool_())
