"""Fetches whole objects with obstore, which takes a fifth of boto3's CPU time for a small one.

Only plain successes count. Everything unusual is left to boto3, for which this package has retries,
checksums and error codes.
"""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from typing import Any

_PLAIN_KEY = re.compile(r"(?!.*(?:^|/)\.+(?:/|$))[\w.=-]+(?:/[\w.=-]+)*", re.ASCII)
"""obstore escapes or normalises other keys, and would ask for another object."""
_MD5 = re.compile(r"[0-9a-fA-F]{32}")
_FAILURES = 8
_PAUSE_S = 60.0
_TIMEOUT = "60s"


class QuickGet:
    """GETs from one bucket. Many threads may use it at once."""

    def __init__(self, bucket: str, session: Any, client: Any) -> None:
        """session, client: boto3's; their credentials, region and endpoint are used."""
        self._failures = 0
        self._paused_until = 0.0
        self._store: Any = None
        # For example without credentials: boto3 gives the better error.
        with suppress(Exception):
            self._store = _obstore(bucket, session, client)

    def read(self, key: str, etag: str | None, opaque: bool = False) -> bytes | None:
        """The whole object, if it matches its MD5. None: use boto3 instead.

        key: in the bucket. etag: the object must have this one. opaque: ETags are not MD5s.
        """
        if self._store is None or not _PLAIN_KEY.fullmatch(key):
            return None
        if etag and not opaque and not _MD5.fullmatch(etag):
            return None
        # Digests that are unknown, a lost network, a certificate that only boto3 trusts: while
        # nothing succeeds, a second request for every object is not worth it.
        if self._failures >= _FAILURES:
            if time.monotonic() < self._paused_until:
                return None
            self._failures = 0
        from obstore.exceptions import NotFoundError, PreconditionError

        try:
            data = self._checked(key, etag, opaque)
        except (NotFoundError, PreconditionError):
            return None  # no failure of obstore; boto3's way has the error code
        except Exception:
            data = None
        if data is not None:
            self._failures = 0
            return data
        self._failures += 1
        self._paused_until = time.monotonic() + _PAUSE_S
        return None

    def _checked(self, key: str, etag: str | None, opaque: bool) -> bytes | None:
        answer = self._store.get(key, options={"if_match": f'"{etag}"'} if etag else None)
        found = str(answer.meta["e_tag"]).strip('"')
        if etag and found != etag:
            return None  # the server ignores If-Match; boto3's way raises the error
        data = bytes(answer.bytes())
        if opaque:
            return data
        # Multipart uploads and objects under KMS have other ETags: boto3's way checks most of them.
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return data if digest == found.lower() else None


def _obstore(bucket: str, session: Any, client: Any) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    endpoint = client.meta.endpoint_url
    return S3Store(
        bucket,
        # Always: obstore does not read a profile's endpoint, and would ask Amazon.
        endpoint=endpoint,
        region=client.meta.region_name,
        credential_provider=Boto3CredentialProvider(session),
        client_options={"allow_http": endpoint.startswith("http:"), "timeout": _TIMEOUT},
        # boto3 does the retries.
        retry_config={"max_retries": 0},
    )
