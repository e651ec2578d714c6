"""Reads the body of an answer of S3, and checks its length and digest.

boto3 does not: it passes on a body that ends early, or that has a flipped byte, as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage

_CHUNK_BYTES = 1 << 20
_MD5_ETAG = re.compile(r"[0-9a-fA-F]{32}(?:-[1-9]\d{0,4})?")


class BodyError(ImageError):
    """A body that is worth fetching again."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, Stage.FETCH, message)


class UnlikeEtagError(BodyError):
    """A complete body whose MD5s do not give the object's multipart ETag.

    Either it was altered in transit, or the server makes such ETags of something else: MinIO under
    `--no-compat` at random, Ozone from the names of parts, Alibaba's OSS by a rule of its own.
    """

    def __init__(self, digest: str) -> None:
        """digest: the ETag computed from the body that was received."""
        super().__init__(ErrorCode.DIGEST_MISMATCH, "differs from the stored MD5s of its parts")
        self.digest = digest


PartBytes = Callable[[int], int | None]
"""From the number of a part, counted from 1, to its size; None if the server does not say."""
ETAGS_VARIABLE = "LUNGOPACITY_ETAGS"
OPAQUE = "opaque"
"""The value of the variable for servers whose ETags look like MD5s and are not: none is compared
then. VAST makes such ETags from the metadata of files written by NFS or SMB, and no header says so
(https://kb.vastdata.com/documentation/docs/handling-object-etags-1)."""


def take_body(
    answer: dict[str, Any], take: Callable[[bytes], object], part_bytes: PartBytes | None
) -> None:
    """Give the body of boto3's answer to `take`, piece by piece, and check it.

    The ETag is recomputed if it is known to be made of MD5s. Otherwise, and for a range of an
    object, only the length is checked, and a checksum of the whole object that botocore can compute
    (CRC64NVME, the default of some multipart uploads, needs awscrt).

    part_bytes: called for an object that was uploaded in parts. None: no ETag is made of MD5s.
    Raises `BodyError`, after the pieces that were received, if the body broke off or was altered
    in transit; `UnlikeEtagError` if it may have been altered; and what `take` and `part_bytes`
    raise.
    """
    md5s = _PartMd5s(_first_part_bytes(answer, part_bytes) if part_bytes else None)
    received = 0
    for piece in _pieces(answer["Body"]):
        md5s.update(piece)
        received += len(piece)
        take(piece)
    if received != answer["ContentLength"]:
        raise BodyError(
            ErrorCode.UNAVAILABLE,
            f"body cut short: {received} of {answer['ContentLength']} bytes",
        )
    parts = _parts(answer)
    if md5s.size_bytes is None or md5s.etag(parts) == etag_of(answer).lower():
        return
    if parts is None:
        raise BodyError(
            ErrorCode.DIGEST_MISMATCH,
            "differs from the MD5 in its ETag; if this server's ETags are not MD5s, set "
            f"{ETAGS_VARIABLE}={OPAQUE}",
        )
    # If a program uploaded parts of different sizes, their bounds are unknown.
    if part_bytes and all(part_bytes(n) == md5s.size_bytes for n in range(2, parts)):
        raise UnlikeEtagError(md5s.etag(parts))


class _PartMd5s:
    """The MD5 of each part of a body that arrives in pieces."""

    def __init__(self, size_bytes: int | None) -> None:
        """size_bytes: of each part but the last; None: no MD5 is computed."""
        self.size_bytes = size_bytes
        self._complete: list[bytes] = []
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._left = size_bytes or 0

    def update(self, piece: bytes) -> None:
        if self.size_bytes is None:
            return
        rest = memoryview(piece)
        while len(rest) > self._left:
            self._md5.update(rest[: self._left])
            rest = rest[self._left :]
            self._complete.append(self._md5.digest())
            self._md5 = hashlib.md5(usedforsecurity=False)
            self._left = self.size_bytes
        self._md5.update(rest)
        self._left -= len(rest)

    def etag(self, parts: int | None) -> str:
        """The ETag of an upload in so many parts; None: in a single PUT."""
        if parts is None:
            return self._md5.hexdigest()
        digests = b"".join([*self._complete, self._md5.digest()])
        return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{parts}"


def _pieces(body: Any) -> Iterator[bytes]:
    """The pieces of botocore's streaming body. Raises `BodyError` if it breaks off. A generator, so
    that errors of the code that consumes the pieces are not mistaken for that."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError, ReadTimeoutError

    try:
        while piece := body.read(_CHUNK_BYTES):
            yield piece
    except FlexibleChecksumError as error:
        raise BodyError(ErrorCode.DIGEST_MISMATCH, "differs from its checksum") from error
    except ReadTimeoutError as error:
        raise BodyError(ErrorCode.TIMEOUT, "the body stopped arriving") from error
    except (BotoCoreError, OSError) as error:
        # botocore wraps urllib3's exceptions, or they derive from OSError.
        raise BodyError(
            ErrorCode.UNAVAILABLE, f"connection broke ({type(error).__name__})"
        ) from error


def etag_of(answer: dict[str, Any]) -> str:
    """The ETag of an answer or a listed object, without its quotes and without the mark of a weak
    one: proxies that compress add it to what S3 sent."""
    return str(answer["ETag"]).removeprefix("W/").strip('"')


def _parts(answer: dict[str, Any]) -> int | None:
    """In how many parts the object was uploaded; None if in a single PUT."""
    _, dash, parts = etag_of(answer).partition("-")
    return int(parts) if dash else None


def _first_part_bytes(answer: dict[str, Any], part_bytes: PartBytes) -> int | None:
    """The size of every part but the last, if they all have the same; for an object of a single
    part, its own size. None if the ETag is not made of MD5s, or the server does not say.

    Under KMS or customer keys, ETags are not made of MD5s:
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    encrypted = (
        answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    )
    if encrypted or "ContentRange" in answer or not _MD5_ETAG.fullmatch(etag_of(answer)):
        return None
    size_bytes, parts = int(answer["ContentLength"]), _parts(answer) or 1
    if parts == 1:
        return max(1, size_bytes)  # `_PartMd5s` would loop for ever on parts of no bytes
    first = part_bytes(1)
    return first if first and (parts - 1) * first < size_bytes <= parts * first else None
