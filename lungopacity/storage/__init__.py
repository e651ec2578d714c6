"""The only place that talks to storage: local folders and S3, behind one small interface.

A `Store` is rooted at a URI: a path, `file://…` or `s3://bucket/prefix`.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lungopacity.errors import UserError
from lungopacity.storage.interface import ConflictError, ObjectInfo, Store
from lungopacity.storage.local import LocalStore
from lungopacity.storage.s3 import S3Store

__all__ = [
    "ConflictError",
    "LocalStore",
    "ObjectInfo",
    "S3Store",
    "Store",
    "join_uri",
    "open_store",
    "split_uri",
]


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
    # As `open_store` reads the path: of the URIs, these alone are escaped.
    return parent, unquote(name) if uri.startswith("file://") else name
