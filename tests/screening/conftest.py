"""Fixtures for tests of screening in which the scores do not matter."""

from __future__ import annotations

import pytest

from lungopacity.screening import screen
from tests.screening.nights import Place


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    place = Place(tmp_path)

    def run(_job, plan, todo, **_) -> set[str]:
        place.write_parts(plan, todo)
        return {"cpu"}

    monkeypatch.setattr(screen, "_run_pipeline", run)
    return place


@pytest.fixture
def hidden(tmp_path) -> dict:
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef")
    return {"hmac_key": str(tmp_path / "key"), "hash_keys": True}
