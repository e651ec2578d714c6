"""The clients of S3: one boto3 client and one `QuickGet` per bucket, shared within a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from lungopacity.errors import UserError
from lungopacity.storage.outage import answered
from lungopacity.storage.quick_get import QuickGet
from lungopacity.storage.s3_errors import NO_CREDENTIALS

_REQUEST_ATTEMPTS = 5
"""Attempts of botocore, with its own backoff, for refused connections and server errors."""
_READ_TIMEOUT_S = 60


def aws_session() -> Any:
    """A boto3 session with the credentials and region of the standard AWS variables and files."""
    import boto3
    import botocore.session

    session = botocore.session.get_session()
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_parse_timestamp)
    return boto3.session.Session(botocore_session=session)


def _parse_timestamp(value: Any) -> datetime:
    """As botocore does, but Python parses ISO 8601: botocore's parser takes three fifths of the CPU
    time of a listing."""
    import botocore.utils

    try:
        parsed = datetime.fromisoformat(value)
        if parsed.tzinfo is not None:
            return parsed
    except (TypeError, ValueError):
        pass
    by_botocore: datetime = botocore.utils.parse_timestamp(value)
    return by_botocore


@dataclass(frozen=True)
class S3Clients:
    """The clients of one bucket."""

    boto3: Any
    quick: QuickGet


_known_clients: dict[tuple[str, ...], S3Clients] = {}
_making_clients = threading.Lock()


def clients_of(bucket: str) -> S3Clients:
    """This process's clients, made once per bucket and values of the AWS variables: boto3 takes a
    tenth of a second of CPU time to make one, and every Ray task brings its own store."""
    variables = (f"{name}={value}" for name, value in os.environ.items() if name[:4] == "AWS_")
    key = (bucket, *sorted(variables))
    with _making_clients:
        if key not in _known_clients:
            client = _client_of(bucket)
            _known_clients[key] = S3Clients(client, QuickGet(bucket, aws_session(), client))
        return _known_clients[key]


def _client_of(bucket: str) -> Any:
    """A boto3 client in the bucket's own region. boto3 finds that by itself where the AWS variables
    name another one or none; obstore and Arrow, which take the region from its client, do not."""
    client = s3_client()
    if not is_amazon(client.meta.endpoint_url):
        return client
    region = _region_of(bucket, client)
    return client if region in (None, client.meta.region_name) else s3_client(region)


def is_amazon(endpoint: str) -> bool:
    """Whether it is one of Amazon's endpoints, each of which leads to every bucket."""
    host = (urlsplit(endpoint).hostname or "").removesuffix(".cn")
    return host.endswith(".amazonaws.com")


def _region_of(bucket: str, client: Any) -> str | None:
    """None if it is not told. It is told even to those who may not list the bucket."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError:
        return None  # the first request that has to succeed tells why
    headers: Mapping[str, str] = answer["ResponseMetadata"].get("HTTPHeaders", {})
    return headers.get("x-amz-bucket-region")


@cache
def check_credentials() -> None:
    """Raises `UserError` if this process has no AWS credentials. Looks no more once it has found
    some: that takes milliseconds."""
    if aws_session().get_credentials() is None:
        raise UserError(NO_CREDENTIALS)


def s3_client(region: str | None = None) -> Any:
    """A new boto3 client, by default in the region that the AWS variables or files name.

    It addresses buckets of a custom endpoint by path, whichever variable or file names the
    endpoint: that needs no DNS name per bucket. Raises `UserError`.
    """
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ReadTimeoutError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=_READ_TIMEOUT_S,
    )
    try:
        session = aws_session()
        region = region or session.region_name or "us-east-1"
        client = session.client("s3", config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        reason = " ".join(str(error).split())
        fix = "check the AWS variables and profiles"
        if reason.startswith("Invalid endpoint"):
            fix = "begin AWS_ENDPOINT_URL, or the profile's endpoint_url, with http:// or https://"
        raise UserError(f"S3 cannot be used: {reason}; {fix}") from error
    endpoint = client.meta.endpoint_url

    def give_up_if_mute(caught_exception: Exception | None = None, **_: object) -> None:
        # What accepts connections and never answers is no server of S3. Five attempts would take
        # five minutes to find that out.
        if isinstance(caught_exception, ReadTimeoutError) and endpoint not in answered():
            raise caught_exception

    client.meta.events.register_first("needs-retry.s3", give_up_if_mute)
    return client
