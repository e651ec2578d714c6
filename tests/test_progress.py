import logging
import os
import pty
import re
import subprocess
import sys
import time
from types import SimpleNamespace

from lungopacity import progress
from lungopacity.progress import Progress

NESTED = """
from lungopacity.progress import Progress, show_on_terminal
show_on_terminal()
with Progress("Training", total=2) as outer:
    outer.advance(1)
    for _ in range(2):
        with Progress("Films", total=1) as inner:
            inner.advance(1)
    outer.advance(1)
"""
SCRIPT = """
import time
from lungopacity.progress import Progress, show_on_terminal
show_on_terminal()
with Progress("Screening", total=20) as p:
    for _ in range(10):
        p.advance(2, note="3 failed")
        time.sleep(0.02)
"""


def test_without_a_terminal_there_are_plain_lines(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO), Progress("Reading", total=4) as shown:
        shown.advance(1)
        shown.advance(3, note="1 failed")
    assert "Reading: 1 of 4 images" in caplog.messages[0]
    assert "Reading: 4 of 4 images" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("1 failed")


def test_its_time_runs_from_the_start_of_its_block():
    progress = Progress("Training", total=2)
    time.sleep(0.5)
    with progress:
        progress.advance(1)
        assert progress.per_second > 2.5


def test_long_ones_are_told_in_seconds_and_others_in_numbers_a_second(monkeypatch, caplog):
    """However fast they are: the unit stays the same from line to line."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO):
        for unit, seconds in (("epochs", 38.0), ("epochs", 0.5), ("images", 38.0), ("images", 0.5)):
            with Progress("Working", total=40, unit=unit) as shown:
                now[0] += seconds
                shown.advance(2)
    assert [line.split(", ")[1] for line in caplog.messages] == [
        "19 s each", "0.25 s each", "0.053/s", "4/s",
    ]  # fmt: skip


def test_what_was_done_before_counts_but_not_for_the_speed(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO):
        for before in (30, 40):
            shown = Progress("Training", total=40, unit="epochs")
            shown.start_at(before)
            with shown:
                time.sleep(0.1)
                if before < 40:
                    shown.advance(1)
    first, last = caplog.messages
    assert re.fullmatch(r"Training: 31 of 40 epochs, 0\.1\d* s each", first)
    assert last == "Training: 40 of 40 epochs"


def test_lines_do_not_flood_a_log(caplog):
    with caplog.at_level(logging.INFO), Progress("Reading", total=1000) as shown:
        for _ in range(1000):
            shown.advance(1)
    assert len(caplog.messages) == 1


def test_what_does_not_go_on_is_told_with_what_it_waits_for(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_STILL_S", 0.05)
    shown = Progress("Reading", total=4, unit="films", waits_for=lambda: "no film is there")
    with caplog.at_level(logging.INFO), shown:
        while not caplog.messages:
            time.sleep(0.01)
        shown.advance(4)
    first, *_, last = caplog.messages
    assert first == "Reading: 0 of 4 films, no progress for 0 s; no film is there"
    assert last.startswith("Reading: 4 of 4 films, ")
    assert "no progress" not in last


def test_what_has_reached_its_end_is_not_told_to_stand_still(monkeypatch, caplog):
    """A training's count stays while what is computed after its last epoch is shown."""
    monkeypatch.setattr(progress, "_STILL_S", 0.05)
    shown = Progress("Training", total=2, unit="epochs", waits_for=lambda: "nothing is free")
    with caplog.at_level(logging.INFO), shown:
        shown.advance(2)
        time.sleep(0.3)
    assert not [message for message in caplog.messages if "no progress" in message]


def test_what_is_done_at_once_is_told_only_where_it_took_long(monkeypatch, caplog):
    for least in (60.0, 0.0):
        monkeypatch.setattr(progress, "_QUICK_S", least)
        with caplog.at_level(logging.INFO), Progress("Removing", quick=True) as shown:
            shown.advance(1)
    assert [line.split(":")[0] for line in caplog.messages] == ["Removing"]


def test_the_last_line_comes_with_the_last_step(caplog):
    """A training scores and compiles after its last epoch."""
    with caplog.at_level(logging.INFO), Progress("Training", total=2, unit="epochs") as shown:
        shown.advance(1)
        shown.advance(1)
        assert len(caplog.messages) == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Training: 2 of 2 epochs, ")


def test_an_error_ends_it_without_a_closing_line(caplog):
    try:
        with caplog.at_level(logging.INFO), Progress("Reading") as shown:
            shown.advance(1)
            raise RuntimeError
    except RuntimeError:
        pass
    assert caplog.messages == []


def shown_on_a_terminal(script: str, columns: int = 120) -> str:
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    done = subprocess.Popen(
        [sys.executable, "-c", script], stdout=slave, stderr=slave, env=environment
    )
    done.wait(30)
    os.close(slave)
    shown = os.read(master, 1 << 20).decode()
    os.close(master)
    return shown


def test_a_terminal_has_one_live_line():
    shown = shown_on_a_terminal(SCRIPT)
    assert "20/20" in shown
    assert "3 failed" in shown
    assert shown.count("\n") <= 2 + shown.count("\x1b[1A")  # the note is below; each goes up again


def test_a_long_note_leaves_room_for_the_count_and_the_times():
    note = "validation loss 0.6926, accuracy 0.5000, 291 images/s"
    script = SCRIPT.replace("3 failed", note).replace("Screening", "Training")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown_on_a_terminal(script, columns=80))
    assert re.search(r"Training .*20/20 images .*0:00:00 0:00:00", shown)
    assert note in shown


def test_one_inside_another_ends_its_line():
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown_on_a_terminal(NESTED)).split("\n")
    last = [line.rstrip("\r").rpartition("\r")[2] for line in lines if line.strip()]
    assert [re.sub(r"(\w+) .*?(\d/\d).*", r"\1 \2", line) for line in last] == [
        "Training 1/2", "Films 1/1", "Films 1/1", "Training 2/2",
    ]  # fmt: skip
