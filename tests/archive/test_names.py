"""Which file of an archive a name of the labels means, where none has it whole."""

from __future__ import annotations

import pickle

import pytest

from lungopacity.archive.names import Endings, files_of


@pytest.mark.parametrize(
    ("name", "file", "meant"),
    [
        ("1.png", "1.png", True),
        ("1.png", "images_001/images/1.png", True),
        ("1.png", "./1.png", True),
        ("set/train/p1/1.png", "train/p1/1.png", True),
        ("1.png", "11.png", False),
        ("p1/1.png", "p11/1.png", False),
        ("p1/1.png", "p2/1.png", False),
        # Of another folder, for all one knows.
        ("train/1.png", "1.png", False),
        ("images/1.png", "masks/1.png", False),
    ],
)
def test_a_name_means_a_file_where_one_ends_with_the_other_folder_by_folder(name, file, meant):
    for names in (Endings([name]), pickle.loads(pickle.dumps(Endings([name])))):
        assert (file in names) == meant
        assert names.meant(file) == ({name} if meant else set())


def test_what_could_be_two_files_or_two_names_goes_with_none():
    found, doubts = files_of(
        ["1.png", "2.png", "a/3.png", "b/a/3.png", "gone.png"],
        ["x/1.png", "x/2.png", "y/2.png", "c/b/a/3.png", "other.png"],
    )
    assert found == {"1.png": "x/1.png"}
    assert doubts == [
        "2.png may be x/2.png or y/2.png",
        "c/b/a/3.png may be a/3.png or b/a/3.png",
    ]
