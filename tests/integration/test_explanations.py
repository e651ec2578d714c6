"""Screening with --explain: a picture of each positive film, once, whatever happens on the way."""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import lungopacity
from lungopacity.archive.inventory import Inventory, list_archive
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.models import OperatingPoint, save_model
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from lungopacity.screening.clean import clean
from lungopacity.screening.job import screening_job
from lungopacity.screening.screen import run_job
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import tiny_model

NAME = "ZZPLANTED"
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six loose films and four in a shard, half of which the model calls positive."""
    folder = tmp_path_factory.mktemp("explanations")
    store = open_store(str(folder / "archive"))
    films = [grey_film(number) for number in range(10)]
    for number in range(6):
        store.write(f"{NAME}/{number}.png", encoded(films[number]))
    store.write("x.tar", tar({f"{NAME}-{n}.png": encoded(films[n]) for n in range(6, 10)}))
    store.write("broken.png", b"\x89PNG\r\n\x1a\n")
    model = tiny_model(seed=3)
    scorer = Scorer(model)
    squares = np.stack([Preprocessing(image_size=32).square(film) for film in films])
    p_N = scorer.probabilities(scorer.logits(squares))[:, 1]
    middle = OperatingPoint(float(np.median(p_N)))
    save_model(
        str(folder / "model"), replace(model, spec=replace(model.spec, operating_point=middle))
    )
    (folder / "key").write_text("0123456789abcdef0123456789abcdef")
    return folder


def rows_of(results: str, where: str = "true") -> list[dict]:
    return lungopacity.query(results, f"SELECT * FROM latest WHERE {where}").to_pylist()


def pictures(results: str) -> dict[str, bytes]:
    store = open_store(results)
    return {item.key: store.read(item.key) for item in store.list("explanations/")}


def test_each_positive_film_has_a_picture_that_names_nobody(place, s3_uri, capfd):
    code = main(
        ["screen", "--archive", f"{place}/archive", "--model", f"{place}/model",
         "--output", s3_uri, "--run-id", "night", "--explain", "--hash-keys",
         "--hmac-key", f"{place}/key", "--key-map", f"{place}/map-{time.time_ns()}",
         "--max-failed-fraction", "1"]
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 1, err
    assert "positive  5 at the model's operating point, 5 with a picture" in out
    rows, found = rows_of(s3_uri), pictures(s3_uri)
    assert len(rows) == 11
    for row in rows:
        assert (row["explanation"] is not None) == (row["decision"] == "positive")
    shown = {row["explanation"]: row for row in rows if row["explanation"]}
    assert set(shown) == set(found)
    for key, data in found.items():
        assert key == f"explanations/night/{shown[key]['content_sha256']}.png"
        picture = Image.open(io.BytesIO(data))
        assert max(picture.size) <= 256
        assert not picture.info
        assert np.ptp(np.asarray(picture).astype(int), axis=2).max() > 50, "no colour, no map"
        assert len(data) < 60_000
    assert NAME not in "".join(found)
    assert not clean(s3_uri, older_than_days=0).files
    assert pictures(s3_uri) == found


def test_a_killed_run_goes_on_and_writes_the_same_pictures(place, tmp_path):
    results = str(tmp_path / "results")
    options = {"max_failed_fraction": 1.0, "explain": True}
    job = screening_job(f"{place}/model", results, **options)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, list_archive(f"{place}/archive"), 0.0, run_id="night", before_commit=killed)
    first = pictures(results)
    assert len(first) == 5
    # Half of what was written is lost, and a picture is damaged.
    store = open_store(results)
    for item in store.list("_work/night/attempt="):
        store.delete(item.key)
    store.write(next(iter(first)), b"half a picture")
    with pytest.raises(UserError, match="was started with --explain, not without"):
        lungopacity.screen(f"{place}/archive", f"{place}/model", results, run_id="night")
    run = lungopacity.screen(
        f"{place}/archive", f"{place}/model", results, run_id="night", **options
    )
    assert (run.positive, run.explained) == (5, 5)
    assert pictures(results) == first
    assert {row["explanation"] for row in rows_of(results, "explanation IS NOT NULL")} == set(first)


def test_a_picture_of_what_an_object_was_before_the_run_went_on_is_cleaned_up(place, tmp_path):
    archive, results = open_store(str(tmp_path / "archive")), str(tmp_path / "results")
    for number in range(6):
        archive.write(f"{number}.png", encoded(grey_film(number)))
    job = screening_job(f"{place}/model", results, max_failed_fraction=1.0, explain=True)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, list_archive(archive.uri), 0.0, run_id="night", before_commit=killed)
    drawn = pictures(results)
    for item in open_store(results).list("_work/night/attempt="):
        open_store(results).delete(item.key)
    for number in range(6):
        if hashlib.sha256(archive.read(f"{number}.png")).hexdigest() in next(iter(drawn)):
            archive.write(f"{number}.png", b"withdrawn")
    run = run_job(job, list_archive(archive.uri), 0.0, run_id="night")
    assert (run.failed, run.explained) == (1, len(drawn) - 1)
    assert set(pictures(results)) == set(drawn)
    assert clean(results).files == {"work of published runs": 1}
    assert set(pictures(results)) == {
        row["explanation"] for row in rows_of(results, "explanation IS NOT NULL")
    }


def test_a_retry_explains_as_its_run_did_and_without_the_option_nothing_is_written(place, tmp_path):
    archive = open_store(str(tmp_path / "archive"))
    for number in range(10):
        archive.write(f"{number}.png", encoded(grey_film(number)))
    listed = list_archive(archive.uri)
    tables = list(listed.tables)
    for number in range(10):
        archive.write(f"{number}.png", encoded(grey_film(number), compress_level=1))
    results = str(tmp_path / "results")
    options = {"max_failed_fraction": 1.0, "explain": True}
    job = screening_job(f"{place}/model", results, **options)
    run_job(job, Inventory(listed.uri, iter(tables)), time.monotonic(), run_id="night")
    assert not pictures(results)
    again = lungopacity.retry(results, "night")
    assert (again.positive, again.explained) == (5, 5)
    assert all(key.startswith(f"explanations/{again.run_id}/") for key in pictures(results))
    plain = str(tmp_path / "plain")
    run = lungopacity.screen(archive.uri, f"{place}/model", plain)
    assert (run.positive, run.explained) == (5, 0)
    assert not pictures(plain)
    assert not rows_of(plain, "explanation IS NOT NULL")


def test_pictures_that_cannot_be_written_stop_the_run_with_the_reason(place, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "explanations").write_text("in the way")
    with pytest.raises(UserError, match="explanations: is in the way of"):
        lungopacity.screen(
            f"{place}/archive", f"{place}/model", str(tmp_path / "results"), explain=True
        )
