"""A small part of the fuzz run, and every bomb by name; see `tests.fuzz` for all of it."""

import gc
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lungopacity.archive.inventory import take_inventory
from tests.fuzz.bombs import bomb, own
from tests.fuzz.fixtures import IMAGE_KINDS, own_fixtures
from tests.fuzz.inputs import broken_conditions, mutated, rows_of
from tests.fuzz.run import resident_bytes

FIXTURES = own_fixtures()


def read(folder: Path, inputs: list[tuple[str, bytes]]) -> list[list[dict]]:
    """The rows of each input, read as by one task."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = [f"{number:03d}-{name}" for number, (name, _) in enumerate(inputs)]
    for name, (_, data) in zip(names, inputs, strict=True):
        (folder / name).write_bytes(data)
    rows = rows_of(folder, take_inventory(str(folder)).objects)
    return [[row for row in rows if row["image"] == name] for name in names]


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made) / "archive"


def test_fixtures_are_valid_before_they_are_damaged(folder):
    for fixture, rows in zip(
        FIXTURES, read(folder, [(found.name, found.data) for found in FIXTURES]), strict=True
    ):
        assert broken_conditions(rows) == []
        images = [row for row in rows if row["shard_rows"] is None]
        wrong = [row["error_code"] for row in images if row["status"] != "ok"]
        # The note beside the films in a container.
        assert wrong in ([], ["not_an_image"] * ("notes.txt" in str(images))), fixture


@settings(
    max_examples=30,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(seeds=st.lists(st.integers(0, 2**32), min_size=20, max_size=20))
def test_damaged_files_give_rows_with_codes(folder, seeds):
    inputs = [mutated(random.Random(seed), FIXTURES) for seed in seeds]
    found = read(folder, [(made.name, made.data) for made in inputs])
    for seed, made, rows in zip(seeds, inputs, found, strict=True):
        assert broken_conditions(rows) == [], (seed, made)


PIXELS = [found for found in FIXTURES if found.kind in IMAGE_KINDS]


@pytest.mark.parametrize("fixture", PIXELS, ids=lambda found: found.name)
def test_a_cut_image_has_all_of_its_pixels_or_none(folder, fixture):
    data = fixture.data
    # Everywhere, and right after the end of a header, where decoders are most forgiving.
    marks = [at + 2 for at in range(len(data)) if data[at : at + 2] in (b"\xff\x93", b"\xff\x90")]
    # Also inside the last SOP class: a cut one is not the class of an image.
    marks.append(max(10, data.rfind(b"1.2.840.10008.5.1.4") + 10))
    cuts = [*range(1, len(data), len(data) // 8 + 1), *marks[-9:], len(data) - 3, len(data) - 1]
    whole, *found = read(folder, [(fixture.name, data[:cut]) for cut in (len(data), *cuts)])
    whole_pixels = [row["pixels"] for row in whole]
    for cut, rows in zip(cuts, found, strict=True):
        failed = [row for row in rows if row["status"] != "ok"]
        kept = [row["pixels"] for row in rows if row["status"] == "ok"]
        assert {row["status"] for row in failed} <= {"failed"}
        assert kept == whole_pixels if not failed else set(kept) <= set(whole_pixels), cut


@pytest.mark.parametrize("name", ["grey.jpg", "rgb.jpg", "cmyk.jpg", "turned.jpg", "restarts.jpg"])
def test_a_cut_jpeg_with_an_end_marker_is_not_taken_for_whole(folder, name):
    """libjpeg only warns, and fills lost pixels with grey."""
    data = own(name)
    # After the header; some metadata are larger than the pixels.
    first = data.rindex(b"\xff\xda") + 20
    cuts = range(first, len(data) - 8, (len(data) - first) // 10)
    found = read(folder, [(name, data[:cut] + b"\xff\xd9") for cut in cuts])
    assert {row["error_code"] for rows in found for row in rows} <= {"truncated", "corrupt_image"}


# The error code of each bomb by name; None for a readable image. Bombs that take seconds, and are
# much like others, are left to the long run.
BOMBS = {
    "png of zeros, 50,000 x 50,000": {"too_large"},
    "png of one bit, 50,000 x 50,000": {"too_large"},
    "png of zeros, 9,999 x 9,999": {None},
    "png whose pixels do not end": {None},
    "png with a text bomb": {"corrupt_image"},
    "png with a profile bomb": {None},  # the profile is left alone, and the film is read
    "tiff lzw, 50,000 x 50,000": {"too_large"},
    "tiff deflate, 50,000 x 50,000": {"too_large"},
    "tiff deflate, 9,999 x 9,999": {"corrupt_image"},
    "tiff of 4,000 pages in one strip": {None, "decompression_bomb"},
    "tiff whose pages run in a circle": {None},
    "jpeg of 4,000 scans": {"decompression_bomb"},
    "jpeg, 50,000 x 50,000": {"too_large"},
    "jpeg 2000, 50,000 x 50,000": {"too_large"},
    "bmp, 50,000 x 50,000": {"too_large"},
    "gzip of zeros": {"decompression_bomb"},
    "gzip of many streams": {"empty"},
    "zstd of zeros": {"decompression_bomb"},
    "tar of a hole": {"decompression_bomb"},
    "zip of zeros": {"decompression_bomb"},
    "zip that hides zeros": {"corrupt_archive"},
    "zip that hides bzip2": {"corrupt_archive"},
    "zip that hides lzma": {"corrupt_archive"},
    "zip in zip in zip": {"unsupported"},
    "zip of overlapping members": {"corrupt_archive", "not_an_image"},
    "dicom that inflates to 1 GiB": {"decompression_bomb"},
    "dicom of 65,535 x 65,535": {"too_large"},
    "dicom of 2,147,483,647 frames": {"too_large"},
    "dicom of 400 jpeg 2000 frames": {"decompression_bomb"},
    "dicom of a jpeg-ls that does not end": {"truncated"},
    "dicom of a jpeg of 4,000 scans": {"decompression_bomb"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_unpacks(folder, name):
    made = bomb(name)
    (rows,) = read(folder, [(made.name, made.data)])
    assert broken_conditions(rows) == []
    assert {row["error_code"] for row in rows if row["shard_rows"] is None} == BOMBS[name]


def test_the_unpacked_part_of_a_bomb_is_not_kept_in_memory(folder):
    """Those of ten bombs in one task would be gigabytes."""
    made = bomb("zstd of zeros")
    read(folder, [(made.name, made.data)])
    gc.collect()
    gc.disable()
    try:
        before = resident_bytes()
        read(folder, [(made.name, made.data)])
        assert resident_bytes() - before < 64 << 20
    finally:
        gc.enable()
