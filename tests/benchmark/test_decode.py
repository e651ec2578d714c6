import json

import numpy as np
import pytest

from lungopacity.benchmark.decode import _films, decode_speeds, table
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("films"))
    film = grey_film(0, 200, 180)
    open_store(uri).write("a.png", encoded(film))
    open_store(uri).write("x.tar", tar({"b.png": encoded(film[::-1].copy()), "n.txt": b"notes"}))
    return uri


def test_every_format_is_measured_beside_what_reads_it(archive):
    speeds = decode_speeds(archive, count=2, repeats=2)
    ours = {speed.format for speed in speeds if speed.way == "lungopacity"}
    assert {"PNG", "PNG, rows alone", "JPEG", "TIFF", "JPEG 2000", "DICOM, RLE"} <= ours
    others = {(speed.format, speed.way) for speed in speeds} - {(f, "lungopacity") for f in ours}
    assert {("JPEG", "simplejpeg"), ("PNG", "torchvision"), ("DICOM, JPEG", "pydicom")} <= others
    for speed in speeds:
        assert np.isfinite(speed.images_per_s)
        # What is compared gives the same pixels; a DCT scale is each library's own choice.
        assert speed.max_difference in ((-1, 0, 1) if "to 224" in speed.format else (0, 1)), speed
    lines = table(speeds).splitlines()
    assert len(lines) == 1 + len(speeds)


def test_the_command_prints_json(archive, capfd):
    code = main(
        ["benchmark", "decode", "--images", archive, "--count", "1", "--repeats", "1", "--json"]
    )
    out, _ = capfd.readouterr()
    assert code == 0
    assert {row["format"] for row in json.loads(out)} >= {"PNG", "JPEG"}


def test_nothing_to_measure_is_refused(tmp_path, archive):
    with pytest.raises(UserError, match="at least 1"):
        decode_speeds(count=0)
    (tmp_path / "notes.txt").write_text("no film")
    with pytest.raises(UserError, match="holds no film that can be read"):
        decode_speeds(str(tmp_path))
    # What is no film among films is passed over.
    assert len(list(_films(archive, 24))) == 2
