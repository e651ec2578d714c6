"""`make demo` where it cannot work: one line that says why and what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        # More than any disk has free.
        ("demo.ROOM_BYTES = 1 << 60", r"error: \.work/demo: \d+ MiB are free .* make room\n"),
        ("demo.FOLDER = demo.Path('file/demo')", r"error: .* Not a directory: 'file/demo'\n"),
    ],
)
def test_a_place_that_will_not_do_is_told_before_anything_starts(tmp_path: Path, changed, said):
    (tmp_path / "file").touch()
    script = f"import sys; from cluster import demo; {changed}; sys.exit(demo.main())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(said, done.stderr)
