"""Files that kill their decoder, in a real job: they cost their own rows, and the night goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lungopacity.results.query import query
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
POISON = encoded(grey_film()) + b"POISON"

# Loaded by every Python of the job: one codec dies of one file, as C libraries do.
CODEC = """
import ctypes, imagecodecs
whole = imagecodecs.png_decode
def png_decode(data, *args, **kwargs):
    if b"POISON" in data:
        ctypes.string_at(0)
    return whole(data, *args, **kwargs)
imagecodecs.png_decode = png_decode
"""


def test_poison_costs_its_own_rows_and_the_night_goes_on(tmp_path):
    store = open_store(str(tmp_path / "archive"))
    for number in range(300):
        store.write(
            f"{number:03d}.png", POISON if number in (7, 150, 151) else encoded(grey_film())
        )
    members = {f"{n}.png": POISON if n == 20 else encoded(grey_film()) for n in range(40)}
    store.write("x.tar", tar(members))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(CODEC)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lungopacity.cli", "screen", "--archive", store.uri),
            *("--model", str(tmp_path / "model"), "--output", str(tmp_path / "results")),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "decoder_crash: 4" in done.stdout
    rows = query(
        str(tmp_path / "results"),
        "SELECT coalesce(image || '/' || member, image) name, status, error_code FROM predictions",
    ).to_pylist()
    assert len(rows) == 340
    assert len({row["name"] for row in rows}) == 340
    broken = {row["name"]: row["error_code"] for row in rows if row["status"] != "ok"}
    assert broken == dict.fromkeys(
        ["007.png", "150.png", "151.png", "x.tar/20.png"], "decoder_crash"
    )
