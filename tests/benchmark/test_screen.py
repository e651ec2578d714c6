import json
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from lungopacity.archive.content import ReadSettings, shown_films
from lungopacity.benchmark import alternatives, bare_loop, screen
from lungopacity.benchmark.bare_loop import BareTask
from lungopacity.benchmark.place import Place
from lungopacity.benchmark.screen import (
    ALTERNATIVES,
    LIMIT,
    OURS,
    screen_speeds,
    steady_rate,
)
from lungopacity.benchmark.screen_table import ScreenSpeed, table
from lungopacity.benchmark.watched import FailedError, Taken
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("bench") / "model")
    write_tiny_model(uri, is_compiled=True, preprocessing=Preprocessing(64, crop_borders=True))
    return uri


def test_every_way_scores_every_image_in_s3_and_ours_gives_the_bare_loops_scores(
    s3_uri, model, monkeypatch, ray_cluster
):
    # For time's sake the ways of Ray join one Ray, where otherwise each starts its own.
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    store = open_store(s3_uri)
    for number in range(23):
        # Names repeat, as in archives of a folder a study.
        key = f"study-{number % 8}/IM{number // 8}.png"
        film = np.pad(grey_film(number, 200, 120 + 2 * number), ((30, 20), (40, 0)))
        store.write(key, encoded(film))
    store.write("study-7/IM2.png", encoded(np.zeros((200, 200), np.uint8)))
    store.write("labels.csv", b"image,label\n")
    ways = ("bare", OURS, *ALTERNATIVES)
    found = screen_speeds(
        s3_uri, model, ways=ways, repeats=1, batch_size=4, limit_s=250, output=f"{s3_uri}-scratch"
    )
    speeds = {speed.way: speed for speed in found}
    assert tuple(speeds) == ways
    if find_spec("daft") is None:  # it holds pyarrow back, so the tests' environment lacks it
        assert speeds.pop("daft").note == "not installed: pip install 'lungopacity[benchmark]'"
    for speed in speeds.values():
        assert (speed.note, speed.images) == ("", 24)
        assert speed.images_per_s > 0
        assert speed.steady_per_s is None or speed.images_per_s < speed.steady_per_s
        assert 0 < speed.cpu_busy <= 1
        # Of a Ray that others have started, memory cannot be told.
        of_ray = speed.way in screen._OF_RAY
        assert (speed.memory_mib is None) == of_ray == (speed.bytes_moved is not None)
    assert speeds["bare"].differs == 0
    # Batches are others, but borders are cut and shapes kept by each way.
    assert all(speed.differs < 1e-6 for speed in speeds.values())
    assert len(table(list(speeds.values())).splitlines()) == 1 + len(speeds)
    assert list(open_store(f"{s3_uri}-scratch").list()) == []


def test_of_a_jpeg_too_the_other_ways_show_the_network_what_screening_shows_it():
    settings = ReadSettings(Preprocessing(64, crop_borders=True))
    film = np.pad(grey_film(1, 700, 500), ((100, 50), (200, 0)))
    data = encoded(film, "JPEG", quality=92)
    (shown,) = shown_films(data, settings)
    assert shown.film.pixels.size < film.size  # the scale was chosen by the reader
    expected = settings.preprocessing.pad(settings.preprocessing.fit(shown.shown))
    found = alternatives._square(data, settings.preprocessing)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.usefixtures("ray_cluster")
def test_bytes_moved_are_those_of_one_run(capfd):
    for _ in range(2):
        with alternatives._bytes_moved_printed():
            ray.put(np.zeros(1_000_000, np.uint8))
    first, second = map(screen._moved, capfd.readouterr().out.splitlines())
    assert first == second == pytest.approx(1_000_000, rel=0.01)


def test_shards_are_for_those_who_read_them(tmp_path, model, capfd):
    films = {f"{number}.png": encoded(grey_film(number)) for number in range(29)}
    store = open_store(str(tmp_path))
    store.write("a.tar", tar({"broken.png": b"no image"}))
    store.write("x.tar", tar({"broken.png": b"no image", **films}))
    command = ["benchmark", "screen", "--images", str(tmp_path), "--model", model]
    ways = ", ".join(("bare-score", *LIMIT[:2], "daft"))
    assert main([*command, "--ways", ways, "--repeats", "1", "--json"]) == 0
    found = {speed["way"]: speed for speed in json.loads(capfd.readouterr().out)["figures"]}
    # What cannot be read is nowhere counted.
    assert [found[way]["images"] for way in LIMIT] == [29, 29, 29]
    assert found["daft"]["note"] == "reads no shards"


