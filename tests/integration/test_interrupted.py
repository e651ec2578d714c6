"""Ctrl-C and a scheduler's SIGTERM while Ray is still starting, and in the middle of training: the
exit code tells, nothing is left, nothing published, and the run goes on from there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest

import lungopacity
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.storage import open_store
from tests.films import encoded, grey_film
from tests.models.tiny import write_tiny_model

_FILMS = 30
_GUARDED = """
import builtins, sys, threading
from lungopacity.runtime.session import RAY
from lungopacity.cli import main

imported = builtins.__import__

def guarded(name, *arguments, **more):
    is_starting = RAY._ahead is not None and not RAY._ahead[1].done()
    if is_starting and threading.current_thread() is threading.main_thread():
        assert name.partition(".")[0] != "ray", "two threads import Ray, and see half of it"
    return imported(name, *arguments, **more)

builtins.__import__ = guarded
sys.exit(main(sys.argv[1:]))
"""
_TOLD_AT_ONCE = """
import sys
from lungopacity import progress
from lungopacity.cli import main

progress._LINE_EVERY_S = 0.0
sys.exit(main(sys.argv[1:]))
"""
"""Tells of the first epoch at once, instead of after ten seconds of training."""
_PATIENCE_S = 120.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_as_it_starts(tmp_path, number, code) -> None:
    archive, model, results = (str(tmp_path / name) for name in ("archive", "model", "results"))
    store = open_store(archive)
    for film in range(_FILMS):
        store.write(f"{film}.png", encoded(grey_film(film, 100, 100)))
    write_tiny_model(model, is_compiled=True)
    arguments = ["screen", "--archive", archive, "--model", model, "--output", results]
    # Planned, while Ray comes up beside it; the first film is seconds away.
    said = _stopped(arguments, f"{_FILMS} objects of", number, code)
    assert ("stopped\n" in said) == (number == signal.SIGINT)
    assert not [item.key for item in open_store(results).list("runs/")]

    if number == signal.SIGTERM:
        return  # what follows is the same, and tried once
    (run_id,) = set(re.findall(r"run (\S+):", said))
    again = [sys.executable, "-c", _GUARDED, *arguments, "--run-id", run_id]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = lungopacity.query(results, "SELECT count(*), count(DISTINCT image) FROM predictions")
    assert [column[0].as_py() for column in rows.columns] == [_FILMS, _FILMS]


def test_a_training_that_is_stopped_in_an_epoch(tmp_path) -> None:
    store = open_store(str(tmp_path / "films"))
    write_phantom_archive(store, PhantomSettings(images=40, image_size=96))
    model = tmp_path / "model"
    places = ["--images", store.uri, "--labels", f"{store.uri}/labels.csv", "--output", str(model)]
    size = ["--epochs", "100000", "--image-size", "32", "--set", "batch_size=8"]
    _stopped(["train", *places, *size], " of 100000 epochs", signal.SIGTERM, 143)
    assert not list(model.glob("_lock/*")), "the next training would wait for it"


def _stopped(arguments: list[str], moment: str, number: int, code: int) -> str:
    """What a command said that was sent a signal when it had said a line with `moment`."""
    mark = uuid.uuid4().hex
    started = subprocess.Popen(
        [sys.executable, "-c", _TOLD_AT_ONCE, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MARK": mark},
        # A shell in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert started.stderr is not None
    said = []
    for line in started.stderr:
        said.append(line)
        if moment in line:
            break
    started.send_signal(number)
    said += started.stderr
    assert started.wait(_PATIENCE_S) == code, "".join(said)
    assert "Traceback" not in "".join(said)
    until = time.monotonic() + _PATIENCE_S
    while left := _marked(mark):
        assert time.monotonic() < until, left
        time.sleep(0.2)
    return "".join(said)


def _marked(mark: str) -> list[str]:
    """The processes that the run started, by what it handed down to them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(" ".join(process.cmdline())[:100])
        except psutil.Error:
            continue
    return found
