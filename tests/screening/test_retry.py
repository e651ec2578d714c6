"""Retries after later runs, and beside them."""

from __future__ import annotations

import pytest

import lungopacity
from lungopacity.errors import UserError
from lungopacity.results import folder
from lungopacity.results.query import query
from lungopacity.screening import screen
from lungopacity.screening.history import History


def test_what_a_later_run_has_read_is_not_retried_and_stays_the_newest(place, monkeypatch, hidden):
    monkeypatch.setattr(screen, "done_with_ray", lambda: None)
    for options in ({}, hidden):
        key = {"hmac_key": options["hmac_key"]} if options else {}
        place.failing = {"Adams.png": "timeout", "Baker.png": "timeout", "Davis.png": "empty"}
        (run,) = place.night(max_failed_fraction=1.0, **options).runs
        place.failing = {"Baker.png": "timeout"}
        assert place.night(**options).runs[0].ok == 1
        # The storage fails again: the score of before must not give way to a failure.
        place.failing["Adams.png"] = "timeout"
        assert lungopacity.retry(place.results, run.run_id, **key).failed == 1
        del place.failing["Baker.png"]
        assert lungopacity.retry(place.results, run.run_id, **key).ok == 1
        assert lungopacity.retry(place.results, run.run_id, **key) is None
        # Nor must it give way to a failure because the film was removed since.
        place.archive.delete("Adams.png")
        assert lungopacity.retry(place.results, run.run_id, **key) is None
        # But for what was replaced since.
        place.archive.write("Adams.png", b"another film")
        assert lungopacity.retry(place.results, run.run_id, **key).failed == 1


def test_a_retry_is_not_published_over_rows_of_a_night_that_came_between(place, monkeypatch):
    monkeypatch.setattr(screen, "done_with_ray", lambda: None)
    place.failing = {"Adams.png": "timeout", "Baker.png": "timeout"}
    (run,) = place.night(max_failed_fraction=1.0).runs
    pipeline = screen._run_pipeline

    def slowly(job, plan, todo, **options) -> set[str]:
        monkeypatch.setattr(screen, "_run_pipeline", pipeline)
        place.failing = {"Baker.png": "timeout"}
        place.archive.write("Adams.png", b"another film")
        place.night()
        place.failing = {"Adams.png": "changed"}
        return pipeline(job, plan, todo, **options)

    monkeypatch.setattr(screen, "_run_pipeline", slowly)
    with pytest.raises(UserError, match="another run has read 1 object meanwhile"):
        lungopacity.retry(place.results, run.run_id)
    newest = query(place.results, "SELECT status FROM latest WHERE image = 'Adams.png'")
    assert newest["status"].to_pylist() == ["ok"]
    again = lungopacity.retry(place.results, run.run_id)
    assert (again.images, again.ok) == (1, 1)


def test_a_retry_does_not_hide_what_a_night_publishes_while_it_is_checked(place, monkeypatch):
    """Between its last look at the results and its commit record: seconds, where they are large."""
    monkeypatch.setattr(screen, "done_with_ray", lambda: None)
    monkeypatch.setattr(folder, "_CLAIM_S", 0.0)  # here, the one waits in the middle of the other
    place.failing = {"Adams.png": "timeout"}
    (run,) = place.night(max_failed_fraction=1.0).runs
    looks = []
    load = History.load

    def slowly(history, connection) -> None:
        load(history, connection)
        looks.append(connection)
        if len(looks) == 2:
            place.failing = {}
            place.night()

    monkeypatch.setattr(History, "load", slowly)
    assert lungopacity.retry(place.results, run.run_id).failed == 1
    newest = query(place.results, "SELECT status FROM latest WHERE image = 'Adams.png'")
    assert newest["status"].to_pylist() == ["ok"]
