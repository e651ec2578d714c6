"""A job whose Ray cluster has lost its head ends by itself, and says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import logging, socket, sys, time
from lungopacity.runtime import head_watch

logging.basicConfig(format="%(message)s")
head_watch._LOOK_S, head_watch._EARLIER_S, head_watch._LAST_WORDS_S = 0.1, 59.0, 0.5
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
watch = head_watch.HeadWatch(f"127.0.0.1:{port}")
BEFORE
watch.start()
time.sleep(0.5)
server.close()
AFTER
time.sleep(3)
print("lived")
"""


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ("", "", 2),
        ("", "time.sleep(0.5); server = socket.create_server(('127.0.0.1', port))", 0),
        ("", "watch.stop()", 0),
        ("server.close()", "", 0),
    ],
    ids=["gone", "restarted", "no longer needed", "never to be reached from here"],
)
def test_a_head_that_does_not_answer_for_long_ends_the_process(before, after, code):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.replace("BEFORE", before).replace("AFTER", after)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ("" if code else "lived\n")
    said = "has not answered for 1 s; start the cluster again, and resume the job"
    assert (said in done.stderr) == bool(code)


@pytest.mark.parametrize("after", ["", "time.sleep(60)"], ids=["told", "cannot be told"])
def test_the_block_is_told_why_before_the_end(after):
    before = f"""
def tell(why):
    print(why.partition(",")[0], flush=True)
    {after}

telling = head_watch.if_head_is_lost(tell)
telling.__enter__()
"""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.replace("BEFORE", before).replace("AFTER", "")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (2, "the head of the Ray cluster\n")
