import json
import subprocess
from importlib.util import find_spec

import numpy as np
import pytest
import ray

from lungopacity.benchmark.screen import ALTERNATIVES, LIMIT, OURS, screen_speeds, table
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("bench") / "model")
    write_tiny_model(uri, image_size=64)
    return uri


@pytest.mark.usefixtures("ray_cluster")
def test_every_way_scores_every_image_in_s3_and_ours_gives_the_bare_loops_scores(
    s3_uri, model, monkeypatch
):
    # For time's sake four of the ways join one Ray, where otherwise each starts its own.
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    store = open_store(s3_uri)
    for number in range(60):
        store.write(f"{number}.png", encoded(grey_film(number, 200, 200)))
    # Ray's two recipes differ by how they read alone.
    ways = ("bare", OURS, *(way for way in ALTERNATIVES if way != "ray-read-images"))
    found = screen_speeds(s3_uri, model, ways=ways, repeats=1, batch_size=8, limit_s=120)
    speeds = {speed.way: speed for speed in found}
    assert tuple(speeds) == ways
    if find_spec("daft") is None:  # it holds pyarrow back, so the tests' environment lacks it
        assert speeds.pop("daft").note == "not installed: pip install daft"
    for speed in speeds.values():
        assert (speed.note, speed.images) == ("", 60)
        assert 0 < speed.images_per_s < speed.steady_per_s
        assert 0 < speed.cpu_busy <= 1
        assert speed.memory_mib > 50
    assert speeds["bare"].differs == speeds[OURS].differs == 0
    # No crop, and square films: only the shrinking differs.
    assert all(speeds[way].differs < 0.2 for way in ALTERNATIVES if way in speeds)
    assert {way for way in speeds if speeds[way].bytes_moved is not None} == {
        OURS, "ray-download",
    }  # fmt: skip
    lines = table(list(speeds.values())).splitlines()
    assert len(lines) == 1 + len(speeds)
    assert lines[1].split()[4] == "1.00"


def test_shards_are_for_those_who_read_them(tmp_path, model, capfd):
    films = {f"{number}.png": encoded(grey_film(number)) for number in range(30)}
    open_store(str(tmp_path)).write("x.tar", tar(films))
    command = ["benchmark", "screen", "--images", str(tmp_path), "--model", model]
    ways = ",".join((*LIMIT, "daft"))
    assert main([*command, "--ways", ways, "--repeats", "1", "--json"]) == 0
    found = {speed["way"]: speed for speed in json.loads(capfd.readouterr().out)}
    assert [found[way]["images"] for way in LIMIT] == [30, 30, 30]
    assert found["daft"]["note"] == "reads no shards"
    assert np.isfinite(found["bare"]["steady_per_s"])


def test_what_fails_or_hangs_is_said_so(tmp_path, model):
    store = open_store(str(tmp_path))
    store.write("a.png", encoded(grey_film(1)))
    store.write("b.png", b"no image")
    (broken,) = screen_speeds(str(tmp_path), model, ways=["dataloader"], repeats=2)
    assert broken.note.startswith("failed: ")
    assert "Error" in broken.note  # the image's, or that of the worker that met it
    (late,) = screen_speeds(str(tmp_path), model, ways=["dataloader"], repeats=1, limit_s=0.2)
    assert late.note == "failed: did not end in 0.2 s"
    assert "did not end" in table([late])


def test_where_one_of_ours_fails_its_last_line_is_told(tmp_path, model, monkeypatch):
    def failing(way, *_):
        raise subprocess.CalledProcessError(3, way, stderr="a traceback\nValueError: why")

    monkeypatch.setattr("lungopacity.benchmark.screen._started", failing)
    open_store(str(tmp_path)).write("a.png", encoded(grey_film(1)))
    with pytest.raises(UserError, match="bare failed: ValueError: why"):
        screen_speeds(str(tmp_path), model, ways=["bare"], repeats=1)
    (other,) = screen_speeds(str(tmp_path), model, ways=["dataloader"], repeats=1)
    assert other.note == "failed: ValueError: why"


def test_an_archive_without_a_readable_image_is_said_so(tmp_path, model):
    open_store(str(tmp_path)).write("a.png", b"no image")
    (bare,) = screen_speeds(str(tmp_path), model, ways=["bare"], repeats=1)
    assert bare.note == "scored 0 images: too few to be timed; give more that can be read"


def test_wrong_options_are_refused(tmp_path, model):
    with pytest.raises(UserError, match="--ways: 'fast' is none of bare, "):
        screen_speeds(str(tmp_path), model, ways=["fast"])
    with pytest.raises(UserError, match="--repeats"):
        screen_speeds(str(tmp_path), model, repeats=0)
