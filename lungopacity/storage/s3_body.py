"""The body of what S3 answers, whole and checked.

boto3 does not retry a body that ends early, and nobody notices a flipped byte: botocore hands on
both as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage

_CHUNK_BYTES = 1 << 20


class BodyError(ImageError):
    """Worth fetching again."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, Stage.FETCH, message)


def take_body(answer: dict[str, Any], take: Callable[[bytes], object]) -> None:
    """Give the body of boto3's answer to `take`, piece by piece. Of a part of an object, and of one
    with neither MD5 nor a checksum of its whole that botocore has code for (CRC64NVME, the default
    of multipart uploads, it has by awscrt alone), only the length is checked.

    Raises `BodyError` where it broke off or was altered on its way, after what had come; and what
    `take` raises.
    """
    md5 = hashlib.md5(usedforsecurity=False)
    received = 0
    for piece in _pieces(answer["Body"]):
        md5.update(piece)
        received += len(piece)
        take(piece)
    if received != answer["ContentLength"]:
        raise BodyError(
            ErrorCode.UNAVAILABLE,
            f"body cut short: {received} of {answer['ContentLength']} bytes",
        )
    if (
        "ContentRange" not in answer
        and _etag_is_md5(answer)
        and md5.hexdigest() != answer["ETag"].strip('"').lower()
    ):
        raise BodyError(ErrorCode.DIGEST_MISMATCH, "differs from the stored MD5")


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


def _etag_is_md5(answer: dict[str, Any]) -> bool:
    # The ETag is no MD5 for multipart uploads (it has a dash) and under KMS or customer keys:
    # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    etag = answer["ETag"].strip('"')
    encrypted = (
        answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    )
    return len(etag) == 32 and "-" not in etag and not encrypted
