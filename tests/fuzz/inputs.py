"""The inputs of a run, and what must hold for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.reading import is_sidecar_name, read_images
from lungopacity.errors import REJECTING, ErrorCode, Status
from lungopacity.radiograph import ACCEPTABLE, Preprocessing
from lungopacity.results.schema import READ_SCHEMA
from tests.fuzz.bombs import BOMBS, bomb
from tests.fuzz.fixtures import Fixture, all_fixtures
from tests.fuzz.mutations import MUTATIONS, Random, flipped, lengthened, truncated

# Everything that can be decoded is decoded: films rejected for their headers would not reach the
# decoders.
SETTINGS = ReadSettings(Preprocessing(image_size=32), accept=ACCEPTABLE, reject_quality=frozenset())
# A folder does not lose, hide or change its files while it is read.
_IMPOSSIBLE = {
    ErrorCode.INTERNAL, ErrorCode.MISSING, ErrorCode.FORBIDDEN, ErrorCode.TIMEOUT,
    ErrorCode.UNAVAILABLE, ErrorCode.CHANGED, ErrorCode.DIGEST_MISMATCH,
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One file of the run."""

    kind: str
    mutation: str
    name: str
    data: bytes = field(repr=False)


def mutated(rng: Random, fixtures: tuple[Fixture, ...]) -> Input:
    """A damaged fixture; now and then one that is undamaged, or has the suffix of another."""
    fixture = rng.choice(fixtures)
    mutation = rng.choice(MUTATIONS)
    whole = rng.randrange(100) == 0
    data = fixture.data if whole else mutation(rng, fixture, fixtures)
    suffix = rng.choice(fixtures).suffix if rng.randrange(20) == 0 else fixture.suffix
    return Input(
        fixture.kind, "none" if whole else mutation.__name__, f"{fixture.name}~{suffix}", data
    )


def input_of(seed: int, number: int) -> Input:
    """The input with this number. Only seed, number and fixtures determine it."""
    rng = Random(f"{seed}/{number}")
    names = sorted(BOMBS)
    if number < len(names):
        # Each bomb once undamaged; later ones are damaged, too.
        found = bomb(names[number])
        return Input("bomb", names[number], found.name, found.data)
    if rng.randrange(150) == 0:
        name = rng.choice(names)
        data = rng.choice((flipped, lengthened, truncated))(rng, bomb(name), all_fixtures())
        return Input("bomb", f"{name}, damaged", bomb(name).name, data)
    return mutated(rng, all_fixtures())


def rows_of(folder: Path, objects: pa.Table, settings: ReadSettings = SETTINGS) -> list[dict]:
    """The rows that a Ray task makes of these objects. Raises `AssertionError` if their schema is
    wrong."""
    store = take_inventory(str(folder)).store
    rows = []
    for table in read_images(store, objects, settings):
        assert table.schema == READ_SCHEMA
        rows += table.to_pylist()
    return rows


def broken_conditions(rows: list[dict], settings: ReadSettings = SETTINGS) -> list[str]:
    """What is wrong with the rows of one object; empty if nothing is."""
    images = [row for row in rows if row["shard_rows"] is None]
    found = [] if images else ["no row"]
    for row in images:
        code, status = row["error_code"], row["status"]
        if status == Status.OK:
            if (
                code is not None
                or len(row["pixels"] or b"") != settings.preprocessing.image_size**2
            ):
                found.append("ok, with a code or without its pixels")
        elif code not in set(ErrorCode) or row["pixels"] is not None:
            found.append(f"{status} with code {code}")
        elif code in _IMPOSSIBLE:
            found.append(f"{code}: {row['error_message']}")
        elif not (
            code == ErrorCode.NOT_AN_IMAGE
            or (code == ErrorCode.EMPTY and is_sidecar_name(row["member"] or row["image"]))
        ):
            expected = Status.REJECTED if code in REJECTING else Status.FAILED
            if status != expected:
                found.append(f"{code} is {status}")
    ends = [row["shard_rows"] for row in rows if row["shard_rows"] is not None]
    several = len(images) > 1 or any(row["reading"] for row in images)
    if ends != ([len(images)] if several else []):
        found.append(f"{len(images)} rows are closed by {ends}")
    elif several and (rows[-1]["shard_rows"] is None or len({row["reading"] for row in rows}) != 1):
        found.append("the rows of one pass do not belong together")
    return found


def outcome_of(rows: list[dict]) -> str:
    codes = [row["error_code"] for row in rows if row["shard_rows"] is None]
    return next((code for code in codes if code), "ok")
