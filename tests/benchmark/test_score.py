import json
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from lungopacity.benchmark.forward import ForwardSpeed, table
from lungopacity.benchmark.score import _measured, score_speeds
from lungopacity.cli import main
from lungopacity.models.scorer import Scorer


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
    command += ["--repeats", "2", "--no-gpu", "--batch-sizes", "4,1"]
    assert main([*command, "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    (speed,) = found["one_core"]
    assert (speed["network"], speed["image_size"]) == ("classical-cnn", 160)
    assert 0.1 < speed["torch_ms"] < 1000
    assert 0.1 < speed["compiled_ms"] < 1000
    assert 0 < speed["differs"] < 1e-4
    by_batch = [(row["precision"], row["batch_size"]) for row in found["forward"]]
    assert by_batch == [("float32", 1), ("float32", 4), ("bfloat16", 1), ("bfloat16", 4)]
    assert all(row["images_per_s"] > 1 for row in found["forward"])
    best = max(row["images_per_s"] for row in found["forward"])
    assert f" classical-cnn: {best:.1f} images/s at best\n" in err
    assert found["notes"] == ["on a GPU: skipped: --no-gpu"]


def test_the_best_batch_has_a_star():
    rates = (100.0, 300.0, None)
    speeds = [ForwardSpeed("x", "GPU", "float32", n, rate) for n, rate in enumerate(rates)]
    starred = [line.split()[3:-1] for line in table(speeds).splitlines()[1:]]
    assert starred == [["100.0"], ["300.0", "*"], ["no", "memory"]]


def test_as_many_films_as_asked_for_go_in_one_batch(monkeypatch):
    seen = set()

    def logits(self, pixels_NHW, batch_size=64):
        seen.add((len(pixels_NHW), batch_size))
        return np.zeros((len(pixels_NHW), 2), np.float32)

    monkeypatch.setattr(Scorer, "logits", logits)
    _measured("classical-cnn", films=70, repeats=1)
    assert seen == {(70, 70)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--networks", "lenet"], "unknown model 'lenet'"), (["--count", "0"], "--count and")],
)
def test_what_cannot_be_timed_is_said(capfd, arguments, said):
    assert main(["benchmark", "score", *arguments]) == 2
    assert said in capfd.readouterr().err
