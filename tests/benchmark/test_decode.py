import json

import numpy as np
import pytest

from lungopacity.benchmark.decode import _films, _torchvision_batch, decode_speeds, table
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar, tiff_of_pages


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("films"))
    small = grey_film(0, 200, 180)
    store = open_store(uri)
    store.write("a.tif", tiff_of_pages([grey_film(1, 200, 150), grey_film(1, 900, 700)]))
    store.write("b.png", encoded(small)[:500])
    store.write("labels.csv", b"image,label\n")
    store.write("x.tar", tar({"b.png": encoded(small), "n.txt": b"notes"}))
    return uri


def test_every_format_is_measured_beside_what_reads_it(archive):
    speeds = decode_speeds(archive, count=2, repeats=1)
    ours = {speed.format for speed in speeds if speed.way == "lungopacity"}
    assert {"PNG", "PNG, rows alone", "JPEG", "TIFF", "JPEG 2000", "DICOM, RLE"} <= ours
    others = {(speed.format, speed.way) for speed in speeds} - {(f, "lungopacity") for f in ours}
    assert {("JPEG", "simplejpeg"), ("PNG", "torchvision"), ("DICOM, JPEG", "pydicom")} <= others
    for speed in speeds:
        assert np.isfinite(speed.images_per_s)
        # What is compared gives the same pixels: the DCT is scaled alike, too.
        assert speed.max_difference in (0, 1), speed
    lines = table(speeds).splitlines()
    told = [line for line in lines if "nvJPEG: skipped" in line]
    assert len(lines) == 1 + len(speeds) + len(told)


def test_the_command_prints_json(archive, capfd):
    code = main(
        ["benchmark", "decode", "--images", archive, "--count", "1", "--repeats", "1", "--json"]
    )
    out, err = capfd.readouterr()
    assert code == 0
    # Each format as it was measured, too.
    assert " TIFF: lungopacity " in err
    assert {row["format"] for row in json.loads(out)["figures"]} >= {"PNG", "JPEG"}


def test_pages_are_films_and_what_cannot_be_decoded_is_passed_over(archive):
    assert [film.shape for film in _films(archive)] == [(200, 150), (900, 700), (200, 180)]


def test_many_jpegs_are_decoded_in_one_call():
    """As by nvJPEG, but for the device."""
    film = grey_film(0, 200, 180)
    files = [encoded(film, "JPEG"), encoded(film[:100], "JPEG")]
    assert [found.shape for found in _torchvision_batch("cpu")(files)] == [(200, 180), (100, 180)]


def test_a_place_without_a_film_is_said_so(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar({}))
    (tmp_path / "notes.txt").write_bytes(b"notes")
    with pytest.raises(UserError, match="holds no film that can be decoded"):
        decode_speeds(str(tmp_path))


def test_nothing_to_measure_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        decode_speeds(count=0)
