import os
import signal
import threading
import time

import psutil
import pytest

from lungopacity.benchmark import watched
from lungopacity.benchmark.watched import FailedError, run_watched

_FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(sys.argv[1], "w") as file:
    file.write(str(child.pid))
time.sleep(60)
"""


def test_who_is_told_to_end_ends_what_is_measured(tmp_path, monkeypatch):
    told = tmp_path / "pid"
    monkeypatch.setattr(watched, "_GRACE_S", 0.1)

    def end(_number, _frame):
        raise SystemExit(143)

    def tell():
        while not told.exists() or not told.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, end)
    threading.Thread(target=tell, daemon=True).start()
    try:
        with pytest.raises(SystemExit):
            run_watched(["-c", _FAMILY, str(told)], os.environ, 60, tmp_path / "stderr")
    finally:
        signal.signal(signal.SIGUSR1, before)
    child = int(told.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_a_gpu_that_does_not_tell_fails_nothing(monkeypatch, caplog):
    import torch

    class NotSupportedError(Exception):
        """As of NVML, for a part of a GPU."""

    def utilization(_gpu: int) -> int:
        raise NotSupportedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert watched.gpu_busy() is None
    assert not caplog.text

    def not_installed(_gpu: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", not_installed)
    assert watched.gpu_busy() is watched.gpu_busy() is None
    assert caplog.text.count("how busy the GPUs are; pip install nvidia-ml-py") == 1


def test_what_a_process_took_is_told_and_why_it_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "_SAMPLE_S", 0.05)
    monkeypatch.setattr(watched, "gpu_busy", lambda: 0.5)
    command = ["-c", "import time; print('done'); time.sleep(0.5); raise SystemExit('no room')"]
    with pytest.raises(FailedError, match="no room"):
        run_watched(command, os.environ, 60, tmp_path / "stderr")
    printed, taken = run_watched(command, os.environ, 60, tmp_path / "stderr", good=(1,))
    assert printed == "done\n"
    assert taken.seconds > 0.5
    assert taken.memory_mib > 1
    assert set(taken.gpu) == {0.5}


def test_what_does_not_end_in_time_is_told_with_its_last_words(tmp_path):
    command = [
        "-c",
        "import sys, time; print('5 of 9', file=sys.stderr, flush=True); time.sleep(9)",
    ]
    with pytest.raises(FailedError, match=r"^did not end in 0\.5 s \(it said: 5 of 9\)$"):
        run_watched(command, os.environ, 0.5, tmp_path / "stderr")
