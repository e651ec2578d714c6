"""A private Ray waits for no agent that it does not need, and has the other when it calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lungopacity.runtime import waiting_agent

_PRIVATE_RAY = """
import json, os, psutil
from lungopacity.runtime import quiet_ray_data, ray_session

def agents():
    commands = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    names = [os.path.basename(part) for command in commands for part in command]
    return sorted(name for name in names if name == "waiting_agent.py" or name.endswith("Agent"))

def greeting():
    return os.environ.get("GREETING")

with ray_session():
    import ray

    quiet_ray_data()
    rows = ray.data.from_items([1, 2]).map(lambda row: row).count()
    before = rows, len(ray._private.state.actors()), agents()
    greet = ray.remote(greeting).options(runtime_env={"env_vars": {"GREETING": "hello"}})
    after = ray.get(greet.remote()), agents()
print(json.dumps([before, after, agents()]))
"""


def test_a_ray_of_our_own_starts_nothing_before_it_is_asked_for():
    """No actor of Ray Data's that would take a reader's process, and no agent, until a task has an
    environment of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PRIVATE_RAY],
        env={**os.environ, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, left = json.loads(done.stdout.splitlines()[-1])
    assert before == [2, 0, ["waiting_agent.py", "waiting_agent.py"]]
    assert after == ["hello", ["ray::RuntimeEnvAgent", "waiting_agent.py"]]
    assert left == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ([], dict.fromkeys(waiting_agent._UNUSED_PORTS, -1)),
        (["never", "--node-ip-address=127.0.0.1"], {waiting_agent._CALLED_PORT: None}),
    ],
)
def test_it_ends_when_its_raylet_is_killed(tmp_path: Path, command, told):
    agent = [sys.executable, "-I", "-S", waiting_agent.__file__, str(tmp_path), *command]
    raylet = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({agent!r})"],
        env={**os.environ, "RAY_NODE_ID": "abc"},
    )
    files = {name: tmp_path / f"{name}_abc" for name in told}
    try:
        until = time.monotonic() + 20
        while not all(file.exists() for file in files.values()) and time.monotonic() < until:
            time.sleep(0.02)
        (waiting,) = psutil.Process(raylet.pid).children()
        ports = {name: int(file.read_text()) for name, file in files.items()}
        assert all(ports[name] == -1 if told[name] else ports[name] > 0 for name in told)
    finally:
        raylet.send_signal(signal.SIGKILL)
        raylet.wait()
    _, alive = psutil.wait_procs([waiting], timeout=20)
    assert not alive
