"""The only module that talks to storage: local folders and S3, behind one small interface.

A `Store` is rooted at a URI (a path, `file://…` or `s3://bucket/prefix`); keys are relative to that
root and are data, never normalised. Credentials, region, profile and endpoint come from the
standard AWS variables and files (`AWS_ENDPOINT_URL` included).

What S3 does on the wire decides much here: boto3 does not retry a body that ends early, and nobody
notices a flipped byte. So every read compares length and digest, and fetches again.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError

if TYPE_CHECKING:
    import pyarrow.fs

_READ_ATTEMPTS = 4
_BACKOFF_S = 0.2
_CHUNK_BYTES = 1 << 20


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


class AlreadyExistsError(Exception):
    """`write(..., if_absent=True)` found an object under that key."""


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
        """The object's bytes, whole and checked.

        `etag`: refuse (`changed`) where the object is no longer the planned one. Raises
        `ImageError` of stage `fetch`.
        """
        ...

    def open_local(self, key: str, *, etag: str | None = None) -> Any:
        """Context manager of a seekable binary file on this machine that holds the checked object.

        From S3 it is spooled to a temporary file first: shards never lie whole in memory, and a
        transfer that breaks is fetched again instead of being taken for a broken shard. Raises as
        `read` does.
        """
        ...

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Put the object whole: no reader ever sees a part of it.

        Raises `AlreadyExistsError` where `if_absent` and it exists; `UserError` where it cannot be
        written.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; no error where it is already gone."""
        ...

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The same place for libraries that speak Arrow: filesystem, and root path in it."""
        ...


def open_store(uri: str) -> Store:
    """The store at `uri`: a local path, `file://…` or `s3://bucket/prefix`.

    Raises `UserError` for any other scheme or for an S3 URI without a bucket.
    """
    if "://" not in uri:
        return LocalStore(Path(uri))
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{uri}: a file URI has three slashes, as in file:///data/films")
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        # Everything after the bucket is the key, question marks included: S3 URIs are not URLs.
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{uri}: no bucket; write s3://bucket/prefix")
        return S3Store(bucket, prefix.strip("/"))
    raise UserError(
        f"{uri}: storage of kind '{parts.scheme}' is not supported; give a path, file:// or s3://"
    )


def join_uri(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended as further path segments."""
    return "/".join([uri.rstrip("/"), *parts])


def split_uri(uri: str) -> tuple[str, str]:
    """The URI of the parent folder, and the last segment."""
    if "://" not in uri:
        path = Path(os.path.abspath(Path(uri).expanduser()))
        return str(path.parent), path.name
    parent, _, name = uri.rstrip("/").rpartition("/")
    return parent, name


# ------------------------------------------------------------------------------------ local folders


