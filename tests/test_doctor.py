"""The report on a machine; what it finds on a sound one is in tests/cli/test_commands.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from lungopacity import doctor
from lungopacity.runtime import SHORTER_FOLDER


def test_doctor_goes_on_where_a_check_fails_without_a_word(monkeypatch):
    def _python():
        raise AssertionError

    monkeypatch.setattr(doctor, "_python", _python)
    for other in ("torch", "ncnn", "libraries", "ray", "decoders", "s3"):
        monkeypatch.setattr(doctor, f"_{other}", lambda: iter(()))
    failed, *rest = doctor.diagnose()
    assert (failed.state, failed.what) == ("missing", "python")
    assert failed.detail == "cannot be used: AssertionError"
    assert rest[0].what == "temporary files"


def test_the_oldest_torch_is_that_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    needs = " ".join(project["project"]["dependencies"])
    (oldest,) = re.findall(r"\btorch>=([\d.]+)", needs)
    assert tuple(map(int, oldest.split("."))) == doctor.MIN_TORCH


def test_a_place_for_results_is_not_made_and_a_slip_in_its_name_is_seen(tmp_path):
    (new,) = doctor.diagnose_places(results=str(tmp_path / "a" / "typo"))
    assert new.detail.endswith("typo can be written to, and is empty")
    assert not list(tmp_path.iterdir())
    (tmp_path / "film.png").touch()
    (there,) = doctor.diagnose_places(results=str(tmp_path))
    assert there == doctor.Finding("ok", "results", f"{tmp_path} can be written to")
    assert [path.name for path in tmp_path.iterdir()] == ["film.png"]


def test_a_folder_that_is_too_long_for_the_sockets_of_ray_is_seen(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "x" * 39)
    (found,) = doctor._ray()
    assert (found.state, found.fix) == ("missing", SHORTER_FOLDER)
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 38 + "/")
    (found,) = doctor._ray()
    assert found.state == "ok"
