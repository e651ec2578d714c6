"""The objects of an archive, listed in parallel or read from a report that others made."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import time
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

from lungopacity.archive.inventory import list_archive, take_inventory, without
from lungopacity.archive.inventory_report import read_inventory
from lungopacity.errors import UserError
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.storage import LocalStore, open_store
from lungopacity.storage.ahead import ahead

WHEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
KEYS = ["a/1.dcm", "a/ü 2+3.png", "b%20c.TAR.GZ", "deep/er/4.zip"]


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix


def report(uri: str, kind: str, rows: list[dict], *, columns=None, change=None, md5=None) -> str:
    """Write an S3 Inventory report of the bucket beside the archive. Returns its manifest's URI."""
    bucket, prefix = bucket_and_prefix(uri)
    names = list(rows[0]) if columns is None else columns
    if kind == "CSV":
        names = ["".join(part.capitalize() for part in name.split("_")) for name in names]
        names = ["ETag" if name == "ETag" or name == "ETag".lower() else name for name in names]
        lines = [
            ",".join(
                f'"{quote_plus(str(value)) if name == "Key" else _csv(value)}"'
                for name, value in zip(names, row.values(), strict=True)
            )
            for row in rows
        ]
        data = gzip.compress("\n".join(lines).encode())
    else:
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, sink) if kind == "PARQUET" else pa.orc.write_table(table, sink)
        data = sink.getvalue()
    store = open_store(f"{uri}-inventory")
    store.write("data/part", data)
    manifest = {
        "sourceBucket": bucket,
        "destinationBucket": f"arn:aws:s3:::{bucket}",
        "version": "2016-11-30",
        "fileFormat": {"PARQUET": "Parquet"}.get(kind, kind),
        "fileSchema": ", ".join(names) if kind == "CSV" else "message s3.inventory {}",
        "files": [
            {
                "key": f"{prefix}-inventory/data/part",
                "size": len(data),
                "MD5checksum": md5 or hashlib.md5(data).hexdigest(),
            }
        ],
    }
    manifest.update(change or {})
    store.write("manifest.json", json.dumps(manifest).encode())
    return f"{uri}-inventory/manifest.json"


def _csv(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return "" if value is None else str(value)


def rows_of(uri: str) -> list[dict]:
    bucket, prefix = bucket_and_prefix(uri)
    rows = [
        {"bucket": bucket, "key": f"{prefix}/{key}", "size": 10 + place,
         "last_modified_date": WHEN, "e_tag": f"{place:032x}"}
        for place, key in enumerate(KEYS)
    ]  # fmt: skip
    return [*rows, {**rows[0], "key": "other/prefix/5.dcm"}, {**rows[0], "key": f"{prefix}/a/",
                                                              "size": 0}]  # fmt: skip


def read(inventory: str, archive: str) -> list[dict]:
    found = read_inventory(inventory, archive)
    assert found.uri == open_store(archive).uri
    tables = list(found.tables)
    assert all(table.schema == PLAN_SCHEMA for table in tables)
    return sorted(
        (row for table in tables for row in table.to_pylist()), key=lambda row: row["image"]
    )


@pytest.mark.parametrize(
    ("kind", "partition"), [("CSV", "aws"), ("PARQUET", "aws-cn"), ("ORC", "aws-us-gov")]
)
def test_a_report_gives_the_objects_under_the_archives_prefix(s3_uri, kind, partition):
    seen: list[int] = []
    change = {"destinationBucket": f"arn:{partition}:s3:::{bucket_and_prefix(s3_uri)[0]}"}
    found = read(report(s3_uri, kind, rows_of(s3_uri), change=change), s3_uri)
    assert [row["image"] for row in found] == sorted(KEYS)
    assert {row["image"]: row["source_etag"] for row in found} == {
        key: f"{place:032x}" for place, key in enumerate(KEYS)
    }
    assert {row["source_modified_at"] for row in found} == {WHEN}
    assert [row["image"] for row in found if row["is_shard"]] == ["b%20c.TAR.GZ", "deep/er/4.zip"]
    list(read_inventory(f"{s3_uri}-inventory/manifest.json", s3_uri, seen.append).tables)
    assert sum(seen) == len(KEYS)


@pytest.mark.parametrize("kind", ["CSV", "PARQUET"])
def test_only_the_latest_version_counts_unless_it_is_a_delete_marker(s3_uri, kind):
    first, second, *_ = rows_of(s3_uri)
    versions = {"is_latest": True, "is_delete_marker": False}
    rows = [
        {**first, **versions},
        {**first, **versions, "is_latest": False, "e_tag": "0" * 31 + "f"},
        {**second, **versions, "is_delete_marker": True, "size": None, "e_tag": None},
    ]
    (found,) = read(report(s3_uri, kind, rows), s3_uri)
    assert (found["image"], found["source_etag"]) == (KEYS[0], "0" * 32)


@pytest.mark.parametrize("kind", ["CSV", "PARQUET", "ORC"])
@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"size": None}, "no size for '.*a/1.dcm'; a report needs the fields Size,"),
        ({"e_tag": None}, "no e_tag for '.*a/1.dcm'"),
        ({"last_modified_date": None}, "no last_modified for '.*a/1.dcm'"),
        ({"key": None}, "a row of the inventory has no key"),
    ],
)
def test_an_object_with_missing_values_is_named_and_not_skipped(s3_uri, kind, lacking, message):
    first, *others = rows_of(s3_uri)
    if kind == "CSV" and "key" in lacking:
        lacking = {"key": ""}
    with pytest.raises(UserError, match=message):
        read(report(s3_uri, kind, [{**first, **lacking}, *others]), s3_uri)


