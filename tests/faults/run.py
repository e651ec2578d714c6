"""Every fault, several times; the table of docs/reliability.md."""

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

Each line is a fault that was struck for real: real processes killed with signal 9, a real S3 server
on loopback behind a proxy that breaks answers, a real Ray. After the fault the same command was
started again until the run was published; then its table was compared with its plan. A reader asked
for all published rows the whole time. Research use only. Not a medical device.

```
make faults
```

{machine}; {images} images a run: {loose} loose objects and {shards} tars of {members};
{date}; {minutes:.0f} minutes.

| fault | tried | images expected | lost | twice | finished when it struck | of these fetched \
again | readers saw a part | left after `clean` | starts |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""
TAIL = """
- *Finished* counts objects whose rows had landed in part files when the first attempt ended, over
  all trials. Of a training run, epochs stand for images. *Starts* is the most that any trial took.
- The random moments are drawn from a fixed seed, as counts of objects asked for.
- Broken requests: refused (503), connection reset, body cut short, a byte flipped, delayed, and for
  writes and deletions also done with the answer lost. A listing is not flipped: S3 gives it no
  checksum.
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
    """What came of each trial, or why there is none; what a trial fails by ends that fault alone:
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
    parser.add_argument("--only", default="", help="faults with this in their name")
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
