"""Labels files made of a folder per class."""

from __future__ import annotations

import os

import pandas as pd
import pytest

from lungopacity.cli import main
from lungopacity.dataset.layouts import labels_of_folders
from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import UserError
from lungopacity.storage import open_store
from tests.films import encoded, grey_film


def test_folders_name_classes_without_masks_and_spreadsheets(tmp_path, capsys):
    store = open_store(str(tmp_path / "archive"))
    for name in (
        "COVID/images/COVID-1.png",
        "COVID/masks/COVID-1.png",
        "COVID/Masks/COVID-2.png",
        "COVID/infection masks/COVID-1.png",
        "COVID/lung_mask/COVID-1.png",
        "COVID/images/.thumbs/COVID-1.png",
        ".ipynb_checkpoints/COVID-1-checkpoint.png",
        "COVID.metadata.xlsx",
        "Viral Pneumonia/images/V-1.png",
        "Normal/N-1.png",
        "Normal/Thumbs.db",
        "COVID/.DS_Store",
        "COVID/images/._COVID-1.png",
        "README.md.txt",
    ):
        store.write(name, encoded(grey_film()) if name.endswith("png") else b"text")
    output = str(tmp_path / "labels.csv")
    assert main(["labels", "--folders", str(tmp_path / "archive"), "--output", output]) == 0
    assert "Viral_Pneumonia: 1 image, no patient_id" in capsys.readouterr().out
    frame = read_labels(output).set_index("image")["label"].to_dict()
    assert frame == {
        "COVID/images/COVID-1.png": "COVID",
        "Normal/N-1.png": "Normal",
        "Viral Pneumonia/images/V-1.png": "Viral_Pneumonia",
    }


def test_folders_above_the_classes_tell_the_splits(tmp_path, caplog):
    caplog.set_level("INFO")
    store = open_store(str(tmp_path))
    for name in (
        "set/Train/images/NORMAL/1.png",
        "set/val/NORMAL/2.png",
        "set/test/NORMAL/images/1.png",
        "set/test/test/3.png",
    ):
        store.write(name, encoded(grey_film()))
    frame = labels_of_folders(str(tmp_path)).set_index("image")
    assert frame["split"].to_dict() == {
        "set/Train/images/NORMAL/1.png": "train",
        "set/val/NORMAL/2.png": "validation",
        "set/test/NORMAL/images/1.png": "test",
        "set/test/test/3.png": "test",
    }
    assert frame["label"].unique().tolist() == ["NORMAL", "test"]
    assert "its folders tell the splits: 1 train, 1 validation, 2 test" in caplog.text
    # One split alone would leave nothing to evaluate.
    assert "split" not in labels_of_folders(str(tmp_path / "set/test"))
    store.write("set/NORMAL/4.png", encoded(grey_film()))
    assert "split" not in labels_of_folders(str(tmp_path))
    assert "folders tell the split of only 4 of 5 images (1 train" in caplog.text


def test_spreadsheets_beside_the_folders_give_each_images_site(tmp_path, caplog):
    store = open_store(str(tmp_path))
    for name in ("COVID/images/COVID-1.png", "COVID/images/COVID-2.png", "Normal/Normal-1.png"):
        store.write(name, encoded(grey_film()))
    for name, rows in {
        "COVID": [("COVID-1", "https://sirm.org/covid-19/"), ("COVID-9", "https://gone.org")],
        "Normal": [("NORMAL-1", "https://www.kaggle.com/c/rsna/data"), ("NORMAL-2", None)],
    }.items():
        sheet = pd.DataFrame(rows, columns=["FILE NAME", "URL"]).assign(FORMAT="PNG")
        sheet.to_excel(tmp_path / f"{name}.metadata.xlsx", index=False)
    frame = labels_of_folders(str(tmp_path)).set_index("image")["site"]
    assert frame["COVID/images/COVID-1.png"] == "sirm.org/covid-19"
    assert frame["Normal/Normal-1.png"] == "kaggle.com/c/rsna/data"
    assert frame.isna()["COVID/images/COVID-2.png"]
    assert not caplog.records

    pd.DataFrame({"a": [1]}).to_excel(tmp_path / "Other.metadata.xlsx", index=False)
    store.write("Normal.metadata.xlsx", b"no sheet")
    assert labels_of_folders(str(tmp_path))["site"].count() == 1
    assert [record.message.split(":")[0].rsplit("/", 1)[-1] for record in caplog.records] == [
        "Normal.metadata.xlsx",
        "Other.metadata.xlsx",
    ]
    assert all(
        "gives no sites, because it is not a spreadsheet with the columns FILE NAME and URL"
        in record.message
        for record in caplog.records
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loose.png", "no folder that could name"),
        ("a/films.tar", "is a shard"),
        ("a/x.csv", "no image"),
        ("a/.DS_Store", "no image"),
        (os.fsdecode(b"a/caf\xe9.png"), r"a/caf\\xe9.png has a name that is not UTF-8; rename it"),
    ],
)
def test_what_is_in_no_class_is_refused(tmp_path, name, said):
    open_store(str(tmp_path)).write(name, b"x")
    with pytest.raises(UserError, match=said):
        labels_of_folders(str(tmp_path))
