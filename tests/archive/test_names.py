"""Which file of an archive a name of the labels means if no file has it as a whole."""

from __future__ import annotations

import pickle

import pytest

from lungopacity.archive.names import Wanted, names_by_ending


@pytest.mark.parametrize(
    ("name", "file", "meant"),
    [
        ("1.png", "1.png", True),
        ("1.png", "images_001/images/1.png", True),
        ("1.png", "./1.png", True),
        ("./1.png", "1.png", True),
        ("./images/1.png", "images/1.png", True),
        ("./images/1.png", "1.png", False),
        ("set/train/p1/1.png", "train/p1/1.png", True),
        ("1.png", "11.png", False),
        ("p1/1.png", "p11/1.png", False),
        ("p1/1.png", "p2/1.png", False),
        # It may be of another folder.
        ("train/1.png", "1.png", False),
        ("images/1.png", "masks/1.png", False),
    ],
)
def test_a_name_means_a_file_if_one_ends_with_the_other_by_whole_folders(name, file, meant):
    wanted = Wanted(frozenset([name]), by_ending=True)
    for names in (wanted, pickle.loads(pickle.dumps(wanted))):
        assert names.has(file) == meant
        assert names.meant(file) == ({name} if meant else set())
    assert Wanted(frozenset([name])).has(file) == (name == file)


def test_ambiguous_names_and_files_are_not_matched():
    found, doubts = names_by_ending(
        ["x/1.png", "x/2.png", "y/2.png", "c/b/a/3.png", "other.png"],
        ["1.png", "2.png", "a/3.png", "b/a/3.png", "gone.png"],
    )
    assert found == {"x/1.png": "1.png"}
    assert doubts == [
        "2.png may be x/2.png or y/2.png",
        "c/b/a/3.png may be a/3.png or b/a/3.png",
    ]
