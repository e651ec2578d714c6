"""What every store can do. Keys are relative to its root, and are data: never normalised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lungopacity.errors import ErrorCode, ImageError, Stage

if TYPE_CHECKING:
    import pyarrow.fs


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    """Relative to the store's root."""
    size_bytes: int
    etag: str
    """Changes when the content does. S3's ETag without quotes; on disk, mtime and size."""
    modified_at: datetime
    """UTC."""

    @staticmethod
    def gone(key: str) -> ObjectInfo:
        """Stands for an object that is no longer there: reading it will say so."""
        return ObjectInfo(key, size_bytes=1, etag="", modified_at=datetime.fromtimestamp(0, UTC))


class ConflictError(Exception):
    """A conditional `write` found another object under its key than the condition allows."""


class Store(Protocol):
    """Objects under one root URI."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in no promised order.

        Raises `UserError` where the root itself cannot be listed.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """The object's facts, or None where there is no such object."""
        ...

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        """The object's bytes, whole, and checked where a digest of it is known: on S3 the MD5,
        of an upload in parts of one size those of its parts, or a checksum that boto3 can compute.

        `etag`: refuse (`changed`) where the object is no longer the planned one. Raises
        `ImageError` of stage `fetch`.
        """
        ...

    def read_head(self, key: str, size_bytes: int, *, etag: str | None = None) -> bytes:
        """The object's first bytes, or all of a smaller one, without a check of its digest. Raises
        as `read` does."""
        ...

    def open_local(self, key: str, *, etag: str | None = None) -> Any:
        """Context manager of a seekable binary file on this machine that holds the checked object.

        From S3 it is spooled to a temporary file first: shards never lie whole in memory, and a
        transfer that breaks is fetched again instead of being taken for a broken shard. Raises as
        `read` does; reading the file raises `OSError`.
        """
        ...

    def local_file(self, key: str, target: Path) -> Path:
        """A file on this machine that holds the checked object: the file itself where the store is
        a folder, else a copy at `target`. Raises as `read` does, and `UserError` where the copy
        cannot be written."""
        ...

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        private: bool = False,
    ) -> None:
        """Put the object whole: no reader ever sees a part of it.

        private: on disk, for this user alone. On S3 the bucket's policies decide.
        Raises `ConflictError` where `if_absent` and it exists, or where it is no longer the one of
        the etag `if_match`; `UserError` where it cannot be written.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; no error where it is already gone."""
        ...

    def now(self) -> datetime:
        """The clock that `modified_at` is told by, UTC: on S3 the server's, not this machine's."""
        ...

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The same place for libraries that speak Arrow: filesystem, and root path in it."""
        ...


def changed() -> ImageError:
    """The object is no longer the one that was planned."""
    return ImageError(
        ErrorCode.CHANGED, Stage.FETCH, "replaced since the plan was made; screen it again"
    )
