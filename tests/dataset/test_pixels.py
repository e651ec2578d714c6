import gzip
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.names import Wanted
from lungopacity.dataset import pixels as reading
from lungopacity.dataset.manifest import read_labels
from lungopacity.dataset.pixels import load_pixels
from lungopacity.errors import UserError
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import open_store
from tests.films import dicom, encoded, grey_film, tar, tiff_of_pages

PREPROCESSING = Preprocessing(image_size=32)
CLASSES = ("Normal", "Lung_Opacity")

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_archive(uri: str, shift: int = 0) -> list[str]:
    """Three loose films, and three in a shard; the names of all."""
    store = open_store(uri)
    names = [f"{'loose/' if n < 3 else ''}{n + shift}.png" for n in range(6)]
    for number, name in enumerate(names[:3]):
        store.write(name, encoded(grey_film(number + shift)))
    shard = {name: encoded(grey_film(n + 3 + shift)) for n, name in enumerate(names[3:])}
    store.write("x.tar", tar(shard))
    return names


def labels_of(tmp_path, names: list[str], **columns) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "image": names,
            "label": [CLASSES[n % 2] for n in range(len(names))],
            "split": ["train", "validation"] * (len(names) // 2),
            **columns,
        }
    )
    frame.to_csv(tmp_path / "labels.csv", index=False)
    return read_labels(str(tmp_path / "labels.csv"))


def load(uris, frame):
    return load_pixels(uris, frame, CLASSES, ReadSettings(PREPROCESSING), "labels.csv")


def test_each_labelled_film_is_found_loose_and_in_shards(store_uri, tmp_path):
    names = write_archive(store_uri)
    frame = labels_of(tmp_path, names[::-1])
    data = load([store_uri], frame)
    assert data.images["image"].tolist() == names[::-1]
    for row, name in enumerate(data.images["image"]):
        film = grey_film(names.index(name))
        np.testing.assert_array_equal(data.pixels_NHW[row], PREPROCESSING.square(film))
        assert CLASSES[data.labels_N[row]] == frame.loc[row, "label"]
    assert data.split_N.tolist() == frame["split"].tolist()
    assert not data.synthetic


def test_several_archives_are_read_together(tmp_path):
    uris = [str(tmp_path / "a"), str(tmp_path / "b")]
    names = write_archive(uris[0]) + write_archive(uris[1], shift=10)
    data = load(uris, labels_of(tmp_path, names))
    assert len(data.labels_N) == 12


def test_the_fingerprint_follows_content_label_and_split(tmp_path):
    names = write_archive(str(tmp_path / "a"))
    frame = labels_of(tmp_path, names)
    first = load([str(tmp_path / "a")], frame).fingerprint
    assert load([str(tmp_path / "a")], frame.iloc[::-1].reset_index(drop=True)).fingerprint == first
    other = frame.assign(split=frame["split"].iloc[::-1].to_numpy())
    assert load([str(tmp_path / "a")], other).fingerprint != first


def test_labels_that_name_absent_files_are_refused(tmp_path):
    names = write_archive(str(tmp_path / "a"))
    frame = labels_of(tmp_path, [*names, "gone.png", "too.png"])
    with pytest.raises(UserError, match=r"2 of 8 labelled images are not in .*, such as gone\.png"):
        load([str(tmp_path / "a")], frame)


def test_films_are_found_by_the_end_of_their_names(tmp_path):
    store = open_store(str(tmp_path / "a"))
    for number, name in enumerate(("1.png", "old/1.png", "images/2.png")):
        store.write(name, encoded(grey_film(number)))
    shard = {f"./images/{n}.png": encoded(grey_film(n)) for n in (3, 4)}
    store.write("x.tar", tar(shard))
    store.write("packed/5.png.gz", gzip.compress(encoded(grey_film(5))))
    store.write("packed/6.png.gz", gzip.compress(encoded(grey_film(6))))
    names = ["1.png", "2.png", "3.png", "images/4.png", "packed/5.png.gz", "6.png.gz"]
    data = load([str(tmp_path / "a")], labels_of(tmp_path, names))
    assert data.images["image"].tolist() == names
    assert data.images["source"].tolist() == [
        *("1.png", "images/2.png", "x.tar", "x.tar", "packed/5.png.gz", "packed/6.png.gz"),
    ]
    for pixels, number in zip(data.pixels_NHW, (0, 2, 3, 4, 5, 6), strict=True):
        np.testing.assert_array_equal(pixels, PREPROCESSING.square(grey_film(number)))
    store.write("copies/3.png", encoded(grey_film(3)))
    said = r"labels\.csv: .*, such as 3\.png may be \./images/3\.png or copies/3\.png; write "
    with pytest.raises(UserError, match=said):
        load([str(tmp_path / "a")], labels_of(tmp_path, names))


def test_all_cpus_take_part_in_reading(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "a"))
    names = frozenset(f"{n}.png" for n in range(300))
    for name in names:
        store.write(name, b"film")
    shared: list[int] = []

    def stream_images(uri, tasks, settings, *, wanted):
        shared.extend(task.num_rows for task in tasks)

    monkeypatch.setattr(reading, "stream_images", stream_images)
    monkeypatch.setattr(reading, "tables_of", lambda _: iter(()))
    monkeypatch.setattr(reading, "capacity", lambda: {"CPU": 8.0})
    archive = take_inventory(store.uri)
    list(reading._decoded(archive, Wanted(names), ReadSettings(PREPROCESSING)))
    assert sum(shared) == 300
    assert len(shared) >= 8


