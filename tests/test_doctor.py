"""The report on a machine; what it finds on a sound one is in tests/cli/test_commands.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from lungopacity import doctor


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
