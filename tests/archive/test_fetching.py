"""Loose objects of a task are fetched ahead of the one being read: how many, and for how long."""

import threading
import time
from datetime import UTC, datetime

import pyarrow as pa

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.reading import read_files
from lungopacity.radiograph import Preprocessing
from lungopacity.results.schema import PLAN_SCHEMA

SETTINGS = ReadSettings(Preprocessing(image_size=32))


def planned_of(sizes: dict[str, int]) -> pa.Table:
    rows = [
        {"image": key, "source_etag": "e", "source_size_bytes": size,
         "source_modified_at": datetime.now(UTC), "is_shard": False}
        for key, size in sizes.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def test_large_films_are_fetched_ahead_by_size_and_not_by_count():
    sizes = {f"{number:02d}.dcm": 37_000_000 for number in range(30)} | {"15.dcm": 300_000_000}

    class Counting:
        def __init__(self) -> None:
            self.out, self.seen, self.lock = 0, [], threading.Lock()

        def read(self, key: str, *, etag: str | None = None) -> bytes:
            with self.lock:
                self.out += sizes[key]
                self.seen.append(self.out)
            return key.encode()

    store = Counting()
    came = []
    for name, _, _ in read_files(store, planned_of(sizes), SETTINGS):
        time.sleep(0.02)  # what may be fetched meanwhile, is
        with store.lock:
            store.out -= sizes[name]
        came.append(name)
    assert came == list(sizes)
    # Several at once; the one above the limit of them all comes alone.
    seen = set(store.seen)
    assert seen <= {37_000_000, 2 * 37_000_000, 3 * 37_000_000, 300_000_000}
    assert seen >= {2 * 37_000_000, 300_000_000}


def test_the_latency_of_a_store_is_hidden():
    class Distant:
        """Answers no second request before the answer of the first was taken."""

        def __init__(self) -> None:
            self.first_taken, self.late = threading.Event(), False
            self.lock, self.out, self.most = threading.Lock(), 0, 0

        def read(self, key: str, *, etag: str | None = None) -> bytes:
            with self.lock:
                self.out += 1
                self.most = max(self.most, self.out)
            if key != "000.png" and not self.first_taken.wait(20):
                self.late = True
            time.sleep(0.02)
            with self.lock:
                self.out -= 1
            return key.encode()

    planned = planned_of({f"{number:03d}.png": 20_000 for number in range(256)})
    store = Distant()
    files = read_files(store, planned, SETTINGS)
    first, _, _ = next(files)
    store.first_taken.set()
    assert [first, *(name for name, _, _ in files)] == planned["image"].to_pylist()
    assert not store.late  # it waits for one request, not for eight
    assert store.most > 8


def test_a_caller_that_stops_early_does_not_wait_for_further_fetches():
    class Distant:
        def __init__(self) -> None:
            self.asked = 0

        def read(self, key: str, *, etag: str | None = None) -> bytes:
            self.asked += 1
            time.sleep(0 if key == "000.png" else 0.3)
            return key.encode()

    planned = planned_of({f"{number:03d}.png": 20_000 for number in range(500)})
    store = Distant()
    files = read_files(store, planned, SETTINGS)
    next(files)
    before = store.asked
    files.close()
    # Requests under way end, and no others begin: seven more would in the group of each thread.
    # While this thread waits for its turn, another may have begun one.
    assert store.asked <= before + 2 * SETTINGS.fetch_threads
