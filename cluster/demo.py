#!/usr/bin/env python3
"""The main job from end to end, on this machine alone: `make demo`.

A real S3 server on loopback with an archive of synthetic films, training on two Ray Train workers,
evaluation, screening by Ray Data, and SQL. It stops everything that it started, also after Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from cluster.local_s3 import LocalS3
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.cli import main as lungopacity
from lungopacity.errors import NOTICE, UserError
from lungopacity.progress import Progress, show_on_terminal
from lungopacity.runtime import ray_session
from lungopacity.storage import open_store

FOLDER = Path(".work/demo")
BUCKET = "demo"
PHANTOMS = f"s3://{BUCKET}/phantom"
FILMS = 800
ROOM_BYTES = 200 << 20
"""More than what the demo writes to disk."""

QUERIES = {
    "How many films of each kind were read, and how many were found positive?": """
        SELECT format, count(*) AS films, count(*) FILTER (status = 'ok') AS scored,
               count(*) FILTER (decision = 'positive') AS positive
        FROM predictions GROUP BY format ORDER BY format""",
    "Which films should someone look at first?": """
        SELECT coalesce(member, image) AS film, round(p_Lung_Opacity, 3) AS score, label, synthetic
        FROM predictions WHERE status = 'ok' ORDER BY p_Lung_Opacity DESC LIMIT 5""",
    "How well does the model separate the classes, by view? (on films it did not see)": """
        SELECT "group", round(value, 3) AS roc_auc, round(ci_low, 3) AS ci_low,
               round(ci_high, 3) AS ci_high, n, synthetic
        FROM metrics WHERE metric = 'roc_auc' AND class = 'Lung_Opacity'
          AND ("group" = 'all' OR "group" LIKE 'view_position=%') ORDER BY "group" """,
}


def command(*arguments: str) -> None:
    """Show one lungopacity command as a user would type it, and run it. Raises `SystemExit` if it
    fails."""
    print(f"\n$ lungopacity {shlex.join(arguments)}", flush=True)
    code = lungopacity(arguments)
    sys.stdout.flush()
    if code not in (0, 1):
        raise SystemExit(code)


def main() -> int:
    """Run the demo, and return its exit code."""
    try:
        demonstrate()
    except KeyboardInterrupt:
        print("stopped, together with the S3 server and Ray", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UserError, OSError, RuntimeError) as error:
        # The S3 server raises RuntimeError, with the end of its log.
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def demonstrate() -> None:
    """Train, evaluate, screen and query; leave model, report and results in `.work/demo`."""
    began = time.monotonic()
    # SIGTERM must leave the `with` blocks properly, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # Stay on this machine, even where RAY_ADDRESS names a cluster.
    os.environ.pop("RAY_ADDRESS", None)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    free_bytes = shutil.disk_usage(FOLDER).free
    if free_bytes < ROOM_BYTES:
        raise UserError(
            f"{FOLDER}: {free_bytes >> 20} MiB are free there, and {ROOM_BYTES >> 20} are needed; "
            "make room"
        )
    print(f"lungopacity demo on synthetic films. {NOTICE}")
    print(f"starting an S3 server on loopback, data in {FOLDER}/s3 …", flush=True)
    with LocalS3(FOLDER / "s3") as server, server.as_environment():
        server.create_bucket(BUCKET)
        show_on_terminal()
        settings = PhantomSettings(images=FILMS)
        with Progress("Drawing synthetic films", total=settings.images) as progress:
            write_phantom_archive(open_store(PHANTOMS), settings, progress.advance)
        print(f"{settings.images} synthetic films, loose and in tar shards, in {PHANTOMS}/archive")
        with ray_session():
            run_commands()
    print(
        f"""
Done in {time.monotonic() - began:.0f} s; the S3 server and Ray are stopped. All data is synthetic.
  model     {FOLDER}/model      model.json: the network, its settings and its metrics
  report    {FOLDER}/report     metrics.parquet, table1.txt, and five figures
  results   {FOLDER}/results    predictions/, metrics/ and runs/ as Parquet and JSON
Next:
  .venv/bin/lungopacity query --results {FOLDER}/results "SELECT * FROM metrics LIMIT 20"
  .venv/bin/lungopacity train --help     to use your own films, see the README
{NOTICE}"""
    )


def run_commands() -> None:
    """Run the commands train, evaluate, screen and query."""
    archive, labels = f"{PHANTOMS}/archive", f"{PHANTOMS}/labels.csv"
    model, report, results = (str(FOLDER / name) for name in ("model", "report", "results"))
    command(
        *("train", "--images", archive, "--labels", labels, "--output", model),
        *("--workers", "2", "--image-size", "96", "--epochs", "30", "--batch-size", "16"),
    )
    command(
        *("evaluate", "--model", model, "--images", archive, "--labels", labels),
        *("--output", report),
    )
    command(
        *("screen", "--archive", archive, "--model", model, "--output", results),
        *("--labels", labels),
    )
    for question, sql in QUERIES.items():
        print(f"\n{question}")
        command("query", "--results", results, " ".join(sql.split()))


if __name__ == "__main__":
    sys.exit(main())
