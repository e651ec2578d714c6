"""The smaller part of the fuzz run, and every bomb by its name; see `tests.fuzz` for the whole."""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lungopacity.archive.inventory import take_inventory
from tests import fuzz

FIXTURES = fuzz.own_fixtures()


def read(folder: Path, inputs: list[tuple[str, bytes]]) -> list[list[dict]]:
    """The rows of each of them, read as one task would."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [f"{number:03d}-{name}" for number, (name, _) in enumerate(inputs)]
    for name, (_, data) in zip(names, inputs, strict=True):
        (folder / name).write_bytes(data)
    rows = fuzz.rows_of(folder, take_inventory(str(folder)).objects)
    return [[row for row in rows if row["image"] == name] for name in names]


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made) / "archive"


def test_fixtures_are_valid_before_they_are_damaged(folder):
    for fixture, rows in zip(
        FIXTURES, read(folder, [(found.name, found.data) for found in FIXTURES]), strict=True
    ):
        assert fuzz.broken_conditions(rows) == []
        images = [row for row in rows if row["shard_rows"] is None]
        wrong = [row["error_code"] for row in images if row["status"] != "ok"]
        # The note beside the films of a container.
        assert wrong in ([], ["not_an_image"] * ("notes.txt" in str(images))), fixture


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(seeds=st.lists(st.integers(0, 2**32), min_size=20, max_size=20))
def test_damaged_files_give_rows_with_codes(folder, seeds):
    inputs = [fuzz.mutated(random.Random(seed), FIXTURES) for seed in seeds]
    found = read(folder, [(made.name, made.data) for made in inputs])
    for seed, made, rows in zip(seeds, inputs, found, strict=True):
        assert fuzz.broken_conditions(rows) == [], (seed, made)
