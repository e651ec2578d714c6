"""A real job over a real S3 server that a fault breaks, and what must hold afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.local_s3 import LocalS3
from lungopacity.errors import UserError
from lungopacity.results.folder import read_runs
from lungopacity.results.query import query
from lungopacity.screening.clean import clean
from lungopacity.storage import open_store
from tests.fault_proxy import FaultProxy, fault_proxy
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

LOOSE, SHARDS, MEMBERS = 300, 12, 150
IMAGES = LOOSE + SHARDS * MEMBERS
_TIMEOUT_S = 150
RUN_ID = "night"


@dataclass
class Outcome:
    """One trial of a fault, after the run was resumed and published."""

    expected: int = IMAGES
    rows: int = 0
    twice: int = 0
    finished: int = 0
    """Objects whose rows were in part files when the first attempt ended."""
    refetched: int = 0
    """How many of those were fetched again."""
    parts_seen: int = 0
    """How often a reader saw part of a run."""
    left: int = 0
    """Files that belong to no published run after `lungopacity clean`."""
    attempts: int = 1
    """Times the command was started until the run was published."""

    @property
    def lost(self) -> int:
        return self.expected - (self.rows - self.twice)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.twice or self.refetched or self.parts_seen or self.left)


@dataclass
class Scene:
    """An archive and a model, and for each trial a results folder of its own."""

    server: LocalS3
    proxy: FaultProxy
    folder: Path
    prefix: str
    results: str = ""
    env: dict[str, str] = field(default_factory=dict)
    jobs: list[subprocess.Popen[str]] = field(default_factory=list)
    """Those of the trial."""

    @property
    def archive(self) -> str:
        return f"{self.prefix}/archive"

    def command(self, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "lungopacity.cli", "screen", "--run-id", RUN_ID),
            *("--archive", self.archive, "--model", str(self.folder / "model")),
            *("--output", self.results, *more),
        ]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Start the job in processes of its own, with every request through the proxy."""
        return self.started(self.command(*more))

    def started(self, command: list[str]) -> subprocess.Popen[str]:
        """Start another command in the same way. It ends with the trial."""
        job = subprocess.Popen(
            command,
            env={**os.environ, **self.server.environment, "AWS_ENDPOINT_URL": self.proxy.url,
                 **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        self.jobs.append(job)
        return job

    def ended(self, job: subprocess.Popen[str]) -> str:
        """Wait for the job's end, and return what it printed."""
        try:
            return job.communicate(timeout=_TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise AssertionError(f"the job hangs: {job.communicate()[0][-3000:]}") from None

    def fetched(self) -> Counter[str]:
        """How often each object of the archive was requested."""
        start = f"/{self.archive.removeprefix('s3://')}/"
        with self.proxy.lock:
            gets = dict(self.proxy.gets)
        return Counter(
            {
                path.removeprefix(start).split("?")[0]: count
                for path, count in gets.items()
                if path.startswith(start)
            }
        )

    def finished(self) -> set[str]:
        """Objects whose rows are in part files of the unpublished run."""
        store, done = open_store(self.results), set()
        for item in list(store.list(f"_work/{RUN_ID}/attempt=")):
            rows = pq.read_table(
                pa.BufferReader(store.read(item.key)), columns=["image", "reading", "shard_rows"]
            ).to_pylist()
            done |= {
                row["image"]
                for row in rows
                if row["reading"] is None or row["shard_rows"] is not None
            }
        return done

    @contextmanager
    def trial(self) -> Iterator[Outcome]:
        """A reader watches while the block breaks the run. Then the run is finished and judged."""
        self.results = f"{self.prefix}/results-{uuid.uuid4().hex[:8]}"
        self.proxy.gets.clear()
        outcome = Outcome()
        stop = threading.Event()
        reader = threading.Thread(target=self._read_all_the_while, args=(stop, outcome))
        reader.start()
        try:
            yield outcome
            before, fetched = self.finished(), self.fetched()
            while not self._published():
                outcome.attempts += 1
                assert outcome.attempts <= 4, "resumed again and again, and never published"
                self.ended(self.start())
            again = self.fetched()
            outcome.finished = len(before)
            outcome.refetched = sum(again[key] > fetched[key] for key in before)
        finally:
            self._end_jobs()
            self.proxy.on_request = self.proxy.choose_any = None
            stop.set()
            reader.join()
        ((outcome.rows, distinct),) = (
            tuple(row.values())
            for row in query(
                self.results,
                "SELECT count(*) AS n, count(DISTINCT (image, member)) AS d FROM predictions "
                "WHERE status = 'ok'",
            ).to_pylist()
        )
        outcome.twice = outcome.rows - distinct
        # As if an hour had passed: until then `clean` takes files for those of a running job.
        with patch("lungopacity.screening.clean._AT_WORK", timedelta(0)):
            clean(self.results, older_than_days=0)
        (record,) = read_runs(open_store(self.results))
        named = {file["key"] for file in record["files"]} | {record["metrics_file"]["key"]}
        keys = {item.key for item in open_store(self.results).list()}
        outcome.left = len(keys - named - {f"runs/{RUN_ID}.json"})

    def _end_jobs(self) -> None:
        """End what a failed trial left running: it would disturb the next one."""
        while self.jobs:
            job = self.jobs.pop()
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.communicate()

    def _published(self) -> bool:
        return bool(read_runs(open_store(self.results)))

    def _read_all_the_while(self, stop: threading.Event, outcome: Outcome) -> None:
        while not stop.wait(0.3):
            try:
                runs = query(
                    self.results,
                    "SELECT any_value(runs.images) AS said, count(*) AS found "
                    "FROM runs JOIN predictions USING (run_id) GROUP BY run_id",
                ).to_pylist()
            except UserError as error:
                # The S3 server may be down, or nothing published yet: neither is a fault.
                broken = "cannot be read" in str(error) and "commit record names" in str(error)
                outcome.parts_seen += broken and self.server.process_group is not None
                continue
            outcome.parts_seen += any(run["said"] != run["found"] for run in runs)


@contextmanager
def scene(server: LocalS3, prefix: str, folder: Path) -> Iterator[Scene]:
    """Make the archive and the model, once. The AWS variables of `server` must be set."""
    archive = open_store(f"{prefix}/archive")
    films = [encoded(grey_film(seed, 120, 110)) for seed in range(20)]
    for number in range(LOOSE):
        archive.write(f"{number:04d}.png", films[number % 20])
    for shard in range(SHARDS):
        members = {f"{number}.png": films[number % 20] for number in range(MEMBERS)}
        archive.write(f"{shard}.tar", tar(members))
    write_tiny_model(str(folder / "model"), is_compiled=True)
    with fault_proxy(server.endpoint_url) as proxy:
        yield Scene(server, proxy, folder, prefix)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    """Return when the condition holds. Fails when it does not within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def processes_of(job: subprocess.Popen[str], title: str) -> list[int]:
    """Ids of the job's processes whose title begins with `title`; Ray sets its workers' titles."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(folder.name)] = int(stat[1])
        if command.startswith(title):
            found.append(int(folder.name))

    def is_of_job(process: int) -> bool:
        while process in parents:
            if process == job.pid:
                return True
            process = parents[process]
        return False

    return [process for process in found if is_of_job(process)]
