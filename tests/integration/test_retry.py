"""What failed for a reason that may have passed is screened again; nothing else is."""

from __future__ import annotations

import sys
import time

import pytest
import torch

import lungopacity
from lungopacity.archive.inventory import Inventory, list_archive
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.screening.job import screening_job
from lungopacity.screening.screen import run_job
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def place(tmp_path):
    store = open_store(str(tmp_path / "archive"))
    for number in range(6):
        store.write(f"{number}.png", encoded(grey_film(number)))
    store.write("broken.png", b"\x89PNG\r\n\x1a\n")
    store.write("x.tar", tar({f"{n}.png": encoded(grey_film(10 + n)) for n in range(4)}))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef")
    return tmp_path


def restless_night(place, **options):
    """A night on which two films and the shard were replaced, and one film removed, after the
    listing."""
    archive = open_store(str(place / "archive"))
    inventory = list_archive(archive.uri)
    tables = list(inventory.tables)
    for name in ("1.png", "2.png"):
        archive.write(name, encoded(grey_film(20)))
    archive.delete("3.png")
    archive.write("x.tar", tar({f"{n}.png": encoded(grey_film(30 + n)) for n in range(5)}))
    job = screening_job(
        str(place / "model"), str(place / "results"), max_failed_fraction=1.0, **options
    )
    return run_job(job, Inventory(inventory.uri, iter(tables)), time.monotonic(), run_id="night")


def asked(place, sql: str) -> list[dict]:
    return lungopacity.query(str(place / "results"), sql).to_pylist()


def test_only_what_may_have_passed_is_tried_again(place, capfd):
    night = restless_night(place)
    assert (night.ok, night.failed) == (3, 5)  # changed: 1, 2, x.tar; missing: 3; corrupt: broken
    open_store(str(place / "archive")).write("3.png", encoded(grey_film(3)))
    code = main(["retry", "--results", str(place / "results"), "--run-id", "night"])
    out, err = capfd.readouterr()
    assert code == 1, err
    assert "8 scored, 0 rejected, 0 could not be read" in out
    assert "not tried again, because nothing would change: corrupt_image: 1" in out
    (again,) = asked(place, "SELECT run_id, record FROM runs WHERE run_id <> 'night'")
    assert '"retry_of": "night"' in again["record"]
    rows = asked(
        place,
        "SELECT image, count(*) n, any_value(status) status FROM latest GROUP BY 1 ORDER BY 1",
    )
    assert {row["image"]: (row["n"], row["status"]) for row in rows} == {
        **{f"{number}.png": (1, "ok") for number in range(6)},
        "broken.png": (1, "failed"),
        "x.tar": (5, "ok"),
    }
    # The run itself stays as it was.
    assert asked(place, "SELECT count(*) n FROM predictions WHERE run_id = 'night'") == [{"n": 8}]
    code = main(["retry", "--results", str(place / "results"), "--run-id", again["run_id"]])
    assert code == 0
    assert "nothing to do again" in capfd.readouterr().out


def test_an_object_that_is_gone_by_now_keeps_a_row(place):
    restless_night(place)
    open_store(str(place / "archive")).delete("2.png")
    result = lungopacity.retry(str(place / "results"), "night")
    assert (result.ok, result.failed) == (6, 2)
    assert asked(place, "SELECT image FROM latest WHERE error_code = 'missing' ORDER BY image") == [
        {"image": "2.png"}, {"image": "3.png"},
    ]  # fmt: skip


def test_hashed_names_are_found_again_with_the_same_key_alone(place):
    restless_night(place, hmac_key=str(place / "key"), hash_keys=True)
    (place / "other").write_text("another key of thirty-two letters")
    with pytest.raises(UserError, match="made with another key"):
        lungopacity.retry(str(place / "results"), "night", hmac_key=str(place / "other"))
    with pytest.raises(UserError, match="--hash-keys needs --hmac-key"):
        lungopacity.retry(str(place / "results"), "night")
    result = lungopacity.retry(str(place / "results"), "night", hmac_key=str(place / "key"))
    assert (result.ok, result.failed) == (7, 1)
    assert asked(place, "SELECT count(*) n FROM latest WHERE image LIKE '%png%'") == [{"n": 0}]


def test_what_cannot_be_retried_is_said_so(place):
    with pytest.raises(UserError, match="there is no published run 'never'"):
        lungopacity.retry(str(place / "results"), "never")
    restless_night(place)
    write_tiny_model(str(place / "other"), seed=5)
    with pytest.raises(UserError, match="but the run used"):
        lungopacity.retry(str(place / "results"), "night", model=str(place / "other"))
    with pytest.raises(UserError, match="without a key"):
        lungopacity.retry(str(place / "results"), "night", hmac_key=str(place / "key"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_run_in_bfloat16_is_retried_without_a_gpu_in_float32(place, monkeypatch):
    results = open_store(str(place / "results"))
    restless_night(place)
    record = results.read("runs/night.json")
    results.write("runs/night.json", record.replace(b'"float32"', b'"bfloat16"'))
    with pytest.raises(UserError, match="bfloat16 needs a GPU; use one, or give --precision float"):
        lungopacity.retry(results.uri, "night")
    assert not list(results.list("_work/"))  # no plan is left behind
    # `lungopacity.screening.retry` is the function by now.
    module = sys.modules["lungopacity.screening.retry"]
    monkeypatch.setattr(module, "run_job", lambda job, *_, **__: job)
    job = lungopacity.retry(results.uri, "night", precision="float32", model_actors=3)
    assert (job.precision, job.model_actors) == ("float32", 3)