def test_one_scorer_that_all_feed_gives_the_same_scores(tmp_path, model):
    """As on a GPU, but for the device."""
    store = open_store(str(tmp_path))
    films = [grey_film(number) for number in range(7)]
    for number, film in enumerate(films):
        store.write(f"archive/{number}.png", encoded(film))
    task = BareTask("bare", f"{tmp_path}/archive", model, str(tmp_path), batch_size=2)
    bare_loop.run(task, one_scorer=True)
    rows = pq.read_table(tmp_path / "scored.parquet").to_pandas().set_index("image")
    trained = bare_loop.load_model(model)
    pixels_NHW = np.stack([trained.spec.preprocessing.square(film) for film in films])
    scorer = bare_loop._scorer(trained, task)
    expected_NK = scorer.probabilities(scorer.logits(pixels_NHW))
    found_N = rows["p_Lung_Opacity"][[f"{number}.png" for number in range(7)]]
    np.testing.assert_allclose(found_N, expected_NK[:, 1], atol=1e-6)


def test_what_fails_or_hangs_is_said_so(tmp_path, model):
    store = open_store(str(tmp_path))
    store.write("a.png", encoded(grey_film(1)))
    store.write("b.png", b"no image")
    (broken,) = screen_speeds(str(tmp_path), model, ways=["dataloader"], repeats=2)
    assert broken.note.startswith("failed: ")
    assert "Error" in broken.note  # the image's, or that of the worker that met it
    found = screen_speeds(str(tmp_path), model, ways=["bare", "dataloader"], repeats=1, limit_s=0.2)
    assert [speed.note for speed in found] == ["failed: did not end in 0.2 s"] * 2
    assert "did not end" in table(found)


def test_a_way_that_fails_costs_no_other_its_figures(tmp_path, model, monkeypatch, caplog):
    open_store(str(tmp_path)).write("a.png", encoded(grey_film(1)))
    ran = []

    def run(way, task, films):
        ran.append(way)
        if (way, ran.count(way)) == ("bare", 2):
            raise FailedError("no room")
        return screen._Run(20, Taken(seconds=2.0), 12.5 if way == OURS else None, None, {})

    def started(way, *_):
        raise FailedError("Ray is gone")

    monkeypatch.setattr(screen, "_run", run)
    monkeypatch.setattr(screen, "_started", started)
    bare, ours = screen_speeds(str(tmp_path), model, ways=["bare", OURS], repeats=3)
    assert ran == ["bare", OURS, "bare", OURS, OURS]
    # Each run as it ends: whoever is cut short keeps those.
    assert caplog.messages.count("bare: 10.0 images/s in 2.0 s") == 1
    assert caplog.messages.count("lungopacity: 10.0 images/s in 2.0 s, steady 12.5 images/s") == 3
    assert (bare.images_per_s, bare.note) == (10.0, "failed in repeat 2: no room")
    assert (ours.images_per_s, ours.bytes_moved) == (10.0, None)
    assert ours.note == "bytes moved: failed: Ray is gone"
    assert table([bare, ours]).splitlines()[2].split() == [
        OURS, "20", "10.0", "0%", "1.00", "12.5", "0%", "0%", "0", "0", *ours.on.split(),
    ]  # fmt: skip


def test_every_way_is_given_the_same(tmp_path, monkeypatch):
    asked = {}

    def run_watched(arguments, environment, limit_s, log, good=(0,)):
        asked[way] = arguments, environment
        return "", Taken()

    monkeypatch.setattr(screen, "run_watched", run_watched)
    task = screen._Task("films", "model", 8, 60.0, "p_x", Place(2, 0, 2, 0), None)
    for way in screen.WAYS:
        screen._started(way, task, tmp_path, "output")
    arguments, _ = asked.pop(OURS)
    # Many damaged films, and films of poor quality, are scored by the others as well.
    assert " ".join(arguments).endswith("--reject-quality none --max-failed-fraction 1")
    assert "--no-gpu" in arguments
    assert "--precision float32" in " ".join(arguments)
    assert {environment["MALLOC_MMAP_MAX_"] for _, environment in asked.values()} == {"0"}


