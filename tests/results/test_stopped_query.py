"""Ctrl-C while DuckDB computes."""

from __future__ import annotations

import pytest

from lungopacity.results.workbench import temporary_folder


def test_a_query_that_is_told_to_end_is_no_defect():
    # DuckDB 2 replaces what a signal handler raised by this. When it looks depends on which of its
    # threads computes, so a real query cannot be relied on here.
    with pytest.raises(KeyboardInterrupt), temporary_folder():
        raise RuntimeError("Query interrupted")
