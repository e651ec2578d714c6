"""What S3 answers, in the words of a row or of a user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.storage.interface import changed

NO_CREDENTIALS = (
    "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)
_FULL = 507
"""The status of a server that has no room left."""
_OF_CREDENTIALS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken")


def status_of(error: Any) -> int:
    """The HTTP status of a botocore `ClientError`; 0 where it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Any) -> str:
    """S3's own word for it, of a botocore `ClientError`; "" where it has none, as of HEAD."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    # Whatever else a server puts there could quote what it was asked for.
    return code if re.fullmatch("[A-Za-z.]+", code) else ""


def image_error_of(error: Any) -> ImageError:
    """Why an object has no bytes, of a botocore `ClientError`."""
    status, code = status_of(error), code_of(error)
    told = f" ({code})" if code else ""
    if status == 404:
        return ImageError(ErrorCode.MISSING, Stage.FETCH, f"no such object{told}")
    if status == 412:
        return changed()
    if code == "InvalidObjectState":
        return ImageError(
            ErrorCode.FORBIDDEN,
            Stage.FETCH,
            "archived in a cold storage class; restore it, then screen again",
        )
    if status in (401, 403):
        return ImageError(ErrorCode.FORBIDDEN, Stage.FETCH, f"access denied{told}")
    return ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, f"storage answered {status}{told}")


def may_pass(error: UserError) -> bool:
    """Whether what `user_errors` raised tells of a server that is busy or away, and not of what a
    person has to mend."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    cause = error.__cause__
    if isinstance(cause, ClientError):
        status = status_of(cause)
        return status in (408, 429) or (status >= 500 and status != _FULL)
    return cause is not None and not isinstance(cause, NoCredentialsError | PartialCredentialsError)


def no_connection(error: Exception, endpoint: str) -> str:
    """Why nothing was asked, of a botocore or operating system's error."""
    from botocore.exceptions import (
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return NO_CREDENTIALS
    if isinstance(error, EndpointConnectionError):
        return f"no server answers at {endpoint}; check AWS_ENDPOINT_URL and the network"
    return f"no connection ({type(error).__name__})"


@contextmanager
def row_errors(endpoint: str) -> Iterator[None]:
    """Turn what S3 says of one object into the `ImageError` of its row."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        ReadTimeoutError,
    )

    try:
        yield
    except ClientError as error:
        raise image_error_of(error) from error
    except (ConnectTimeoutError, ReadTimeoutError) as error:
        raise ImageError(ErrorCode.TIMEOUT, Stage.FETCH, "no answer in time") from error
    except (BotoCoreError, OSError) as error:
        told = no_connection(error, endpoint)
        raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, told) from error


@contextmanager
def user_errors(where: str, bucket: str, endpoint: str) -> Iterator[None]:
    """Turn what S3 says of the whole place into one line with its mend.

    where: what cannot be done, the beginning of that line.
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    try:
        yield
    except (EndpointConnectionError, NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(f"{where}: {no_connection(error, endpoint)}") from error
    except ClientError as error:
        code = code_of(error)
        if code == "NoSuchBucket":
            raise UserError(
                f"{where}: there is no bucket '{bucket}' at {endpoint}; "
                "create it, or correct the name"
            ) from error
        if code in _OF_CREDENTIALS:
            raise UserError(
                f"{where}: {endpoint} does not accept these credentials ({code}); "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            ) from error
        if code == "RequestTimeTooSkewed":
            raise UserError(
                f"{where}: the clock of this machine and that of {endpoint} differ; set this one"
            ) from error
        if status_of(error) == 403:
            raise UserError(
                f"{where}: access denied ({code or 403}); these credentials lack the permission "
                "for it"
            ) from error
        raise UserError(f"{where}: {endpoint} answered {code or status_of(error)}") from error
    except BotoCoreError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
