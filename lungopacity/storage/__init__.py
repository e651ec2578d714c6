"""The only place that talks to storage: local folders and S3, behind one small interface.

A `Store` is rooted at a URI: a path, `file://…` or `s3://bucket/prefix`.
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

    Raises `UserError` where it is none of these, or is empty.
    """
    uri = _tidied(uri)
    if not uri.startswith("s3://"):
        return LocalStore(_path_of(uri))
    bucket, key = _bucket_and_key(uri)
    return S3Store(bucket, key.strip("/"))


def _tidied(uri: str) -> str:
    if not uri or "\0" in uri:
        raise UserError(f"{uri!r} is no path and no URI; give one")
    scheme, sign, rest = uri.partition("://")
    if not sign and re.match("(s3|file):", uri, re.IGNORECASE):
        # Most likely a slash was lost, and no folder of that name is meant.
        raise UserError(f"{uri}: write s3://bucket/prefix, file:///folder or, of a path, ./{uri}")
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
    # Everything after the bucket is the key, question marks included: S3 URIs are not URLs.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: no bucket; write s3://bucket/prefix")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"{uri}: '{bucket}' is no bucket's name, which has letters, digits, '.', '_' and '-'"
        )
    return bucket, key


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_name(text: str) -> bool:
    """Whether it can stand in the name of a file, on disk and on S3."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> None:
    """Raises `UserError` where it is no `is_name`. `what`: what the user calls it."""
    if not is_name(text):
        raise UserError(
            f"{what} {text!r}: use up to 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )


def join_uri(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended as further path segments."""
    return "/".join([uri.rstrip("/"), *parts])


def split_uri(uri: str) -> tuple[str, str]:
    """The URI of the parent folder, and the last segment. Raises `UserError` for what has none."""
    uri = _tidied(uri)
    if not uri.startswith("s3://"):
        path = absolute(_path_of(uri))
        return str(path.parent), path.name
    if not _bucket_and_key(uri)[1].strip("/"):
        raise UserError(f"{uri}: is a bucket; name a file in it, as s3://bucket/key")
    parent, _, name = uri.rstrip("/").rpartition("/")
    return parent, name
