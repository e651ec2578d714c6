"""Whole small objects by obstore, which takes a sixth of boto3's CPU time for one.

Only plain successes count. Whatever is unusual is left to boto3, which has the retries, the
checksums and the error codes.
"""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from typing import Any

_PLAIN_KEY = re.compile(r"(?!.*(?:^|/)\.+(?:/|$))[\w.=-]+(?:/[\w.=-]+)*", re.ASCII)
"""obstore escapes or tidies other keys, and would ask for another object."""
_MD5 = re.compile(r"[0-9a-fA-F]{32}")
_FAILURES = 8
_PAUSE_S = 60.0
_TIMEOUT = "60s"


class QuickGet:
    """GETs from one bucket. Used by many threads."""

    def __init__(self, bucket: str, session: Any, client: Any) -> None:
        """session, client: boto3's, whose credentials, region and endpoint are taken over."""
        self._failures = 0
        self._paused_until = 0.0
        self._store: Any = None
        # Without credentials, say: boto3 tells it best.
        with suppress(Exception):
            self._store = _obstore(bucket, session, client)

    def read(self, key: str, etag: str | None, opaque: bool = False) -> bytes | None:
        """The object, whole and equal to its MD5; None: ask boto3.

        key: in the bucket. etag: none but this will do. opaque: ETags are no MD5s.
        """
        if self._store is None or not _PLAIN_KEY.fullmatch(key):
            return None
        if etag and not opaque and not _MD5.fullmatch(etag):
            return None
        # An object whose digest is unknown, a lost network, a certificate that only boto3 trusts:
        # when nothing comes through, it is not worth the double request each time.
        if self._failures >= _FAILURES:
            if time.monotonic() < self._paused_until:
                return None
            self._failures = 0
        from obstore.exceptions import NotFoundError, PreconditionError

        try:
            data = self._checked(key, etag, opaque)
        except (NotFoundError, PreconditionError):
            return None  # an answer like any other; boto3 has its error code
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
        told = str(answer.meta["e_tag"]).strip('"')
        if etag and told != etag:
            return None  # the server takes no notice of If-Match; boto3's way tells it
        data = bytes(answer.bytes())
        if opaque:
            return data
        # The ETag is no MD5 of multipart uploads, nor under KMS: boto3's way checks most of them.
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return data if digest == told.lower() else None


def _obstore(bucket: str, session: Any, client: Any) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    endpoint = client.meta.endpoint_url
    return S3Store(
        bucket,
        # Always: of a profile's endpoint obstore knows nothing, and would ask Amazon.
        endpoint=endpoint,
        region=client.meta.region_name,
        credential_provider=Boto3CredentialProvider(session),
        client_options={"allow_http": endpoint.startswith("http:"), "timeout": _TIMEOUT},
        # To try again is boto3's part.
        retry_config={"max_retries": 0},
    )
