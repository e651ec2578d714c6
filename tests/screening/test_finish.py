"""What follows from the counts of a run."""

from __future__ import annotations

import pytest

from lungopacity.screening.finish import ScreeningResult


@pytest.mark.parametrize(
    ("images", "ok", "failed", "of_before", "failed_again", "exit_code"),
    [
        (0, 0, 0, 0, 0, 0),
        (100, 100, 0, 0, 0, 0),
        (100, 95, 5, 0, 0, 1),
        (100, 94, 6, 0, 0, 2),
        (100, 0, 0, 0, 0, 1),  # all rejected
        (100, 0, 100, 100, 100, 1),  # a quiet night
        (101, 1, 100, 100, 100, 1),
        (101, 0, 101, 100, 100, 2),  # the one new film
        (200, 96, 104, 100, 100, 1),
        (200, 94, 106, 100, 100, 2),
        (100, 100, 0, 100, 0, 0),  # what failed before has been read
        (100, 0, 0, 100, 0, 1),  # or was rejected
    ],
)
def test_old_failures_make_no_night_broken_and_hide_no_new_failure(
    images: int, ok: int, failed: int, of_before: int, failed_again: int, exit_code: int
) -> None:
    result = ScreeningResult(
        run_id="run",
        model_id="model",
        results="results",
        images=images,
        ok=ok,
        rejected=images - ok - failed,
        failed=failed,
        repeated=of_before,
        failed_again=failed_again,
        positive=0,
        review=0,
        explained=0,
        synthetic=False,
        seconds=1.0,
        metrics=[],
        max_failed_fraction=0.05,
    )
    assert result.exit_code == exit_code
    assert result.broken is (exit_code == 2)
