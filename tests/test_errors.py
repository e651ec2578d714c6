"""An error in one line."""

from __future__ import annotations

import pytest

from lungopacity.errors import first_line, last_line


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_error_without_a_text_is_its_type(text):
    error = ConnectionError(text)
    assert first_line(error) == last_line(error) == "ConnectionError"
    assert first_line(error, with_type=True) == "ConnectionError"


def test_of_a_longer_text_a_line_is_taken_with_the_type_where_it_is_wanted():
    error = RuntimeError("\nno GPU\nTraceback …\nCUDA error 3\n")
    assert (first_line(error), last_line(error)) == ("no GPU", "CUDA error 3")
    assert last_line(error, with_type=True) == "RuntimeError: CUDA error 3"
