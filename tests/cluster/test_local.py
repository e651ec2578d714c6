"""cluster/local.sh where Ray does not start; tests/integration tests it where Ray does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "local.sh"


def copied(folder: Path) -> Path:
    """The script in `folder`, away from the repository's own .venv: it uses what `put` puts there,
    such as a `ray` that does not start and a `sleep` that does not wait."""
    local = folder / "cluster" / "local.sh"
    local.parent.mkdir()
    shutil.copy(SCRIPT, local)
    return local


def put(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def surroundings(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    }


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("echo no port is free; exit 1", "the head did not start:\nno port is free\n"),
        ("echo starting; exec sleep 50", "the head gave no answer in 60 tries:\nstarting\n"),
    ],
)
def test_a_head_that_does_not_answer_is_told_as_such(tmp_path, head, said):
    local = copied(tmp_path)
    sleep = shutil.which("sleep")
    put(
        tmp_path,
        "ray",
        f"[[ $1 == start ]] || exit 1\n{head}".replace("exec sleep", f"exec {sleep}"),
    )
    put(tmp_path, "sleep", f"exec {sleep} 0.01")
    environment = surroundings(tmp_path)
    done = subprocess.run(
        [local, "true"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_the_nodes_at_once(tmp_path, number, code):
    local = copied(tmp_path)
    # Both nodes have begun before the command does, as real ones have.
    began = f"touch {tmp_path}/began$2; exec sleep 50"
    put(tmp_path, "ray", f"[[ $1 == start ]] && {{ {began}; }}\n[[ -e {tmp_path}/began--head ]]")
    join = f"until [[ -e $(echo {tmp_path}/began--address=*) ]]; do sleep 0.1; done"
    put(tmp_path, "python", f'[[ $1 == - ]] || exec {sys.executable} "$@"\n{join}')
    environment = surroundings(tmp_path)
    with subprocess.Popen(
        [local, "sleep", "50"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Bash cannot heed what it was told to ignore, as a shell tells its background processes.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as script:
        assert script.stderr is not None
        assert "a Ray cluster of two nodes" in script.stderr.readline()
        script.send_signal(number)
        began = time.monotonic()
        # This pipe ends when the last process that holds it has ended.
        assert script.stderr.read() == ""
        assert script.wait(20) == code
    assert time.monotonic() - began < 20
