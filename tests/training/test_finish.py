"""What a trained network is given besides its weights; test_fit.py sees it in a model folder."""

from __future__ import annotations

import pytest

from lungopacity.training.finish import warn_of_few_to_compare


def test_few_validation_films_to_tell_unlike_ones_by_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_few_to_compare(100)
    assert not caplog.text
    warn_of_few_to_compare(20)
    assert "1 in 20 films like them, or more, will be flagged out_of_distribution" in caplog.text
