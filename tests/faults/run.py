"""Strike every fault, most of them several times, and write the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import inspect
import os
import platform
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from cluster.local_s3 import LocalS3
from tests.faults.faults import FAULTS, NotPossibleHereError
from tests.faults.scene import IMAGES, LOOSE, MEMBERS, SHARDS, Outcome, Scene, scene

HEAD = """# Reliability

What was killed or broken on purpose, and what was lost by it. Real processes were killed with
signal 9, a real S3 server on loopback stood behind a proxy that breaks answers, and Ray was real.
After each fault the same command was started again until the run was published. Then the published
table was compared with the plan. A reader queried all published rows the whole time. Research use
only. Not a medical device.

```
make faults
```

{machine}; {images} images a run: {loose} loose objects and {shards} tars of {members};
{date}; {minutes:.0f} minutes.

| fault | trials | images expected | lost | duplicated | finished at the fault | of these fetched \
again | times a reader saw part of a run | files left after `clean` | starts |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""
TAIL = """
- *Finished* counts objects whose rows were in part files when the first attempt ended, over all
  trials. *Starts* is the most that any trial needed. In the rows about training, images are epochs.
- At a random moment: when a number of objects, drawn with a fixed seed, has been requested.
- The clock is set back in the Python of one night, between two others.
- A broken request is refused (503), reset, cut short, delayed, or has one byte flipped. Writes and
  deletions may also be done while their answer is lost. Bytes of a listing are not flipped, because
  S3 gives a listing no checksum.
"""
FAILED = "**failed**"


def line(name: str, outcomes: list[Outcome] | str) -> str:
    if isinstance(outcomes, str):
        return f"| {name} | {outcomes} | | | | | | | | |\n"
    sums = [
        sum(getattr(outcome, what) for outcome in outcomes)
        for what in ("expected", "lost", "twice", "finished", "refetched", "parts_seen", "left")
    ]
    starts = max(outcome.attempts for outcome in outcomes)
    return f"| {name} | {len(outcomes)} | {' | '.join(f'{n:,}' for n in sums)} | {starts} |\n"


def tried(place: Scene, name: str) -> list[Outcome] | str:
    """The outcome of each trial, or why there is none. A trial that fails ends its own fault only:
    the others take twenty minutes."""
    strike, times = FAULTS[name]
    outcomes = []
    seeded = "seed" in inspect.signature(strike).parameters
    for trial in range(times):
        began = time.monotonic()
        try:
            outcome = strike(place, seed=trial) if seeded else strike(place)  # type: ignore[call-arg]
        except NotPossibleHereError as reason:
            return f"not tried: {reason}"
        except Exception as error:
            traceback.print_exc()
            return f"{FAILED} in trial {trial + 1}: {type(error).__name__}"
        print(f"{name} ({trial + 1} of {times}), {time.monotonic() - began:.0f} s: {outcome}",
              flush=True)  # fmt: skip
        outcomes.append(outcome)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, help="write the document here")
    parser.add_argument(
        "--only", default="", help="strike only the faults whose names contain this"
    )
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lungopacity-faults-") as name:
        folder = Path(name)
        with LocalS3(folder / "s3") as server, server.as_environment():
            server.create_bucket("faults")
            with scene(server, "s3://faults/scene", folder) as place:
                found = {name: tried(place, name) for name in FAULTS if options.only in name}
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
        f"{platform.python_version()}, Ray {version('ray')}"
    )
    document = HEAD.format(
        machine=machine, images=f"{IMAGES:,}", loose=LOOSE, shards=SHARDS, members=MEMBERS,
        date=datetime.now(UTC).date(), minutes=(time.monotonic() - began) / 60,
    )  # fmt: skip
    document += "".join(line(name, outcomes) for name, outcomes in found.items()) + TAIL
    if options.table:
        options.table.write_text(document)
    print(document)
    sound = all(
        not outcomes.startswith(FAILED)
        if isinstance(outcomes, str)
        else all(outcome.sound for outcome in outcomes)
        for outcomes in found.values()
    )
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
