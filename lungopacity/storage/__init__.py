"""The only package that accesses storage: local folders and S3, behind one small interface.

The root of a `Store` is a URI: a path, `file://…` or `s3://bucket/prefix`.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from lungopacity.errors import UserError
from lungopacity.storage.interface import ConflictError, ObjectInfo, Store
from lungopacity.storage.local import LocalStore, absolute
from lungopacity.storage.s3 import S3Store

__all__ = [
    "ConflictError",
    "LocalStore",
    "ObjectInfo",
    "S3Store",
    "Store",
    "check_name",
    "is_name",
    "join_uri",
    "open_store",
    "split_uri",
]


_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:[^\s/]+")


def open_store(uri: str) -> Store:
    """The store at `uri`: a local path, `file://…` or `s3://bucket/prefix`.

    Raises `UserError` if it is none of these, or is empty.
    """
    uri = _tidied(uri)
    if not uri.startswith("s3://"):
        return LocalStore(_path_of(uri))
    bucket, key = _bucket_and_key(uri)
    return S3Store(bucket, key.strip("/"))


def _tidied(uri: str) -> str:
    if not uri or "\0" in uri:
        raise UserError(
            f"{uri!r} is neither a path nor a URI; give a path, file:///folder or "
            "s3://bucket/prefix"
        )
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        # Ray, Arrow and S3 take no other names, and would say so late, and not what to do.
        raise UserError(
            f"{uri}: its name is not valid UTF-8; give it by a link with another name, or set a "
            "locale of UTF-8, such as LC_ALL=C.UTF-8"
        ) from error
    scheme, sign, rest = uri.partition("://")
    if not sign and re.match("(s3|file)(:|//)", uri, re.IGNORECASE):
        # More likely a missing slash or colon than a folder of that name.
        raise UserError(
            f"{uri}: write s3://bucket/prefix, file:///folder or, for a local path, ./{uri}"
        )
    return f"{scheme.lower()}://{rest}" if sign else uri


def _path_of(uri: str) -> Path:
    scheme, sign, rest = uri.partition("://")
    if not sign:
        return Path(uri)
    if scheme != "file":
        raise UserError(
            f"{uri}: storage of kind '{scheme}' is not supported; give a path, file:// or s3://"
        )
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise UserError(f"{uri}: a file URI has three slashes, as in file:///data/films")
    return Path("/" + unquote(path))


def _bucket_and_key(uri: str) -> tuple[str, str]:
    # Everything after the bucket is the key, even question marks: S3 URIs are not URLs.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; write s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"{uri}: '{bucket}' is not a bucket name, which has letters, digits, '.', '_' and '-'"
        )
    return bucket, key


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_name(text: str) -> bool:
    """Whether `text` can be part of a file name, on disk and on S3."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> None:
    """Raises `UserError` unless `is_name(text)`. `what`: the user's word for it."""
    if not is_name(text):
        raise UserError(
            f"{what} {text!r}: use up to 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )


def join_uri(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended as path segments."""
    return "/".join([uri.rstrip("/"), *parts])


def split_uri(uri: str) -> tuple[str, str]:
    """The URI of the parent folder, and the last segment. Raises `UserError` for a bare bucket, and
    as `open_store` does."""
    uri = _tidied(uri)
    if not uri.startswith("s3://"):
        path = absolute(_path_of(uri))
        return str(path.parent), path.name
    if not _bucket_and_key(uri)[1].strip("/"):
        raise UserError(f"{uri} is a bucket; name a file in it, as in s3://bucket/key")
    parent, _, name = uri.rstrip("/").rpartition("/")
    return parent, name
