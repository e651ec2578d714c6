from __future__ import annotations

import pytest

from lungopacity.words import counted


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 GPUs"), (1, "1 GPU"), (1.0, "1 GPU"), (0.5, "0.5 GPUs"), (10**6, "1000000 GPUs")],
)
def test_one_is_no_plural(number, words):
    assert counted(number, "GPU") == words
