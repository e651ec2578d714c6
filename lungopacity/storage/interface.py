"""What every store can do. Keys are relative to the store's root. They are data, and are never
normalised."""

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
    """Changes when the content changes. On S3 the ETag without quotes; on disk, mtime and size."""
    modified_at: datetime
    """UTC."""

    @staticmethod
    def gone(key: str) -> ObjectInfo:
        """A placeholder for an object that no longer exists: reading it fails as `missing`. Its
        size is not 0, or it would be reported as `empty`."""
        return ObjectInfo(key, size_bytes=1, etag="", modified_at=datetime.fromtimestamp(0, UTC))


class ConflictError(Exception):
    """The object under the key does not meet the condition of a `write`."""


class Store(Protocol):
    """Objects under one root URI."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in no guaranteed order.

        Raises `UserError` if the objects cannot be listed.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """The object's metadata, or None if there is no such object. Raises `UserError` if the
        storage does not say."""
        ...

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        """All bytes of the object. On S3 they are checked against a digest if one is known: the
        MD5, the MD5s of the parts of an upload in parts of one size, or a checksum that boto3 can
        compute.

        `etag`: of the planned object; raises `changed` if the object is another one. Raises
        `ImageError` of stage `fetch`.
        """
        ...

    def read_head(self, key: str, size_bytes: int, *, etag: str | None = None) -> bytes:
        """The first `size_bytes` bytes of the object, or all of a smaller one. No digest is
        checked. Raises as `read` does."""
        ...

    def open_local(self, key: str, *, etag: str | None = None) -> Any:
        """Context manager that gives a seekable binary file with the object, checked as in `read`.

        An object on S3 is first spooled to a temporary file. So shards are never whole in memory,
        and a broken transfer is fetched again instead of being mistaken for a broken shard. Raises
        as `read` does; reading the file raises `OSError`.
        """
        ...

    def local_file(self, key: str, target: Path) -> Path:
        """The path of a file on this machine that holds the object, checked as in `read`: the file
        itself if the store is a folder, else a copy at `target`. Raises as `read` does, and
        `UserError` if the copy cannot be written."""
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
        """Write the object atomically: no reader ever sees a part of it.

        private: on disk, only this user may read it. On S3 the bucket's policies decide.
        Raises `ConflictError` if `if_absent` and the object exists, or if `if_match` is not the
        etag of the object there; `UserError` if the object cannot be written.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; no error if it is already gone. Raises `UserError` if it cannot be
        deleted."""
        ...

    def now(self) -> datetime:
        """The time, in UTC, by the clock that sets `modified_at`: on S3 the server's, not this
        machine's."""
        ...

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The same place for libraries that use Arrow: a filesystem, and the root's path in it."""
        ...


def changed() -> ImageError:
    """The error for an object that is no longer the planned one."""
    return ImageError(
        ErrorCode.CHANGED, Stage.FETCH, "replaced since the plan was made; screen it again"
    )
