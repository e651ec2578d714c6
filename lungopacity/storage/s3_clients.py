"""What speaks to S3: one boto3 client and one quick reader for each bucket, shared by a process."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lungopacity.errors import UserError
from lungopacity.storage.quick_get import QuickGet

_REQUEST_ATTEMPTS = 5
"""By botocore, with its own backoff: for refused connections and server errors."""


def aws_session() -> Any:
    """boto3's, with the credentials and the region of the standard variables and files."""
    import boto3
    import botocore.session

    session = botocore.session.get_session()
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_parse_timestamp)
    return boto3.session.Session(botocore_session=session)


def _parse_timestamp(value: Any) -> datetime:
    """As botocore does, but ISO 8601 by Python itself: botocore's own way takes three fifths of
    the CPU time of a listing."""
    import botocore.utils

    try:
        parsed = datetime.fromisoformat(value)
        if parsed.tzinfo is not None:
            return parsed
    except (TypeError, ValueError):
        pass
    told: datetime = botocore.utils.parse_timestamp(value)
    return told


@dataclass(frozen=True)
class S3Clients:
    """What speaks to one bucket."""

    boto3: Any
    quick: QuickGet


_known_clients: dict[tuple[str, ...], S3Clients] = {}
_making_clients = threading.Lock()


def clients_of(bucket: str) -> S3Clients:
    """Of this process, made once for each bucket and setting of the AWS variables: boto3 takes a
    tenth of a second of CPU time for a client, and every task of Ray brings a store of its own."""
    variables = (f"{name}={value}" for name, value in os.environ.items() if name[:4] == "AWS_")
    key = (bucket, *sorted(variables))
    with _making_clients:
        if key not in _known_clients:
            client = s3_client()
            _known_clients[key] = S3Clients(client, QuickGet(bucket, aws_session(), client))
        return _known_clients[key]


def s3_client() -> Any:
    """boto3's. An endpoint of one's own, of whatever variable or file, it asks by path: that needs
    no DNS name for each bucket. Raises `UserError`."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=60,
    )
    try:
        session = aws_session()
        return session.client("s3", config=config, region_name=session.region_name or "us-east-1")
    except (BotoCoreError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"S3 cannot be used: {told}; check the AWS variables and profiles"
        ) from error
