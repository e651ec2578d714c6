"""cluster/local.sh where Ray does not start; tests/integration tests it where Ray does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "local.sh"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("echo no port is free; exit 1", "the head did not start:\nno port is free\n"),
        ("echo starting; exec sleep 50", "the head gave no answer in 60 tries:\nstarting\n"),
    ],
)
def test_a_head_that_does_not_answer_is_told_as_such(tmp_path, head, said):
    # Away from the repository's own .venv, so that these two are used: a `ray` that does not start,
    # and a `sleep` that does not wait.
    local = tmp_path / "cluster" / "local.sh"
    local.parent.mkdir()
    shutil.copy(SCRIPT, local)
    sleep = shutil.which("sleep")
    for name, body in {
        "ray": f"[[ $1 == start ]] || exit 1\n{head}".replace("exec sleep", f"exec {sleep}"),
        "sleep": f"exec {sleep} 0.01",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [local, "true"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, said)
