"""Pseudonyms: HMAC-SHA-256 of a name, with a key that only the user holds.

A plain hash of a patient id can be undone by hashing every possible id. Without the key, an HMAC
cannot.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lungopacity.errors import ImageError, UserError, unreadable
from lungopacity.results.schema import METADATA
from lungopacity.storage import open_store, split_uri
from lungopacity.storage.parquet import parquet_bytes

_MIN_KEY_BYTES = 16

_MAP_SCHEMA = pa.schema([("hashed", pa.string()), ("name", pa.string())], metadata=METADATA)


@dataclass(frozen=True)
class Pseudonyms:
    """The user's key, and the hashing of names with it."""

    key: bytes = field(repr=False)
    key_map: str | None = None
    """URI of the folder that keeps the names behind hashes; None leaves names of objects as they
    are."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits for the commit record. They distinguish keys without revealing them."""
        return self.hashed("lungopacity key fingerprint")[:16]

    def hashed(self, name: str) -> str:
        """HMAC-SHA-256 of the name in UTF-8, 64 hex digits."""
        return hmac.new(self.key, name.encode(), hashlib.sha256).hexdigest()

    def hash_names(self, rows: pa.Table) -> tuple[pa.Table, dict[str, str]]:
        """`rows` with `image` and `member` hashed, and the name behind each hash."""
        names: dict[str, str] = {}
        for column in ("image", "member"):
            distinct = pc.unique(rows[column].combine_chunks()).drop_null()
            hashes = pa.array([self.hashed(name) for name in distinct.to_pylist()], pa.string())
            names |= dict(zip(hashes.to_pylist(), distinct.to_pylist(), strict=True))
            found = hashes.take(pc.index_in(rows[column].combine_chunks(), value_set=distinct))
            place = rows.schema.get_field_index(column)
            rows = rows.set_column(place, rows.schema.field(column), found)
        return rows, names


def read_pseudonyms(key_uri: str, key_map: str | None) -> Pseudonyms:
    """Read the key from the file `key_uri`; leading and trailing white space is removed. `key_map`:
    see `Pseudonyms`.

    Raises `UserError` if the key cannot be read, or is shorter than 16 bytes.
    """
    parent, name = split_uri(key_uri)
    try:
        key = open_store(parent).read(name).strip()
    except ImageError as error:
        raise unreadable(key_uri, "the key cannot be read", error) from error
    if len(key) < _MIN_KEY_BYTES:
        raise UserError(
            f"{key_uri}: the key has {len(key)} bytes, but needs at least {_MIN_KEY_BYTES}; "
            "make one with `(umask 077; openssl rand -hex 32 > FILE)`"
        )
    return Pseudonyms(key, key_map)


def write_key_map(uri: str, run_id: str, names: Mapping[str, str]) -> None:
    """Write the names behind a run's hashes to `<uri>/<run_id>.parquet`. On disk, only this user
    may read the file."""
    columns = {"hashed": list(names), "name": list(names.values())}
    data = parquet_bytes(pa.table(columns, schema=_MAP_SCHEMA))
    open_store(uri).write(f"{run_id}.parquet", data, private=True)


def read_key_map(uri: str, run_id: str) -> dict[str, str]:
    """Name by hash, as `write_key_map` wrote them. Raises `UserError` if the file is gone or
    damaged."""
    try:
        data = open_store(uri).read(f"{run_id}.parquet")
        table = pq.read_table(
            pa.BufferReader(data), schema=_MAP_SCHEMA, page_checksum_verification=True
        )
    # Arrow raises either of the latter two for a damaged file.
    except (ImageError, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{uri}/{run_id}.parquet: the names behind the hashes cannot be read; restore the file"
        ) from error
    return dict(zip(table["hashed"].to_pylist(), table["name"].to_pylist(), strict=True))