def test_a_precision_is_of_every_way_that_has_a_gpu(tmp_path, monkeypatch):
    asked = {}

    def run_watched(arguments, environment, limit_s, log, good=(0,)):
        asked[way] = arguments
        return "", Taken()

    monkeypatch.setattr(screen, "run_watched", run_watched)
    # A GPU in the cluster, and none here.
    place = Place(2, 0, 8, 1)
    task = screen._Task("films", "model", 8, 60.0, "p_x", place, None, "bfloat16")
    given = tmp_path / "way.json"
    for way in screen.WAYS:
        screen._started(way, task, tmp_path, "output")
        expected = "bfloat16" if way in screen._OF_RAY else "float32"
        if way == OURS:
            assert f"--precision {expected}" in " ".join(asked[way])
        else:
            assert json.loads(given.read_text())["precision"] == expected


@pytest.mark.parametrize(("cpus", "actors", "threads"), [(2, 1, 2), (4, 2, 2), (64, 62, 1)])
def test_rays_recipes_compute_on_every_cpu(cpus, actors, threads, monkeypatch):
    class Films:
        def map_batches(self, score, **options):
            return score().model, options["compute"].max_size

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    monkeypatch.setattr(alternatives, "_Model", lambda *given: given)
    task = alternatives.Task("ray-download", "films", "model", "output", 8)
    found = alternatives._ray_scored(Films(), "uri", "films", task)
    assert found == ((task, threads), actors)


def test_the_steady_rate_counts_whole_batches():
    for images in (130, 320, 1000):
        assert steady_rate(np.arange(images) // 64 * 1.0) == pytest.approx(64)
    assert steady_rate(np.zeros(64)) is None


def test_the_steady_rate_has_a_spread_of_its_own():
    runs = [screen._Run(20, Taken(seconds=2.0), rate, None, {}) for rate in (9.0, 10.0, 12.0)]
    found = screen._summed_up("bare", runs, None, None, Place(2, 0, 2, 0), "")
    assert (found.spread, found.steady_per_s, found.steady_spread) == (0.0, 10.0, 0.15)


def test_ratios_are_of_as_many_cores_and_gpus():
    place = Place(cores=2, gpus=0, ray_cores=64, ray_gpus=1, nodes=3, joined=True)
    bare = ScreenSpeed("bare", place.on(ray=False), 9, 10.0, steady_per_s=12.0)
    ours = ScreenSpeed(
        OURS, place.on(ray=True), 9, 50.0, steady_per_s=60.0, steady_spread=0.05, gpu_busy=0.5
    )
    _, first, second = table([bare, ours]).splitlines()
    assert first.split() == ["bare", "9", "10.0", "0%", "1.00", "12.0", "1.00", "2", "cores"]
    assert second.split() == [
        OURS, "9", "50.0", "0%", "60.0", "5%", "50%", "64", "cores,", "1", "GPU",
    ]  # fmt: skip


def test_several_nodes_need_a_place_that_all_can_write_to(tmp_path, model, monkeypatch):
    open_store(str(tmp_path)).write("a.png", encoded(grey_film(1)))
    monkeypatch.setattr(Place, "found", lambda use_gpu: Place(2, 0, 4, 0, nodes=2, joined=True))
    with pytest.raises(UserError, match=r"has 2 nodes; say with --output URI"):
        screen_speeds(str(tmp_path), model, ways=[OURS])


def test_an_archive_without_a_readable_image_is_said_so(tmp_path, model):
    open_store(str(tmp_path)).write("a.png", b"no image")
    (bare,) = screen_speeds(str(tmp_path), model, ways=["bare"], repeats=1)
    assert bare.note == "failed: scored no image; give some that can be read"


def test_wrong_options_are_refused(tmp_path, model):
    with pytest.raises(UserError, match="--ways: 'fast' is none of bare, "):
        screen_speeds(str(tmp_path), model, ways=["fast"])
    with pytest.raises(UserError, match="--repeats"):
        screen_speeds(str(tmp_path), model, repeats=0)
    open_store(str(tmp_path)).write("a.png", encoded(grey_film(1)))
    with pytest.raises(UserError, match="bfloat16 needs a GPU"):
        screen_speeds(str(tmp_path), model, precision="bfloat16", use_gpu=False)


def test_an_unknown_way_is_refused_before_films_are_drawn(monkeypatch, capsys):
    monkeypatch.setattr("lungopacity.benchmark.inputs.write_phantom_archive", pytest.fail)
    assert main(["benchmark", "screen", "--ways", "nope"]) == 2
    assert "--ways: 'nope' is none of bare" in capsys.readouterr().err
