"""The command line, called as a function."""

from __future__ import annotations

import pytest

from lungopacity.cli import main


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err
