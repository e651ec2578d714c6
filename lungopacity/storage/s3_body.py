"""The body of what S3 answers, whole and checked.

boto3 does not retry a body that ends early, and nobody notices a flipped byte: botocore hands on
both as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage

_CHUNK_BYTES = 1 << 20
_OF_MD5 = re.compile(r"[0-9a-fA-F]{32}(?:-[1-9]\d{0,4})?")


class BodyError(ImageError):
    """Worth fetching again."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, Stage.FETCH, message)


class UnlikeEtagError(BodyError):
    """A whole body, of an object whose ETag tells a number of parts, and is not made of its MD5s.

    It was altered on its way; or the server makes such ETags of something else: MinIO under
    `--no-compat` of chance, Ozone of the names of parts, Alibaba's OSS by a rule of its own.
    """

    def __init__(self, digest: str) -> None:
        """digest: of the body that came, as the ETag would have it."""
        super().__init__(ErrorCode.DIGEST_MISMATCH, "differs from the stored MD5s of its parts")
        self.digest = digest


PartBytes = Callable[[int], int | None]
"""Of the number of a part, from 1, its size; None where the server does not tell."""
ETAGS_VARIABLE = "LUNGOPACITY_ETAGS"
OPAQUE = "opaque"
"""What the variable says where ETags are no MD5s, though they look so: then none is compared. VAST
makes such of the metadata of what was written by NFS or SMB, and no header tells
(https://kb.vastdata.com/documentation/docs/handling-object-etags-1)."""


def take_body(
    answer: dict[str, Any], take: Callable[[bytes], object], part_bytes: PartBytes | None
) -> None:
    """Give the body of boto3's answer to `take`, piece by piece.

    Its ETag is computed anew where that is known to be made of MD5s. Else, and of a range of an
    object, only the length is checked, and what checksum of the whole botocore has code for
    (CRC64NVME, the default of some multipart uploads, it has by awscrt alone).

    part_bytes: is asked of an object that was uploaded in parts. None: no ETag is made of MD5s.
    Raises `BodyError` where the body broke off or was altered on its way, after what had come,
    `UnlikeEtagError` where that is not certain; and what `take` and `part_bytes` raise.
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
            "differs from the MD5 that its ETag looks like; if this server makes ETags of "
            f"something else, set {ETAGS_VARIABLE}={OPAQUE}",
        )
    # Some programs upload parts of many sizes; their bounds are not known then.
    if part_bytes and all(part_bytes(n) == md5s.size_bytes for n in range(2, parts)):
        raise UnlikeEtagError(md5s.etag(parts))


class _PartMd5s:
    """MD5 of each part of a body that comes in pieces."""

    def __init__(self, size_bytes: int | None) -> None:
        """size_bytes: of each part but the last; None: there is nothing to compare with."""
        self.size_bytes = size_bytes
        self._ended: list[bytes] = []
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._left = size_bytes or 0

    def update(self, piece: bytes) -> None:
        if self.size_bytes is None:
            return
        rest = memoryview(piece)
        while len(rest) > self._left:
            self._md5.update(rest[: self._left])
            rest = rest[self._left :]
            self._ended.append(self._md5.digest())
            self._md5 = hashlib.md5(usedforsecurity=False)
            self._left = self.size_bytes
        self._md5.update(rest)
        self._left -= len(rest)

    def etag(self, parts: int | None) -> str:
        """As of an upload in so many parts; None: of one that was put whole."""
        if parts is None:
            return self._md5.hexdigest()
        whole = b"".join([*self._ended, self._md5.digest()])
        return f"{hashlib.md5(whole, usedforsecurity=False).hexdigest()}-{parts}"


def _pieces(body: Any) -> Iterator[bytes]:
    """Of botocore's streaming body. Raises `BodyError` where it breaks off, and does not take for
    that what is raised by those who take the pieces."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError, ReadTimeoutError

    try:
        while piece := body.read(_CHUNK_BYTES):
            yield piece
    except FlexibleChecksumError as error:
        raise BodyError(ErrorCode.DIGEST_MISMATCH, "differs from its checksum") from error
    except ReadTimeoutError as error:
        raise BodyError(ErrorCode.TIMEOUT, "the body stopped coming") from error
    except (BotoCoreError, OSError) as error:
        # urllib3's own exceptions are wrapped by botocore, or derive from OSError.
        raise BodyError(
            ErrorCode.UNAVAILABLE, f"connection broke ({type(error).__name__})"
        ) from error


def etag_of(answer: dict[str, Any]) -> str:
    """Without quotes, and the mark of those that some servers call weak."""
    return str(answer["ETag"]).removeprefix("W/").strip('"')


def _parts(answer: dict[str, Any]) -> int | None:
    """In how many parts it was uploaded; None where it was put whole."""
    _, dash, parts = etag_of(answer).partition("-")
    return int(parts) if dash else None


def _first_part_bytes(answer: dict[str, Any], part_bytes: PartBytes) -> int | None:
    """The size that all parts but the last can have, of one put whole its own; None where the ETag
    is not made of MD5s, or the server does not tell.

    It is not under KMS or customer keys:
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    encrypted = (
        answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    )
    if encrypted or "ContentRange" in answer or not _OF_MD5.fullmatch(etag_of(answer)):
        return None
    size_bytes, parts = int(answer["ContentLength"]), _parts(answer) or 1
    if parts == 1:
        return max(1, size_bytes)  # of a part of no bytes there would be no end
    first = part_bytes(1)
    return first if first and (parts - 1) * first < size_bytes <= parts * first else None
