import json
import multiprocessing
import os
import signal
import threading

import pytest

from lungopacity.benchmark.score import score_speeds
from lungopacity.cli import main


def test_whoever_ends_it_waits_for_no_film():
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            score_speeds(["classical-cnn"], repeats=10**6)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not multiprocessing.active_children()


def test_a_network_is_timed_both_ways_and_says_the_same(capfd):
    command = ["benchmark", "score", "--networks", "classical-cnn", "--count", "4"]
    assert main([*command, "--repeats", "2", "--json"]) == 0
    (speed,) = json.loads(capfd.readouterr().out)
    assert (speed["network"], speed["image_size"]) == ("classical-cnn", 160)
    assert 0.1 < speed["torch_ms"] < 1000
    assert 0.1 < speed["compiled_ms"] < 1000
    assert 0 < speed["differs"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--networks", "lenet"], "unknown model 'lenet'"), (["--count", "0"], "--count and")],
)
def test_what_cannot_be_timed_is_said(capfd, arguments, said):
    assert main(["benchmark", "score", *arguments]) == 2
    assert said in capfd.readouterr().err
