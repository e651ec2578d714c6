"""S3 for libraries that read and write it through Arrow, with what boto3 was told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lungopacity.errors import UserError
from lungopacity.storage.s3_clients import aws_session
from lungopacity.storage.s3_errors import NO_CREDENTIALS

if TYPE_CHECKING:
    import pyarrow.fs

_ROLES = ("assume-role-with-web-identity", "container-role", "iam-role")
"""botocore's names for credentials that the platform gives to a pod, a container or a machine."""


def arrow_filesystem(client: Any) -> pyarrow.fs.FileSystem:
    """Arrow's filesystem for the server of the boto3 client. Raises `UserError` without
    credentials."""
    import pyarrow.fs

    session = aws_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise UserError(NO_CREDENTIALS)
    options: dict[str, str | None] = {}
    # A role's credentials expire after hours, and a training may take longer: Arrow finds and
    # renews these by itself. Other kinds it might not find, or it might prefer other ones.
    if credentials.method not in _ROLES or os.environ.get("AWS_ACCESS_KEY_ID"):
        frozen = credentials.get_frozen_credentials()
        options = {
            "access_key": frozen.access_key,
            "secret_key": frozen.secret_key,
            "session_token": frozen.token,
        }
    # Arrow reads neither AWS_CA_BUNDLE nor ca_bundle in a profile.
    authorities = session._session.get_config_variable("ca_bundle")
    if authorities:
        options["tls_ca_file_path"] = authorities
    endpoint = urlsplit(client.meta.endpoint_url)
    return pyarrow.fs.S3FileSystem(
        **options,
        proxy_options=_proxy_of(client.meta.endpoint_url),
        region=client.meta.region_name,
        endpoint_override=endpoint.netloc,
        scheme=endpoint.scheme,
        request_timeout=60,
        connect_timeout=10,
        allow_bucket_creation=False,  # a typo must not create a bucket
    )


def _proxy_of(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name for the URL. boto3 and obstore read
    these variables, and Arrow does not."""
    from botocore.utils import get_environ_proxies

    proxy: str | None = get_environ_proxies(url).get(urlsplit(url).scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