class LocalStore:
    """A folder on disk. The etag is mtime and size: reading every file to list it is too dear."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))
        self.uri = str(self.root)

    def _path(self, key: str) -> Path:
        path = Path(os.path.normpath(self.root / key))
        if not path.is_relative_to(self.root):
            raise UserError(f"key {key!r} leads out of {self.root}")
        return path

    def _info(self, path: Path, stat: os.stat_result) -> ObjectInfo:
        key = path.relative_to(self.root).as_posix()
        return ObjectInfo(
            # A file name in no known encoding would break every column it enters. Escaped, it is
            # listed, then found missing: a row that can be seen, and nothing stops.
            key=key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
            size_bytes=stat.st_size,
            etag=f"{stat.st_mtime_ns:x}-{stat.st_size:x}",
            modified_at=datetime.fromtimestamp(stat.st_mtime, UTC),
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if not self.root.is_dir():
            return
        try:
            # followlinks: archives are often mounted by a symbolic link.
            for folder, subfolders, names in os.walk(
                self.root, followlinks=True, onerror=_raise_error
            ):
                subfolders.sort()
                for name in sorted(names):
                    path = Path(folder) / name
                    if path.relative_to(self.root).as_posix().startswith(prefix):
                        yield self._info(path, path.stat())
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be listed ({error.strerror}); check its permissions"
            ) from error

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            return self._info(path, path.stat()) if path.is_file() else None
        except OSError:
            return None

    @contextmanager
    def open_local(self, key: str, *, etag: str | None = None) -> Iterator[IO[bytes]]:
        try:
            path = self._path(key)
            file = path.open("rb")
        except OSError as error:
            raise _fetch_error_of(error) from error
        with file:
            found = self._info(path, os.fstat(file.fileno())).etag
            if etag is not None and found != etag:
                raise _changed()
            yield file

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        with self.open_local(key, etag=etag) as file:
            try:
                return file.read()
            except OSError as error:
                raise _fetch_error_of(error) from error

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                # mkstemp makes files that the owner alone can read; results are meant for others.
                os.chmod(name, 0o666 & ~_umask())
                if if_absent:
                    os.link(name, path)
                    os.unlink(name)
                else:
                    os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except FileExistsError as error:
            if if_absent and path.exists():
                raise AlreadyExistsError(key) from error
            raise UserError(f"{error.filename}: is in the way of {path}; move it") from error
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); check permissions and space"
            ) from error

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.root or not folder.is_relative_to(self.root):
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        import pyarrow.fs

        return pyarrow.fs.LocalFileSystem(), str(self.root)


def _raise_error(error: OSError) -> None:
    raise error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fetch_error_of(error: OSError) -> ImageError:
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return ImageError(ErrorCode.MISSING, Stage.FETCH, "no such file")
    if isinstance(error, PermissionError):
        return ImageError(ErrorCode.FORBIDDEN, Stage.FETCH, "permission denied")
    return ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, f"disk error: {error.strerror}")


def _changed() -> ImageError:
    return ImageError(
        ErrorCode.CHANGED, Stage.FETCH, "replaced since the plan was made; screen it again"
    )


# --------------------------------------------------------------------------------------------- S3


class S3Store:
    """A prefix of an S3 bucket. The client is made on first use, so a store may be pickled."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> Any:
        if self._client is None:
            self._client = _s3_client()
        return self._client

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Continuation tokens, never "start after": not every server lists in byte order.
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix
        )
        with self._user_errors("listed"):
            for page in pages:
                for item in page.get("Contents", ()):
                    if item["Key"].endswith("/") and item["Size"] == 0:
                        continue  # a folder marker that consoles create
                    yield ObjectInfo(
                        key=item["Key"].removeprefix(self.prefix),
                        size_bytes=item["Size"],
                        etag=item["ETag"].strip('"'),
                        modified_at=item["LastModified"].astimezone(UTC),
                    )

    def head(self, key: str) -> ObjectInfo | None:
        from botocore.exceptions import ClientError

        with self._user_errors("read"):
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except ClientError as error:
                # HEAD has no body, so a missing bucket and a missing key look alike here.
                if _status_of(error) == 404:
                    return None
                raise
        return ObjectInfo(
            key=key,
            size_bytes=found["ContentLength"],
            etag=found["ETag"].strip('"'),
            modified_at=found["LastModified"].astimezone(UTC),
        )

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        pieces: list[bytes] = []
        self._fetch(key, etag, pieces.append, pieces.clear)
        return b"".join(pieces)

    @contextmanager
    def open_local(self, key: str, *, etag: str | None = None) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile(prefix="lungopacity-") as file:

            def start_over() -> None:
                file.seek(0)
                file.truncate()

            self._fetch(key, etag, file.write, start_over)
            file.seek(0)
            yield file

    def _fetch(
        self,
        key: str,
        etag: str | None,
        take: Callable[[bytes], object],
        start_over: Callable[[], object],
    ) -> None:
        for attempt in range(1, _READ_ATTEMPTS + 1):
            start_over()
            try:
                self._fetch_once(key, etag, take)
                return
            except ImageError as error:
                last = attempt == _READ_ATTEMPTS
                if last or error.code not in (
                    ErrorCode.TIMEOUT,
                    ErrorCode.UNAVAILABLE,
                    ErrorCode.DIGEST_MISMATCH,
                ):
                    raise
            time.sleep(_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))

    def _fetch_once(self, key: str, etag: str | None, take: Callable[[bytes], object]) -> None:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectTimeoutError,
            FlexibleChecksumError,
            ReadTimeoutError,
        )

        condition = {"IfMatch": f'"{etag}"'} if etag else {}
        md5 = hashlib.md5(usedforsecurity=False)
        received = 0
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, **condition)
            body = answer["Body"]
            while piece := body.read(_CHUNK_BYTES):
                md5.update(piece)
                received += len(piece)
                take(piece)
        except ClientError as error:
            raise _image_error_of(error) from error
        except (ConnectTimeoutError, ReadTimeoutError) as error:
            raise ImageError(
                ErrorCode.TIMEOUT, Stage.FETCH, f"no answer in time, {_READ_ATTEMPTS} attempts"
            ) from error
        except FlexibleChecksumError as error:
            raise ImageError(
                ErrorCode.DIGEST_MISMATCH, Stage.FETCH, "differs from the stored checksum"
            ) from error
        except (BotoCoreError, OSError) as error:
            # urllib3's own exceptions are wrapped by botocore, or derive from OSError.
            raise ImageError(
                ErrorCode.UNAVAILABLE, Stage.FETCH, f"connection broke ({type(error).__name__})"
            ) from error
        if received != answer["ContentLength"]:
            raise ImageError(
                ErrorCode.UNAVAILABLE,
                Stage.FETCH,
                f"body cut short: {received} of {answer['ContentLength']} bytes",
            )
        if _etag_is_md5(answer) and md5.hexdigest() != answer["ETag"].strip('"').lower():
            raise ImageError(ErrorCode.DIGEST_MISMATCH, Stage.FETCH, "differs from the stored MD5")

    def write(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._user_errors("written"):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=self.prefix + key, Body=data, **condition
                )
            except ClientError as error:
                if if_absent and _status_of(error) in (409, 412):
                    raise AlreadyExistsError(key) from error
                raise

    def delete(self, key: str) -> None:
        with self._user_errors("deleted"):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        import pyarrow.fs

        credentials = _session().get_credentials()
        if credentials is None:
            raise UserError(_NO_CREDENTIALS)
        frozen = credentials.get_frozen_credentials()
        endpoint = urlsplit(self.client.meta.endpoint_url)
        filesystem = pyarrow.fs.S3FileSystem(
            access_key=frozen.access_key,
            secret_key=frozen.secret_key,
            session_token=frozen.token,
            region=self.client.meta.region_name,
            endpoint_override=endpoint.netloc,
            scheme=endpoint.scheme,
            request_timeout=60,
            connect_timeout=10,
            # The bucket's own policies decide who may create buckets; a typo must not make one.
            allow_bucket_creation=False,
        )
        return filesystem, f"{self.bucket}/{self.prefix}".rstrip("/")

    @contextmanager
    def _user_errors(self, done: str) -> Iterator[None]:
        """Turn what S3 says of the whole place into one line with its mend."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            EndpointConnectionError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        where = f"{self.uri} cannot be {done}"
        endpoint = self.client.meta.endpoint_url
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(f"{where}: {_NO_CREDENTIALS}") from error
        except EndpointConnectionError as error:
            raise UserError(
                f"{where}: no server answers at {endpoint}; check AWS_ENDPOINT_URL and the network"
            ) from error
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                raise UserError(
                    f"{where}: there is no bucket '{self.bucket}' at {endpoint}; "
                    "create it, or correct the name"
                ) from error
            if code in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken"):
                raise UserError(
                    f"{where}: {endpoint} does not accept these credentials ({code}); "
                    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
                ) from error
            if _status_of(error) == 403:
                raise UserError(
                    f"{where}: access denied ({code}); these credentials lack the permission for it"
                ) from error
            raise UserError(f"{where}: {endpoint} answered {code or _status_of(error)}") from error
        except BotoCoreError as error:
            raise UserError(f"{where}: {error}") from error


_NO_CREDENTIALS = (
    "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)


def _session() -> Any:
    import boto3

    return boto3.session.Session()


def _s3_client() -> Any:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=60,
        # Virtual-host addressing needs DNS names per bucket, which on-premises servers lack.
        s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
    )
    try:
        session = _session()
        return session.client("s3", config=config, region_name=session.region_name or "us-east-1")
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"S3 cannot be used: {error}") from error


def _status_of(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _etag_is_md5(answer: dict[str, Any]) -> bool:
    # The ETag is no MD5 for multipart uploads (it has a dash) and under KMS or customer keys:
    # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    etag = answer["ETag"].strip('"')
    encrypted = (
        answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    )
    return len(etag) == 32 and "-" not in etag and not encrypted


def _image_error_of(error: Any) -> ImageError:
    status = _status_of(error)
    if status == 404:
        return ImageError(ErrorCode.MISSING, Stage.FETCH, "no such object")
    if status == 412:
        return _changed()
    if status in (401, 403):
        return ImageError(ErrorCode.FORBIDDEN, Stage.FETCH, "access denied")
    return ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, f"storage answered {status}")
