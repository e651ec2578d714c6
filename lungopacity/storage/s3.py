"""A prefix of an S3 bucket as a store.

boto3 neither retries a body that ends early nor notices a flipped byte. So every read checks length
and digest, and fetches again if they differ. Credentials, region, profile and endpoint come from
the standard AWS variables and files.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.storage.ahead import ahead
from lungopacity.storage.interface import ConflictError, ObjectInfo, changed
from lungopacity.storage.outage import answered, heard, patiently, trust
from lungopacity.storage.s3_arrow import arrow_filesystem
from lungopacity.storage.s3_body import (
    ETAGS_VARIABLE,
    OPAQUE,
    BodyError,
    UnlikeEtagError,
    etag_of,
    take_body,
)
from lungopacity.storage.s3_clients import S3Clients, clients_of
from lungopacity.storage.s3_errors import (
    code_of,
    row_errors,
    status_of,
    user_errors,
    with_code,
)
from lungopacity.storage.scratch import no_room

if TYPE_CHECKING:
    import pyarrow.fs

log = logging.getLogger(__name__)

_BODY_ATTEMPTS = 4
"""Attempts of this module for a body that breaks off or is altered in transit."""
_BACKOFF_S = 0.2
_LIST_THREADS = 16
_NO_PARTS = (400, 403, 405, 416, 501)
"""HTTP statuses of servers that do not support part numbers."""

_LIST = "s3:ListBucket on the whole bucket"
_RIGHTS = {
    "listed": _LIST,
    # Without the right to list, S3 refuses to say that there is no such object.
    "read": f"s3:GetObject or, if there is no such object, {_LIST}",
    "written": "s3:PutObject",
    "deleted": "s3:DeleteObject",
}
"""What a policy has to allow."""

Pages = Sequence[dict[str, Any]]
"""Answers to ListObjectsV2 requests."""


class S3Store:
    """A prefix of an S3 bucket. The client is made on first use, so a store can be pickled. Its
    copy keeps what `LUNGOPACITY_ETAGS` said where the store was opened."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._clients: S3Clients | None = None
        etags = os.environ.get(ETAGS_VARIABLE, "")
        if etags not in ("", OPAQUE):
            raise UserError(f"{ETAGS_VARIABLE} is '{etags}'; set it to {OPAQUE}, or unset it")
        self._opaque = etags == OPAQUE

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clients": None, "_answered": answered()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trust(state.pop("_answered"))
        self.__dict__.update(state)

    @property
    def client(self) -> Any:
        """boto3's S3 client."""
        return self._ready.boto3

    @property
    def _ready(self) -> S3Clients:
        if self._clients is None:
            self._clients = clients_of(self.bucket)
        return self._clients

    @property
    def _ready_to_read(self) -> S3Clients:
        """As `_ready`, but raises `ImageError`: where one node of a cluster lacks the AWS profile,
        another may still read the object."""
        try:
            return self._ready
        except UserError as error:
            raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, str(error)) from error

    def _ask(self, method: str, **arguments: Any) -> Any:
        ask = getattr(self.client, method)
        return patiently(self.client.meta.endpoint_url, lambda: ask(**arguments))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._user_errors("listed"):
            first = self._page(self.prefix + prefix)
            if not first["IsTruncated"]:
                yield from self._objects(first)
                return
            whole, parts = self._parts(self.prefix + prefix)
            for page in whole:
                yield from self._objects(page)
            # A server takes 50 to 100 ms for a page: one by one, a million keys take minutes.
            for page in ahead(parts, self._pages, _LIST_THREADS):
                yield from self._objects(page)

    def _page(self, prefix: str, **more: Any) -> dict[str, Any]:
        asked = {"Bucket": self.bucket, "Prefix": prefix, **more}
        answer: dict[str, Any] = self._ask("list_objects_v2", **asked)
        token = answer.get("NextContinuationToken")
        ends = token in (None, more.get("ContinuationToken"))
        if "IsTruncated" not in answer or (answer["IsTruncated"] and ends):
            # Going on would list for ever; stopping would lose the remaining keys.
            raise UserError(
                f"{self.uri} cannot be listed: {self.client.meta.endpoint_url} does not say how "
                "its listing continues; use a server that supports ListObjectsV2"
            )
        return answer

    def _pages(self, prefix: str) -> Iterator[dict[str, Any]]:
        # Continuation tokens, never StartAfter: not every server lists in byte order.
        more: dict[str, Any] = {}
        while True:
            page = self._page(prefix, **more)
            yield page
            if not page["IsTruncated"]:
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _parts(self, prefix: str) -> tuple[Pages, Sequence[str]]:
        """Split a listing into pages that are already complete, and prefixes that hold the rest.

        Descends the folders until there are enough prefixes to list in parallel. A folder with more
        than one page of entries is not split: a listing for each study of an archive would cost far
        more.
        """
        whole: Any = []
        leaves: Any = []
        level = [prefix]
        while level and len(level) + len(leaves) < _LIST_THREADS:
            below = []
            for folder in level:
                page = self._page(folder, Delimiter="/")
                if page["IsTruncated"]:
                    leaves.append(folder)
                else:
                    whole.append(page)
                    below += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
            level = below
        return whole, leaves + level

    def _objects(self, page: dict[str, Any]) -> Iterator[ObjectInfo]:
        for item in page.get("Contents", ()):
            if item["Key"].endswith("/") and item["Size"] == 0:
                continue  # consoles create these to mark folders
            yield ObjectInfo(
                key=item["Key"].removeprefix(self.prefix),
                size_bytes=item["Size"],
                etag=etag_of(item),
                modified_at=item["LastModified"].astimezone(UTC),
            )

    def head(self, key: str) -> ObjectInfo | None:
        from botocore.exceptions import ClientError

        asked = {"Bucket": self.bucket, "Key": self.prefix + key}
        with self._user_errors("read"):
            try:
                found = self._ask("head_object", **asked)
            except ClientError as error:
                # An answer to HEAD has no body, so a missing bucket looks like a missing key.
                if status_of(error) == 404:
                    return None
                raise with_code(
                    error, partial(self._ask, "get_object", **asked, Range="bytes=0-0")
                ) from error
        return ObjectInfo(
            key=key,
            size_bytes=found["ContentLength"],
            etag=etag_of(found),
            modified_at=found["LastModified"].astimezone(UTC),
        )

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        ready = self._ready_to_read
        endpoint = ready.boto3.meta.endpoint_url
        # A server's first answer is left to `patiently`, which warns while it waits.
        if endpoint in answered():
            data = ready.quick.read(self.prefix + key, etag, self._opaque)
            if data is not None:
                heard(endpoint)
                return data
        pieces: list[bytes] = []
        self._fetch(key, etag, pieces.append, pieces.clear)
        return b"".join(pieces)

    def read_head(self, key: str, size_bytes: int, *, etag: str | None = None) -> bytes:
        pieces: list[bytes] = []
        self._fetch(key, etag, pieces.append, pieces.clear, Range=f"bytes=0-{size_bytes - 1}")
        return b"".join(pieces)

    @contextmanager
    def open_local(self, key: str, *, etag: str | None = None) -> Iterator[IO[bytes]]:
        with self._spooled(key, etag) as file:
            yield file

    def _spooled(self, key: str, etag: str | None) -> IO[bytes]:
        try:
            with ExitStack() as on_failure:  # closing, too, writes what the disk has no room for
                file = on_failure.enter_context(tempfile.TemporaryFile(prefix="lungopacity-"))
                self._fetch_into(file, key, etag)
                on_failure.pop_all()
        except OSError as error:
            # The object may be sound, and another task or night may have the disk space.
            raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, no_room(error)) from error
        return file

    def local_file(self, key: str, target: Path) -> Path:
        try:
            with target.open("wb") as file:
                self._fetch_into(file, key, None)
        except OSError as error:
            raise UserError(f"{target.parent}: {no_room(error)}") from error
        return target

    def _fetch_into(self, file: IO[bytes], key: str, etag: str | None) -> None:
        """Fetch the whole object into the file, and seek to its beginning. Raises `OSError` only
        for the file; otherwise raises as `read` does."""

        def start_over() -> None:
            file.seek(0)
            file.truncate()

        self._fetch(key, etag, file.write, start_over)
        file.seek(0)

    def _fetch(
        self,
        key: str,
        etag: str | None,
        take: Callable[[bytes], object],
        start_over: Callable[[], object],
        **more: str,
    ) -> None:
        seen: set[str] = set()
        for attempt in range(1, _BODY_ATTEMPTS + 1):
            start_over()
            try:
                self._fetch_once(key, etag, take, **more)
                return
            except UnlikeEtagError as error:
                if error.digest in seen:
                    _warn_fetched_twice(self.bucket, self.client.meta.endpoint_url)
                    return  # two equal bodies are what is stored
                if attempt == _BODY_ATTEMPTS:
                    raise
                seen.add(error.digest)
                continue  # without a pause: the server did answer
            except BodyError:
                if attempt == _BODY_ATTEMPTS:
                    raise
            time.sleep(_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))

    def _fetch_once(
        self, key: str, etag: str | None, take: Callable[[bytes], object], **more: str
    ) -> None:
        asked = {"Bucket": self.bucket, "Key": self.prefix + key}
        condition = {"IfMatch": f'"{etag}"'} if etag else {}
        with row_errors(self._ready_to_read.boto3.meta.endpoint_url):
            answer = self._ask("get_object", **asked, **condition, **more)
        found = etag_of(answer)
        if etag and found != etag:
            raise changed()  # not every server honours If-Match
        part_bytes = None if self._opaque else partial(self._part_bytes, key, found)
        take_body(answer, take, part_bytes)

    def _part_bytes(self, key: str, etag: str, number: int) -> int | None:
        """Size of one part of the object, as in `PartBytes`. Raises `ImageError`."""
        from botocore.exceptions import ClientError

        with row_errors(self.client.meta.endpoint_url):
            try:
                answer = self._ask(
                    "head_object",
                    Bucket=self.bucket,
                    Key=self.prefix + key,
                    IfMatch=f'"{etag}"',
                    PartNumber=number,
                )
            except ClientError as error:
                if status_of(error) in _NO_PARTS:
                    return None
                raise
        # A server that ignores the part number answers for the whole object.
        return int(answer["ContentLength"]) if answer.get("PartsCount") else None

    def write(
        self,
        key: str,
        data: bytes,
        *,
        if_absent: bool = False,
        if_match: str | None = None,
        private: bool = False,
    ) -> None:
        from botocore.exceptions import ClientError

        if "//" in self.prefix:
            raise UserError(
                f"{self.uri} cannot be written: Arrow and some servers find nothing below an empty "
                "folder name (//); leave out the second slash"
            )
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        if if_match is not None:
            condition = {"IfMatch": f'"{if_match}"'}
        with self._user_errors("written"):
            try:
                self._ask(
                    "put_object", Bucket=self.bucket, Key=self.prefix + key, Body=data, **condition
                )
            except ClientError as error:
                # 404: the object to replace is gone. If its bucket is gone, that is no conflict.
                is_conflict = status_of(error) in (404, 409, 412)
                if condition and is_conflict and code_of(error) != "NoSuchBucket":
                    raise ConflictError(key) from error
                raise

    def delete(self, key: str) -> None:
        with self._user_errors("deleted"):
            self._ask("delete_object", Bucket=self.bucket, Key=self.prefix + key)

    def now(self) -> datetime:
        with self._user_errors("listed"):
            answer = self._ask("list_objects_v2", Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date) if date else datetime.now(UTC)

    def check_bucket(self) -> None:
        """Raises `UserError` if these credentials may not ask for the bucket: as a whole, whatever
        they may do below a prefix."""
        with self._user_errors("listed"):
            self._ask("head_bucket", Bucket=self.bucket)

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return arrow_filesystem(self.client), f"{self.bucket}/{self.prefix}".rstrip("/")

    def _user_errors(self, done: str) -> AbstractContextManager[None]:
        where = f"{self.uri} cannot be {done}"
        return user_errors(where, self.bucket, self.client.meta.endpoint_url, _RIGHTS[done])


@cache
def _warn_fetched_twice(bucket: str, endpoint: str) -> None:
    """Once per process: it may concern every object."""
    log.warning(
        "the ETags of multipart objects in s3://%s at %s are not made of MD5s: each object is "
        "fetched twice, and accepted if both copies are equal; with %s=%s it is fetched once",
        bucket,
        endpoint,
        ETAGS_VARIABLE,
        OPAQUE,
    )