def test_objects_outside_the_archive_may_lack_values(s3_uri):
    *rows, other, folder = rows_of(s3_uri)
    lacking = {"size": None, "e_tag": None, "last_modified_date": None}
    rows += [{**other, **lacking}, {**folder, "e_tag": None}]
    # Null if the bucket keeps no versions.
    rows = [{**row, "is_latest": None, "is_delete_marker": None} for row in rows]
    rows[0]["is_latest"] = True
    found = read(report(s3_uri, "PARQUET", rows), s3_uri)
    assert [row["image"] for row in found] == sorted(KEYS)


def test_parquet_times_may_be_milliseconds_since_1970(s3_uri):
    rows = [{**row, "last_modified_date": int(WHEN.timestamp() * 1000)} for row in rows_of(s3_uri)]
    assert {row["source_modified_at"] for row in read(report(s3_uri, "PARQUET", rows), s3_uri)} == {
        WHEN
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": {"sourceBucket": "another"}}, "the report is of bucket 'another'"),
        ({"change": {"fileFormat": "XML"}}, "no reader for reports in XML"),
        ({"change": {"files": None}}, "not the manifest of an S3 Inventory report"),
        ({"md5": "0" * 32}, "differs from the MD5 in the manifest"),
        ({"drop": "e_tag"}, "no column source_etag or etag or e_tag"),
        ({"damage": True}, "the inventory is damaged"),
        ({"change": {"files": []}}, "names nothing below s3://.*; check --archive"),
        ({"elsewhere": True}, "names nothing below s3://.*; check --archive"),
    ],
)
def test_a_report_that_cannot_be_used_is_reported(s3_uri, options, message):
    rows = rows_of(s3_uri)
    if options.pop("drop", None):
        rows = [{name: value for name, value in row.items() if name != "e_tag"} for row in rows]
    if options.pop("elsewhere", None):
        rows = [row for row in rows if row["key"] == "other/prefix/5.dcm"]
    damaged = options.pop("damage", False)
    manifest = report(s3_uri, "PARQUET", rows, **options)
    if damaged:
        store = open_store(f"{s3_uri}-inventory")
        store.write("data/part", b"PAR1 and nothing else")
        told = json.loads(store.read("manifest.json"))
        told["files"][0]["MD5checksum"] = hashlib.md5(b"PAR1 and nothing else").hexdigest()
        store.write("manifest.json", json.dumps(told).encode())
    with pytest.raises(UserError, match=message):
        read(manifest, s3_uri)


def test_the_newest_report_of_a_configuration_is_used_with_a_warning_if_it_is_old(s3_uri, caplog):
    store = open_store(f"{s3_uri}-inventory/every-day")
    rows = rows_of(s3_uri)
    for day, number, made in (("10", 1, WHEN), ("09", 2, WHEN), ("11", 3, datetime.now(UTC))):
        told = {"creationTimestamp": str(int(made.timestamp() * 1000))}
        report(s3_uri, "CSV", rows[:number], change=told)
        manifest = open_store(f"{s3_uri}-inventory").read("manifest.json")
        store.write(f"2026-03-{day}T01-00Z/manifest.json", manifest)
        store.write(f"2026-03-{day}T01-00Z/manifest.checksum", b"")
    store.write("hive/dt=2026-03-12-01-00/symlink.txt", b"")
    assert len(read(store.uri, s3_uri)) == 3
    assert not caplog.text
    with pytest.raises(UserError, match="no list lies there, and no report in folders such as"):
        read(f"{s3_uri}-inventory", s3_uri)  # the folder above
    with pytest.raises(
        UserError, match=r"is damaged .*; for an S3 Inventory report give its manifest"
    ):
        read(f"{s3_uri}-inventory/data/part", s3_uri)  # its CSV
    with pytest.raises(UserError, match="differs from the MD5"):  # the data are the newest one's
        read(f"{store.uri}/2026-03-10T01-00Z/manifest.json", s3_uri)
    assert "the report was made on 2026-03-04, and names nothing newer" in caplog.text


