import gzip
import hashlib
import io
import os
import socket
import zipfile
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.names import Wanted
from lungopacity.archive.reading import read_images
from lungopacity.errors import UserError
from lungopacity.radiograph import DecodeLimits, Preprocessing
from lungopacity.results.schema import READ_SCHEMA
from lungopacity.storage import LocalStore, open_store
from tests.archive.making import FailingDisk
from tests.films import dicom, encoded, grey_film, tar

SETTINGS = ReadSettings(Preprocessing(image_size=32))


def read(uri: str, settings: ReadSettings = SETTINGS, **options) -> list[dict]:
    archive = take_inventory(uri)
    tables = list(read_images(archive.store, archive.objects, settings, **options))
    assert all(table.schema == READ_SCHEMA for table in tables)
    assert all(table.num_rows <= settings.rows_per_table for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def images(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["shard_rows"] is None]


@pytest.mark.parametrize("name", ["a/x.png.gz", "night"])
def test_a_compressed_film_has_the_key_of_its_object(store_uri, name):
    open_store(store_uri).write(name, gzip.compress(encoded(grey_film())))
    open_store(store_uri).write("notes.csv.gz", gzip.compress(b"image,label\n" * 50))
    film, notes = sorted(images(read(store_uri)), key=lambda row: row["status"])
    assert (film["image"], film["member"], film["status"]) == (name, None, "ok")
    assert (notes["member"], notes["status"]) == (None, "rejected")


def test_every_object_has_a_row_with_its_facts(store_uri):
    film = grey_film()
    data = encoded(film)
    store = open_store(store_uri)
    store.write("deep/a.png", data)
    store.write("b.dcm", dicom(film.astype(np.uint16) * 16, ViewPosition="PA", PatientAge="041Y"))
    store.write("c.jpg", b"no image at all")
    store.write("d.png", b"")
    dcm, junk, empty, png = read(store_uri)
    assert [row["image"] for row in (dcm, junk, empty, png)] == [
        "b.dcm",
        "c.jpg",
        "d.png",
        "deep/a.png",
    ]
    assert png["status"] == "ok"
    assert png["content_sha256"] == hashlib.sha256(data).hexdigest()
    assert (png["rows"], png["columns"], png["format"]) == (*film.shape, "png")
    np.testing.assert_array_equal(
        np.frombuffer(png["pixels"], np.uint8).reshape(32, 32),
        SETTINGS.preprocessing.square(film),
    )
    assert (dcm["view_position"], dcm["patient_age_years"]) == ("PA", 41)
    assert (junk["status"], junk["error_code"], junk["pixels"]) == ("failed", "not_an_image", None)
    assert (empty["status"], empty["error_code"]) == ("failed", "empty")


def test_tables_and_notes_beside_films_are_rejected_and_not_failures(tmp_path):
    names = ("labels.csv", "Normal.metadata.xlsx", "a/LICENSE", "a/SHA256SUMS", "export.log")
    for name in names:
        open_store(str(tmp_path)).write(name, b"image,label\n")
    open_store(str(tmp_path)).write("x.tar", tar({"notes.txt.gz": gzip.compress(b"notes")}))
    rows = images(read(str(tmp_path)))
    assert [(row["status"], row["error_code"]) for row in rows] == [
        ("rejected", "not_an_image")
    ] * (len(names) + 1)


def test_an_empty_log_beside_films_is_no_failure_but_an_empty_film_or_shard_is(tmp_path):
    sidecars, others = ["export.log", "a/errors.txt"], ["1.dcm", "a/2.png", "b.tar", "c.parquet"]
    for name in sidecars + others:
        open_store(str(tmp_path)).write(f"loose/{name}", b"")
    open_store(str(tmp_path)).write("x.tar", tar(dict.fromkeys(sidecars + others, b"")))
    rows = images(read(str(tmp_path)))
    assert len(rows) == 2 * len(sidecars + others)
    assert {row["error_code"] for row in rows} == {"empty"}
    for row in rows:
        name = row["member"] or row["image"].removeprefix("loose/")
        assert row["status"] == ("rejected" if name in sidecars else "failed"), name


def test_a_damaged_parquet_file_is_a_failure_and_a_table_without_images_is_not(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": ["a.png"], "label": [1]}), buffer)
    table = buffer.getvalue()
    films = {
        "table.parquet": table,
        "zeros.parquet": bytes(len(table)),
        "head.parquet": b"\0" + table[1:],
        "encrypted.parquet": b"PARE" + table[4:-4] + b"PARE",
        "._x.parquet": b"\x00\x05\x16\x07" + bytes(200),
    }
    for name, data in films.items():
        open_store(str(tmp_path)).write(f"loose/{name}", data)
    open_store(str(tmp_path)).write("x.tar", tar(films))
    rows = images(read(str(tmp_path)))
    assert {row["error_code"] for row in rows} == {"not_an_image"}
    assert len(rows) == 2 * len(films)
    for row in rows:
        name = row["member"] or row["image"].removeprefix("loose/")
        is_sidecar = name in ("table.parquet", "._x.parquet")
        assert row["status"] == ("rejected" if is_sidecar else "failed"), name


def test_system_files_beside_films_are_rejected_and_not_failures(tmp_path):
    apple_double = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200)
    litter = {
        "a/.DS_Store": b"\x00\x00\x00\x01Bud1" + bytes(200),
        "a/Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(200),
        "a/desktop.ini": b"[.ShellClassInfo]",
        "__MACOSX/._1.dcm": apple_double,
    }
    others = {"._2.dcm": b"a cut film", "a.DS_Store": b"no image", "x/1.dcm": apple_double}
    for name, data in (litter | others).items():
        open_store(str(tmp_path)).write(f"loose/{name}", data)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name, data in (litter | others).items():
            file.writestr(name, data)
    rows = images(read(str(tmp_path)))
    assert len(rows) == 2 * len(litter | others)
    assert {row["error_code"] for row in rows} == {"not_an_image"}
    for row in rows:
        name = row["member"] or row["image"].removeprefix("loose/")
        assert row["status"] == ("rejected" if name in litter else "failed"), name


def test_members_of_a_shard_have_rows_and_so_has_its_end(store_uri):
    films = {f"Some Label/ü.{number}.png": encoded(grey_film(number)) for number in range(5)}
    store = open_store(store_uri)
    store.write("x.tar", tar({**films, "../../evil.png": b"junk"}))
    *members, end = read(store_uri)
    assert [row["member"] for row in members] == [*films, "../../evil.png"]
    assert [row["member_index"] for row in members] == list(range(6))
    assert [row["status"] for row in members] == ["ok"] * 5 + ["failed"]
    assert (end["image"], end["member"], end["shard_rows"]) == ("x.tar", None, 6)


def test_a_shard_without_files_has_one_row(tmp_path):
    store = open_store(str(tmp_path))
    store.write("x.tar", tar({}))
    store.write("y.zip", b"PK\x05\x06" + bytes(18))
    rows = images(read(str(tmp_path)))
    assert [(row["image"], row["status"], row["error_code"]) for row in rows] == [
        ("x.tar", "failed", "empty"),
        ("y.zip", "failed", "empty"),
    ]


def test_a_shard_can_be_the_archive(store_uri):
    open_store(store_uri).write("sub/x.tar", tar({"a.png": encoded(grey_film())}))
    row, _ = read(f"{store_uri}/sub/x.tar")
    assert (row["image"], row["member"]) == ("x.tar", "a.png")


def whole_tar() -> bytes:
    return tar({f"{n}.png": encoded(grey_film(n, 100, 100)) for n in range(6)})


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_cut_shard_gives_its_readable_members_and_one_error_row(tmp_path, share):
    data = whole_tar()
    # A share of its content: zeros fill the end.
    open_store(str(tmp_path)).write("x.tar", data[: int(len(data.rstrip(b"\0")) * share)])
    rows = images(read(str(tmp_path)))
    assert [row["status"] for row in rows[:-1]] == ["ok"] * (len(rows) - 1)
    assert 1 <= len(rows) - 1 < 6
    assert (rows[-1]["member"], rows[-1]["error_code"]) == (None, "corrupt_archive")


def test_a_shard_cut_between_two_members_is_noticed(tmp_path):
    data = whole_tar()
    third = data.index(b"3.png\0")
    open_store(str(tmp_path)).write("x.tar", data[:third])
    rows = images(read(str(tmp_path)))
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["failed"]
    assert rows[-1]["error_code"] == "corrupt_archive"


def test_a_broken_header_in_the_middle_is_noticed(tmp_path):
    data = bytearray(whole_tar())
    data[data.index(b"3.png\0") + 150] ^= 0x55  # in the header's checksum
    open_store(str(tmp_path)).write("x.tar", bytes(data))
    rows = images(read(str(tmp_path)))
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["failed"]


@pytest.mark.parametrize("place", [0, 600])
def test_a_disk_that_fails_while_a_shard_is_read_is_tried_again(tmp_path, monkeypatch, place):
    data = whole_tar()
    open_store(str(tmp_path)).write("x.tar", data)
    failing = FailingDisk(data, place, place + 1)
    monkeypatch.setattr(LocalStore, "open_local", lambda *_, **__: nullcontext(failing))
    rows = images(read(str(tmp_path)))
    assert {row["error_code"] for row in rows} == {"unavailable"}
    node = socket.gethostname()
    assert rows[0]["error_message"] == f"disk error on {node}: Input/output error"


def test_only_wanted_images_are_read_if_names_are_given(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a.png", encoded(grey_film()))
    store.write("b.png", encoded(grey_film()))
    store.write("x.tar", tar({"c.png": encoded(grey_film()), "d.png": encoded(grey_film())}))
    rows = read(str(tmp_path), wanted=Wanted(frozenset({"b.png", "d.png"})))
    assert [row["member"] or row["image"] for row in images(rows)] == ["b.png", "d.png"]


@pytest.mark.parametrize("most", [DecodeLimits().max_size_bytes, 50], ids=["films", "too large"])
def test_an_object_that_is_gone_or_changed_is_a_row(store_uri, most):
    store = open_store(store_uri)
    for name in ("a.png", "b.png", "c.tar"):
        store.write(name, encoded(grey_film()))
    archive = take_inventory(store_uri)
    store.delete("a.png")
    store.write("b.png", encoded(grey_film(9)))
    store.write("c.tar", tar({}))
    settings = replace(SETTINGS, limits=DecodeLimits(max_size_bytes=most))
    tables = read_images(archive.store, archive.objects, settings)
    rows = images([row for table in tables for row in table.to_pylist()])
    assert [row["error_code"] for row in rows] == ["missing", "changed", "changed"]
    assert {row["error_stage"] for row in rows} == {"fetch"}


def test_an_object_that_is_too_large_is_refused_by_its_listed_size(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a.png", encoded(grey_film()))
    store.write("x.tar", tar({"b.png": encoded(grey_film())}))
    settings = ReadSettings(Preprocessing(image_size=32), DecodeLimits(max_size_bytes=50))
    assert [row["error_code"] for row in images(read(str(tmp_path), settings))] == ["too_large"] * 2


def test_a_large_object_is_fetched_only_if_its_content_says_it_is_a_shard(store_uri, monkeypatch):
    store = open_store(store_uri)
    films = {f"{n}.png": encoded(grey_film(n)) for n in range(5)}
    store.write("films.2024-01", tar(films))
    store.write("giant.bin", b"x" * sum(map(len, films.values())))
    limits = DecodeLimits(max_size_bytes=2 * len(films["0.png"]))
    opened = []
    open_local = type(store).open_local
    monkeypatch.setattr(
        type(store),
        "open_local",
        lambda store, key, **how: opened.append(key) or open_local(store, key, **how),
    )
    rows = images(read(store_uri, ReadSettings(Preprocessing(image_size=32), limits)))
    assert [(row["image"], row["member"]) for row in rows if row["status"] == "ok"] == [
        ("films.2024-01", name) for name in films
    ]
    (refused,) = (row for row in rows if row["status"] == "failed")
    assert (refused["image"], refused["error_code"]) == ("giant.bin", "too_large")
    if store_uri.startswith("s3:"):
        assert opened == ["films.2024-01"]


def test_unreadable_files_are_forbidden(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    open_store(str(tmp_path)).write("a.png", encoded(grey_film()))
    (tmp_path / "a.png").chmod(0)
    (row,) = read(str(tmp_path))
    assert row["error_code"] == "forbidden"


def test_many_loose_objects_keep_their_order(tmp_path):
    store = open_store(str(tmp_path))
    names = [f"{number:03d}.png" for number in range(150)]
    for number, name in enumerate(names):
        store.write(name, encoded(grey_film(number)))
    assert [row["image"] for row in read(str(tmp_path))] == names


def test_an_empty_archive_is_refused(store_uri):
    with pytest.raises(UserError, match="nothing lies there"):
        take_inventory(store_uri)


@pytest.mark.parametrize("name", ["x.tar.gz", "study"])
def test_a_container_is_recognised_by_its_content(store_uri, name):
    """Whether or not its name is that of a shard: an export is often a zip without a suffix."""
    films = {f"{n}.png": encoded(grey_film(n)) for n in range(3)}
    open_store(store_uri).write(name, gzip.compress(tar({**films, "notes.txt": b"hello"})))
    *members, end = read(store_uri)
    assert [row["member"] for row in members] == [*films, "notes.txt"]
    assert [row["status"] for row in members] == ["ok"] * 3 + ["rejected"]
    assert (end["image"], end["shard_rows"]) == (name, 4)
    assert {row["reading"] for row in (*members, end)} == {end["reading"]}


def test_a_film_with_the_name_of_a_shard_is_a_film(store_uri):
    open_store(store_uri).write("x.tar", encoded(grey_film()))
    (row,) = read(store_uri)
    assert (row["status"], row["member"], row["reading"]) == ("ok", None, None)


def test_frames_of_a_loose_file_have_rows_and_so_has_its_end(store_uri):
    frames = np.stack([grey_film(seed).astype(np.uint16) * 16 for seed in range(5)])
    data = dicom(frames[0], NumberOfFrames=5, PixelData=frames.astype("<u2").tobytes())
    open_store(store_uri).write("cine.dcm", data)
    *rows, end = read(store_uri)
    assert [row["frame"] for row in rows] == list(range(5))
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert (end["shard_rows"], end["frame"]) == (5, None)
    assert len({row["reading"] for row in (*rows, end)}) == 1


def test_frames_of_a_member_count_for_its_shard(tmp_path):
    frames = np.stack([grey_film(seed).astype(np.uint16) * 16 for seed in range(3)])
    cine = dicom(frames[0], NumberOfFrames=3, PixelData=frames.astype("<u2").tobytes())
    members = {"a.png": encoded(grey_film()), "cine.dcm": cine, "b.png": encoded(grey_film())}
    open_store(str(tmp_path)).write("x.tar", tar(members))
    *rows, end = read(str(tmp_path))
    assert [(row["member_index"], row["frame"]) for row in rows] == [
        (0, None), (1, 0), (1, 1), (1, 2), (2, None),
    ]  # fmt: skip
    assert end["shard_rows"] == 5


def test_the_row_has_the_quality_flags_and_the_settings_decide_which_reject(tmp_path):
    store = open_store(str(tmp_path))
    store.write("blank.png", encoded(np.full((200, 200), 90, np.uint8)))
    store.write("good.png", encoded(grey_film()))
    store.write("negative.png", encoded(255 - grey_film(3, 300, 300)))
    blank, good, negative = read(str(tmp_path))
    assert (blank["status"], blank["error_code"]) == ("rejected", "poor_quality")
    assert blank["quality_blank"]
    assert blank["pixels"] is None
    assert not any(good[name] for name in good if name.startswith("quality_"))
    assert (negative["status"], negative["error_message"]) == ("rejected", "inverted")
    lenient = ReadSettings(SETTINGS.preprocessing, reject_quality=frozenset())
    rows = read(str(tmp_path), lenient)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [row["quality_inverted"] for row in rows] == [False, False, True]


def test_borders_are_cropped_for_the_score_and_not_for_the_quality(tmp_path):
    film = grey_film(height=160, width=160).clip(30, None)
    open_store(str(tmp_path)).write("a.png", encoded(np.pad(film, 150)))
    preprocessing = Preprocessing(image_size=80, crop_borders=True)
    (row,) = read(str(tmp_path), ReadSettings(preprocessing))
    assert row["quality_heavy_borders"]
    assert row["pixels"] == preprocessing.square(film).tobytes()
    assert row["shown_edges"] == [150, 150, 310, 310]
    (whole,) = read(str(tmp_path), ReadSettings(Preprocessing(image_size=80)))
    assert whole["pixels"] != row["pixels"]
    assert whole["shown_edges"] == [0, 0, 460, 460]


def test_an_unknown_view_is_marked(tmp_path):
    store = open_store(str(tmp_path))
    film = grey_film().astype(np.uint16) * 16
    store.write("a.png", encoded(grey_film()))
    store.write("b.dcm", dicom(film))
    store.write("c.dcm", dicom(film, ViewPosition="AP"))
    store.write("d.dcm", dicom(film, ViewPosition="LL"))
    rows = read(str(tmp_path))
    assert [row["view_unknown"] for row in rows] == [True, True, False, None]
    assert [row["error_code"] for row in rows] == [None, None, None, "lateral_view"]
    # The row keeps what the header said.
    assert (rows[3]["view_position"], rows[3]["modality"]) == ("LL", "DX")
