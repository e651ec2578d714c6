from __future__ import annotations

import pytest

from lungopacity.words import counted, printable


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 GPUs"), (1, "1 GPU"), (1.0, "1 GPU"), (0.5, "0.5 GPUs"), (10**6, "1000000 GPUs")],
)
def test_one_is_no_plural(number, words):
    assert counted(number, "GPU") == words


def test_what_a_terminal_obeys_is_written_out_and_all_else_is_left():
    assert printable("häß 肺.png") == "häß 肺.png"
    assert printable("a\n\r\x1b[2K\u202e\x9b\udc80") == r"a\n\r\x1b[2K\u202e\x9b\udc80"