def test_a_name_that_occurs_more_than_once_is_refused(tmp_path):
    uris = [str(tmp_path / folder) for folder in "abc"]
    for uri in uris:
        write_archive(uri)
    frame = labels_of(tmp_path, [f"loose/{n}.png" for n in range(2)])
    with pytest.raises(UserError, match="2 labelled names occur more than once, such as loose/"):
        load(uris, frame)


def test_a_labelled_file_of_several_images_is_refused(tmp_path):
    names = write_archive(str(tmp_path / "a"))
    pages = tiff_of_pages([grey_film(n) for n in range(3)])
    open_store(str(tmp_path / "a")).write("pages.tif", pages)
    frame = labels_of(tmp_path, [names[0], "pages.tif"])
    with pytest.raises(
        UserError, match=r"1 labelled files hold several images each, such as pages\.tif"
    ):
        load([str(tmp_path / "a")], frame)


def test_a_few_unreadable_films_are_left_out_and_many_are_refused(tmp_path, caplog):
    store = open_store(str(tmp_path / "a"))
    names = [f"{n}.png" for n in range(50)]
    for number, name in enumerate(names):
        store.write(name, encoded(grey_film(number)))
    store.write("7.png", b"broken")
    store.write("9.png", encoded(np.zeros_like(grey_film())))
    frame = labels_of(tmp_path, names)
    caplog.set_level("DEBUG", "lungopacity")
    data = load([str(tmp_path / "a")], frame)
    assert data.unreadable["image"].tolist() == ["7.png"]
    assert data.rejected[["image", "error_code"]].to_numpy().tolist() == [["9.png", "poor_quality"]]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "2 of 50 labelled images are left out (not_an_image: 1, "
        "poor_quality (blank, nearly_black): 1); LUNGOPACITY_DEBUG=1 names them"
    ]
    assert data.unreadable["split"].tolist() == frame.loc[7:7, "split"].tolist()
    assert "left out: 7.png (not_an_image: " in caplog.text
    assert "7.png" not in set(data.images["image"])
    assert len(data.pixels_NHW) == len(data.labels_N) == 48
    store.write("8.png", b"broken")
    store.write("6.png", dicom(grey_film().astype(np.uint16) * 16, ViewPosition="LL"))
    with pytest.raises(
        UserError,
        match=r"4 of 50 labelled images cannot be read or are rejected \(not_an_image: 2, .*; fix "
        r"the archive, .* with --accept lateral_view --reject-quality none$",
    ):
        load([str(tmp_path / "a")], frame)


def test_a_broken_shard_is_named(tmp_path):
    names = write_archive(str(tmp_path / "a"))
    data = open_store(str(tmp_path / "a")).read("x.tar")
    open_store(str(tmp_path / "a")).write("x.tar", data[:1500])
    with pytest.raises(UserError, match=r"x\.tar: shard cannot be read \(corrupt_archive"):
        load([str(tmp_path / "a")], labels_of(tmp_path, names))


def test_broken_files_that_hide_no_labelled_film_are_ignored(tmp_path):
    names = write_archive(str(tmp_path / "a"))
    store = open_store(str(tmp_path / "a"))
    sheet = pa.table({"image": names, "label": [CLASSES[0]] * len(names)})
    pq.write_table(sheet, tmp_path / "a" / "labels.parquet")
    store.write("film.zip", encoded(grey_film(9)))
    with zipfile.ZipFile(tmp_path / "a" / "empty.zip", "w") as file:
        file.writestr("folder/", b"")
    store.write("packed.tar", tar({"f/8.png.gz": gzip.compress(encoded(grey_film(8)))}))
    ids = pa.array([21, 20], pa.int64())
    films = pa.array([encoded(grey_film(21)), encoded(grey_film(20))], pa.binary())
    pq.write_table(pa.table({"id": ids, "image": films}), tmp_path / "a" / "films.parquet")
    frame = labels_of(tmp_path, [f"./{names[0]}", *names[1:], "20", "f/8.png.gz"])
    data = load([str(tmp_path / "a")], frame)
    assert data.images["image"].tolist() == frame["image"].tolist()
    for pixels, seed in zip(data.pixels_NHW, (*range(6), 20, 8), strict=True):
        np.testing.assert_array_equal(pixels, PREPROCESSING.square(grey_film(seed)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (r"loose\0.png", r"such as loose\0.png; .*; write / instead of \ in it"),
        ("{folder}/0.png", "such as {folder}/0.png; .*; leave out {folder}/$"),
        ("a/0.png", "such as a/0.png; .*; leave out a/$"),
        (" 0.png", "such as ' 0.png'; .* of one of these$"),
    ],
)
def test_a_name_of_no_film_is_told_with_its_mend(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    open_store("a").write("0.png", encoded(grey_film(0)))
    name, said = (text.replace("{folder}", str(tmp_path / "a")) for text in (name, said))
    with pytest.raises(UserError, match=said.replace("\\", r"\\")):
        load(["a/"], labels_of(tmp_path, ["0.png", name]))


def test_the_labels_take_precedence_over_a_films_header(tmp_path):
    """But the file's own view is kept, too: screening decides by it."""
    store = open_store(str(tmp_path / "a"))
    store.write("0.dcm", dicom(grey_film(0), ViewPosition="PA"))
    store.write("1.png", encoded(grey_film(1)))
    labels = labels_of(tmp_path, ["0.dcm", "1.png"], view_position=["AP"] * 2)
    data = load([store.uri], labels)
    assert data.views() == ["AP", "AP"]
    assert data.views("header_view") == ["PA", None]