def test_a_parquet_list_gives_the_objects_of_the_archive(tmp_path, monkeypatch):
    archive = take_inventory(_archive(tmp_path))
    pq.write_table(archive.objects.drop_columns("is_shard"), tmp_path / "list.parquet")
    with monkeypatch.context() as refused:  # as for a user who may read the list and nothing else
        refused.delattr(LocalStore, "list")
        assert len(read(str(tmp_path / "list.parquet"), archive.uri)) == 3
    found = read(str(tmp_path / "list.parquet"), archive.uri)
    assert pa.Table.from_pylist(found, schema=PLAN_SCHEMA).equals(archive.objects)
    with pytest.raises(UserError, match=r"none\.parquet: no list lies there, .*; give a Parquet"):
        read(str(tmp_path / "none.parquet"), archive.uri)
    pq.write_table(archive.objects.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="names nothing below"):
        read(str(tmp_path / "empty.parquet"), archive.uri)
    # A key as a whole URI leads to the same film on disk, which would be screened under two names.
    listed = archive.objects.drop_columns("is_shard")
    uris = pa.array([f"{archive.uri}/{key}" for key in listed["image"].to_pylist()])
    pq.write_table(listed.set_column(0, "image", uris), tmp_path / "uris.parquet")
    with pytest.raises(UserError, match="its column image holds whole URIs; give keys relative to"):
        read(str(tmp_path / "uris.parquet"), archive.uri)


def test_objects_that_are_left_out_are_counted_in_the_log_if_there_are_any(tmp_path, caplog):
    caplog.set_level("INFO")
    uri = _archive(tmp_path)
    for prefix, left in (("results/", ["a.tar", "b/2.png", "c.dcm"]), ("b/", ["a.tar", "c.dcm"])):
        is_ours = partial(pc.starts_with, pattern=prefix)
        others = without(list_archive(uri), is_ours, f"lie below {prefix}")
        names = [name for table in others.tables for name in table["image"].to_pylist()]
        assert sorted(names) == left
    assert [line.split(" ", 1)[1] for line in caplog.messages] == [
        f"objects of {uri} are left out, which lie below b/"
    ]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_list_is_reported_wherever_the_damage_is(tmp_path, compression):
    archive = take_inventory(_archive(tmp_path))
    sink = io.BytesIO()
    pq.write_table(archive.objects, sink, compression=compression, write_page_checksum=True)
    data, told = sink.getvalue(), []
    uri = tmp_path / "list.parquet"
    for place in range(0, len(data), 37):
        uri.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            read(str(uri), archive.uri)
        except UserError as error:
            told.append(str(error))
    assert len(told) > 20
    # A footer that states no rows makes a sound list of nothing.
    expected = "the inventory is damaged", "names nothing below"
    assert all(any(words in line for words in expected) for line in told), told


def _archive(tmp_path) -> str:
    store = open_store(str(tmp_path / "archive"))
    for key in ("b/2.png", "a.tar", "c.dcm"):
        store.write(key, key.encode())
    return store.uri


def test_a_large_archive_is_listed_by_folders_and_every_object_once(s3_uri):
    store = open_store(s3_uri)
    keys = {f"{year}/{day:02d}/{n}.dcm" for year in (2025, 2026) for day in range(25)
            for n in range(20)}  # fmt: skip
    keys |= {f"flat-{n}.dcm" for n in range(120)} | {"2025/notes.txt"}
    put_all(store, keys)
    listed = [item.key for item in store.list()]
    assert len(listed) == len(keys)
    assert set(listed) == keys
    assert sorted(item.key for item in store.list("2025/1")) == sorted(
        key for key in keys if key.startswith("2025/1")
    )
    whole, parts = store._parts(store.prefix)
    assert len(parts) == 50  # one listing a day
    assert sum(len(page.get("Contents", ())) for page in whole) == 121


def test_a_folder_of_very_many_studies_is_not_listed_study_by_study(s3_uri):
    store = open_store(s3_uri)
    put_all(store, {f"{study:04d}/1.dcm" for study in range(1100)})
    _, parts = store._parts(store.prefix)
    assert parts == [store.prefix]
    assert len(list(store.list())) == 1100


def put_all(store, keys: set[str]) -> None:
    for _ in ahead(sorted(keys), lambda key: [store.write(key, b"x")], 16):
        pass


def test_items_of_many_iterators_come_once_and_none_runs_far_ahead():
    begun: list[int] = []

    def make(number: int):
        for item in range(100):
            begun.append(item)
            yield number * 100 + item

    items = ahead(range(20), make, 4)
    first = next(items)
    time.sleep(0.5)
    assert len(begun) <= 4 + 2 * 4 + 1
    assert {first, *items} == set(range(2000))


def test_what_an_iterator_raises_is_raised_and_threads_end_when_nobody_listens():
    def fail(number: int):
        yield number
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(ahead(range(4), fail, 2))
    endless = ahead(range(4), lambda number: iter(int, 1), 4)
    next(endless)
    before = threading.active_count()
    endless.close()
    assert threading.active_count() < before
