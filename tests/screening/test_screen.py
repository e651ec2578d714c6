"""What becomes of a run whose pipeline does not finish, without Ray."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

import lungopacity
from lungopacity.archive.decoder import DecoderStartError
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.results.query import runs
from lungopacity.screening import screen


def test_objects_that_are_lost_are_read_again_and_then_told(place, monkeypatch, caplog):
    monkeypatch.setattr(screen, "_run_pipeline", lambda *_: None)
    with pytest.raises(UserError, match="4 of 4 objects have no result after 3 rounds; nothing"):
        place.night()
    assert caplog.text.count("4 objects were lost on the way and are read again") == 2
    assert not list(place.store.list("runs/"))


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)])
def test_a_run_that_is_stopped_says_how_to_go_on(place, monkeypatch, caplog, capfd, end):
    def stopped(*_):
        raise end

    place.failing["Adams.png"] = "timeout"
    place.night(max_failed_fraction=1.0)
    (done,) = runs(place.results)["run_id"].to_pylist()
    monkeypatch.setattr(screen, "_run_pipeline", stopped)
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    with pytest.raises(type(end)):
        lungopacity.screen(place.archive.uri, place.model, place.results, run_id="mine")
    assert "stopped; go on with --run-id mine and the same options" in caplog.text
    # Not by the night, which goes on by itself, nor where --run-id means another run.
    with pytest.raises(type(end)):
        place.night()
    with pytest.raises(type(end)):
        lungopacity.retry(place.results, done)
    assert "stopped; the next night goes on with run 2" in caplog.text
    assert "stopped; the same command begins anew" in caplog.text
    assert main(["runs", "--results", place.results, "--unfinished"]) == 0
    _, _, *begun = capfd.readouterr().out.splitlines()
    assert [line.split()[0] == "mine" for line in begun] == [True, False, False]


def test_a_lost_node_is_survived_and_an_error_of_ours_is_not(caplog):
    from ray.exceptions import NodeDiedError, RaySystemError, RayTaskError

    with screen._surviving_lost_nodes():
        raise NodeDiedError("gone")
    assert "Ray lost what it was working on (NodeDiedError)" in caplog.text
    no_decoder = RaySystemError(DecoderStartError("the decoder's process does not start"))
    with screen._surviving_lost_nodes():
        raise RayTaskError("f", "a traceback", no_decoder)
    assert "the decoder's process does not start" in caplog.text
    for error in (RayTaskError("f", "a traceback", ValueError()), ValueError()):
        with pytest.raises(type(error)), screen._surviving_lost_nodes():
            raise error


def test_a_run_that_goes_on_says_that_it_keeps_its_objects(place, caplog, monkeypatch):
    monkeypatch.setattr(screen, "ray_ahead", nullcontext)
    place.killed()
    result = lungopacity.screen(
        place.archive.uri, place.model, place.results, run_id="killed", limit=2
    )
    assert result.images == 4
    assert "--limit and --inventory change nothing" in caplog.text
