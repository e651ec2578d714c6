"""Turns the errors of S3 into `ImageError` for a row, or `UserError` for the command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from lungopacity.storage.interface import changed

NO_CREDENTIALS = (
    "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
)
_FULL = 507
"""The HTTP status of a server that has no space left."""
_EXPIRED, _SKEWED = "ExpiredToken", "RequestTimeTooSkewed"
_OF_CREDENTIALS = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", _EXPIRED)


def status_of(error: Any) -> int:
    """The HTTP status of a botocore `ClientError`; 0 if it has none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: Any) -> str:
    """S3's error code of a botocore `ClientError`; "" if it has none, as after HEAD."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    # Anything else that a server puts there could quote the request.
    return code if re.fullmatch("[A-Za-z.]+", code) else ""


def with_code(error: Any, ask: Callable[[], object]) -> Any:
    """The botocore `ClientError` of a HEAD, whose answer has no body and so no code; or that of
    another request, `ask`, if that says that credentials or a clock are the reason."""
    from botocore.exceptions import ClientError

    if status_of(error) in (400, 403):
        try:
            ask()
        except ClientError as told:
            if code_of(told) in (*_OF_CREDENTIALS, _SKEWED):
                return told
    return error


def image_error_of(error: Any) -> ImageError:
    """Why an object cannot be read, from a botocore `ClientError`."""
    status, code = status_of(error), code_of(error)
    quoted = f" ({code})" if code else ""
    if status == 404:
        return ImageError(ErrorCode.MISSING, Stage.FETCH, f"no such object{quoted}")
    if status == 412:
        return changed()
    if code == "InvalidObjectState":
        return ImageError(
            ErrorCode.FORBIDDEN,
            Stage.FETCH,
            "archived in a cold storage class; restore it, then screen again",
        )
    if status in (401, 403):
        return ImageError(ErrorCode.FORBIDDEN, Stage.FETCH, f"access denied{quoted}")
    return ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, f"storage answered {status}{quoted}")


def may_pass(error: UserError) -> bool:
    """Whether an error of `user_errors` means a server that is busy or away, rather than something
    that a person has to fix."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    cause = error.__cause__
    if isinstance(cause, ClientError):
        status = status_of(cause)
        return status in (408, 429) or (status >= 500 and status != _FULL)
    return cause is not None and not isinstance(cause, NoCredentialsError | PartialCredentialsError)


def no_connection(error: Exception, endpoint: str) -> str:
    """Why no request got through, from an error of botocore or the operating system."""
    from botocore.exceptions import (
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
        ProxyConnectionError,
        SSLError,
    )

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return NO_CREDENTIALS
    if isinstance(error, EndpointConnectionError):
        return f"no server answers at {endpoint}; check AWS_ENDPOINT_URL and the network"
    if isinstance(error, ProxyConnectionError):
        proxy = error.kwargs["proxy_url"]  # without its password
        return f"no proxy answers at {proxy}; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    if isinstance(error, SSLError):
        return (
            f"no TLS connection to {endpoint} ({error.kwargs['error']}); set AWS_CA_BUNDLE to the "
            "file of its certificate authority or, if it has no TLS, write http://"
        )
    return f"no connection ({type(error).__name__})"


@contextmanager
def row_errors(endpoint: str) -> Iterator[None]:
    """Turn errors of botocore about one object into the `ImageError` of its row."""
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
        reason = no_connection(error, endpoint)
        raise ImageError(ErrorCode.UNAVAILABLE, Stage.FETCH, reason) from error


@contextmanager
def user_errors(
    where: str, bucket: str, endpoint: str, right: str = "a permission for it"
) -> Iterator[None]:
    """Turn errors of botocore about the bucket or server into a `UserError` of one line.

    where: the beginning of that line; it says what cannot be done. right: what a policy has to
    allow for that.
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
        ProxyConnectionError,
        ReadTimeoutError,
        SSLError,
    )

    try:
        yield
    except (
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
        ProxyConnectionError,
        SSLError,
    ) as error:
        raise UserError(f"{where}: {no_connection(error, endpoint)}") from error
    except ClientError as error:
        code = code_of(error)
        if code == "NoSuchBucket":
            raise UserError(
                f"{where}: there is no bucket '{bucket}' at {endpoint}; "
                "create it, or correct the name"
            ) from error
        if code in _OF_CREDENTIALS:
            fix = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            raise UserError(
                f"{where}: {endpoint} does not accept these credentials ({code}); "
                + ("get new ones, with a new AWS_SESSION_TOKEN" if code == _EXPIRED else fix)
            ) from error
        if code == _SKEWED:
            raise UserError(
                f"{where}: the clocks of this machine and of {endpoint} differ; correct this one"
            ) from error
        if status_of(error) == 403:
            raise UserError(
                f"{where}: access denied ({code or 403}); these credentials need {right}"
            ) from error
        raise UserError(f"{where}: {endpoint} answered {code or status_of(error)}") from error
    except (ConnectTimeoutError, ReadTimeoutError) as error:
        fix = "check AWS_ENDPOINT_URL and the network"
        raise UserError(f"{where}: {endpoint} did not answer in time; {fix}") from error
    except BotoCoreError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
