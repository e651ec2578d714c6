from pathlib import Path

import pandas as pd
import pytest

from lungopacity.benchmark.inputs import made_up
from lungopacity.errors import UserError
from lungopacity.models import load_model


def test_without_films_and_model_there_are_phantoms_and_a_fresh_network(tmp_path):
    with made_up(None, None, count=8, output=str(tmp_path)) as given:
        films = sorted(path.name for path in Path(given.images).rglob("*.*"))
        labels = pd.read_csv(given.labels)
        # Formats that every way reads.
        assert {name.rsplit(".")[-1] for name in films} <= {"png", "jpg"}
        assert sorted(name.rsplit("/")[-1] for name in labels["image"]) == films
        assert load_model(given.model).spec.architecture == "classical-cnn"
        assert [note.split(":")[0] for note in given.notes] == ["films", "model"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_given_is_taken():
    with made_up("films", "folder", count=1) as given:
        assert (given.images, given.model, given.notes) == ("films", "folder", [])
    with pytest.raises(UserError, match="--count must be at least 1"), made_up(None, "m", count=0):
        pass
