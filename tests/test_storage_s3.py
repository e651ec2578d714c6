"""The errors that are reported when S3 cannot be reached, or refuses."""

import itertools
import json
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from botocore.exceptions import ClientError, ParamValidationError

from lungopacity import doctor
from lungopacity.errors import TRANSIENT, ErrorCode, ImageError, UserError
from lungopacity.storage import S3Store, open_store, outage, probe, s3_clients
from lungopacity.storage.probe import check_conditions, check_node
from lungopacity.storage.s3_clients import check_credentials, clients_of
from lungopacity.storage.s3_errors import image_error_of, user_errors
from tests.fault_proxy import _Handler

_AMAZON, _REGIONS = "http://s3.us-east-1.amazonaws.com", ("us-east-1", "eu-central-1")


def failing_list(uri: str) -> str:
    with pytest.raises(UserError) as caught:
        list(open_store(uri).list())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_bucket_is_named(s3_server):
    assert "no bucket 'nowhere'" in failing_list("s3://nowhere/x")


def test_a_missing_bucket_is_no_conflict(s3_server):
    with pytest.raises(UserError, match="no bucket 'nowhere'"):
        open_store("s3://nowhere/x").write("a", b"x", if_absent=True)


def test_a_wrong_secret_is_reported_with_what_to_check(s3_server, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    message = failing_list("s3://tests/x")
    assert "does not accept these credentials" in message
    assert "AWS_SECRET_ACCESS_KEY" in message


@pytest.mark.parametrize("credentials", ["wrong", "expired"])
def test_credentials_are_named_by_a_request_whose_answer_has_no_body(
    s3_uri, monkeypatch, credentials
):
    """HEAD, with which most commands begin."""
    store = open_store(s3_uri)
    store.write("a", b"x")
    if credentials == "wrong":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        told = r"read: .* does not accept these credentials \(SignatureDoesNotMatch\); check AWS_"
    else:
        ask = S3Store._ask

        def answer(store, method, **arguments):
            if method == "head_object":
                raise s3_answer(400, "400")
            if method == "get_object":
                raise s3_answer(400, "ExpiredToken")
            return ask(store, method, **arguments)

        monkeypatch.setattr(S3Store, "_ask", answer)
        told = r"\(ExpiredToken\); get new ones, with a new AWS_SESSION_TOKEN"
    with pytest.raises(UserError, match=told):
        open_store(s3_uri).head("a")


def test_a_node_without_credentials_is_named_before_it_reads(s3_uri, monkeypatch):
    check_node(open_store(s3_uri), "films are read")
    check_credentials.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/no/such/file")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    told = rf"^{re.escape(socket.gethostname())}, where films are read: no AWS credentials found; "
    with pytest.raises(UserError, match=told):
        check_node(open_store(s3_uri), "films are read")


def test_a_node_that_means_another_server_or_reaches_none_is_named_before_it_reads(
    s3_uri, proxy, monkeypatch
):
    """Its films would be missing, or unavailable."""
    monkeypatch.setattr(probe, "_reached", set())
    monkeypatch.setattr(outage, "PATIENCE_S", 0)
    asked = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setattr(outage, "_silent_since", {"http://192.0.2.1": None})
    told = rf"where films are read: .* names {asked} there, and http://192.0.2.1 where the job"
    with pytest.raises(UserError, match=told):
        check_node(open_store(s3_uri), "films are read")
    monkeypatch.setattr(outage, "_silent_since", {asked: None})
    proxy.choose_any = lambda method, path, asked: "reset"
    told = (
        r"where films are read: .* cannot be listed: .*; or, if it was away, start the job again$"
    )
    with pytest.raises(UserError, match=told):
        check_node(open_store(s3_uri), "films are read")
    proxy.choose_any = None
    check_node(open_store(s3_uri), "films are read")


def test_every_endpoint_of_amazon_leads_to_the_same_buckets():
    regional, old = "https://s3.eu-west-1.amazonaws.com", "https://s3.amazonaws.com"
    assert probe._server(regional) == probe._server(old) != probe._server("http://minio:9000")


def test_a_server_that_honours_conditions_passes_the_probe(s3_uri):
    check_conditions(s3_uri)
    assert not list(open_store(s3_uri).list())


@pytest.mark.parametrize("name", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_conditions_is_reported(s3_uri, monkeypatch, name):
    ask = S3Store._ask

    def ignoring(store, method, **arguments):
        arguments.pop(name.replace("-", ""), None)
        return ask(store, method, **arguments)

    monkeypatch.setattr(S3Store, "_ask", ignoring)
    with pytest.raises(UserError, match=f"the server ignores {name}, so two jobs"):
        check_conditions(s3_uri)
    # Only results hold the lease and the records; nothing is written to an archive.
    (told,) = doctor.diagnose_places(results=s3_uri)
    assert (told.state, told.what) == ("missing", "results")
    assert f"the server ignores {name}" in told.detail
    assert told.fix == "keep results on a server that honours it"
    store = open_store(s3_uri)
    assert not list(store.list())
    (told,) = doctor.diagnose_places(storage=s3_uri)
    assert told.detail.endswith("nothing lies there")
    if name == "If-Match":
        store.write("a", b"another")
        monkeypatch.setattr(store._ready.quick, "_store", None)
        with pytest.raises(ImageError) as caught:
            store.read("a", etag="0" * 32)
        assert caught.value.code is ErrorCode.CHANGED


def s3_answer(status: int, code: str) -> ClientError:
    return ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


@pytest.mark.parametrize(
    ("status", "s3_code", "code", "message"),
    [
        (404, "NoSuchKey", ErrorCode.MISSING, "no such object (NoSuchKey)"),
        (404, "NoSuchBucket", ErrorCode.MISSING, "no such object (NoSuchBucket)"),
        (403, "RequestTimeTooSkewed", ErrorCode.FORBIDDEN, "access denied (RequestTimeTooSkewed)"),
        (403, "403", ErrorCode.FORBIDDEN, "access denied"),
        (403, "AccessDenied: Jane Doe", ErrorCode.FORBIDDEN, "access denied"),
        (400, "ExpiredToken", ErrorCode.UNAVAILABLE, "storage answered 400 (ExpiredToken)"),
        (
            400,
            "KMS.DisabledException",
            ErrorCode.UNAVAILABLE,
            "storage answered 400 (KMS.DisabledException)",
        ),
        (
            403,
            "InvalidObjectState",
            ErrorCode.FORBIDDEN,
            "archived in a cold storage class; restore it, then screen again",
        ),
    ],
)
def test_each_s3_answer_to_a_read_has_its_code_and_message(status, s3_code, code, message):
    told = image_error_of(s3_answer(status, s3_code))
    assert (told.code, told.message) == (code, message)


@pytest.mark.parametrize(
    ("status", "s3_code", "message"),
    [
        (400, "ExpiredToken", "does not accept these credentials (ExpiredToken)"),
        (403, "RequestTimeTooSkewed", "the clocks of this machine"),
        (403, "403", "access denied (403)"),
        (503, "a <b>", "answered 503"),
    ],
)
def test_each_s3_answer_about_a_place_has_its_user_error(status, s3_code, message):
    with pytest.raises(UserError, match=re.escape(message)), user_errors("x", "b", "http://s3"):
        raise s3_answer(status, s3_code)


@pytest.mark.parametrize("lost", ["IsTruncated", "NextContinuationToken", "ContinuationToken"])
def test_a_listing_that_does_not_say_how_it_continues_is_refused(s3_uri, monkeypatch, lost):
    """A server that ignores ContinuationToken returns the first page for ever."""
    store, ask = open_store(s3_uri), S3Store._ask
    for key in "abcde":
        store.write(key, b"")

    def forgetful(store, method, **arguments):
        arguments.pop(lost, None)
        answer = ask(store, method, **arguments, MaxKeys=2)
        return {name: value for name, value in answer.items() if name != lost}

    monkeypatch.setattr(S3Store, "_ask", forgetful)
    with pytest.raises(UserError, match="does not say how its listing continues"):
        list(itertools.islice(store.list(), 100))


def test_a_wrong_endpoint_is_reported(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert "no server answers" in failing_list("s3://tests/x")
    with pytest.raises(ImageError, match=f"no server answers at http://127.0.0.1:{port}; check"):
        open_store("s3://tests").read("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example")
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{port}")
    told = f"no proxy answers at http://***:***@127.0.0.1:{port}; check HTTPS_PROXY, HTTP_PROXY and"
    assert told in failing_list("s3://tests/x")


def test_missing_credentials_are_reported(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "no AWS credentials" in failing_list("s3://tests/x")
    with pytest.raises(ImageError, match="no AWS credentials found; set AWS_ACCESS_KEY_ID"):
        open_store("s3://tests").read("x")


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [("https://s3.hospital.example", "https://s3.hospital.example"),
     (None, "https://s3.eu-central-1.amazonaws.com")],
)  # fmt: skip
def test_every_client_asks_the_server_that_the_profile_names(
    monkeypatch, tmp_path, endpoint, asked
):
    for name in ("ENDPOINT_URL", "ENDPOINT_URL_S3", "REGION", "DEFAULT_REGION", "CA_BUNDLE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    authorities = str(tmp_path / "ca.pem") if endpoint else ""
    named = f"endpoint_url = {endpoint}\nca_bundle = {authorities}" if endpoint else ""
    (tmp_path / "config").write_text(f"[profile own]\nregion = eu-central-1\n{named}\n")
    (tmp_path / "keys").write_text("[own]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "own")
    monkeypatch.setattr(s3_clients, "_region_of", lambda *_: "eu-central-1")
    clients = clients_of("films")
    filesystem, _ = open_store("s3://films").arrow_filesystem()
    arrow = filesystem.__reduce__()[1][0]
    assert clients.boto3.meta.endpoint_url == asked
    assert clients.quick._store.config["endpoint"] == asked
    assert f"{arrow['scheme']}://{arrow['endpoint_override']}" == asked
    assert arrow["tls_ca_file_path"] == authorities
    url = clients.boto3.generate_presigned_url("get_object", {"Bucket": "films", "Key": "a"})
    assert url.startswith(f"{asked}/films/a?") or not endpoint
    assert doctor.report(list(doctor._s3())).count(asked) == 1


class _Frankfurt(_Handler):
    """A proxy before an endpoint of Amazon. The bucket lies in another region than the endpoint's,
    and requests that are signed for a wrong region are refused."""

    asked: set[tuple[str, str]]

    def _forward(self) -> None:
        self.path = self.path.removeprefix(_AMAZON)
        region = self.headers["Authorization"].split("/")[2]
        self.asked.add((self.headers["User-Agent"].partition("/")[0], region))
        if region == "eu-central-1":
            super()._forward()
        else:
            self._answer(301, {}, b"<Error><Code>PermanentRedirect</Code></Error>")

    do_GET = do_HEAD = _forward

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        super()._answer(status, {**headers, "x-amz-bucket-region": "eu-central-1"}, body)


def test_every_client_finds_the_region_of_the_bucket_and_goes_through_the_proxy(
    s3_uri, proxy, monkeypatch
):
    open_store(s3_uri).write("a", b"x")
    proxy.RequestHandlerClass, _Frankfurt.asked = _Frankfurt, set()
    for name in ("REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _AMAZON)
    monkeypatch.setenv("http_proxy", proxy.url)
    store = open_store(s3_uri)
    assert store.head("a") is not None
    filesystem, root = store.arrow_filesystem()
    assert filesystem.open_input_stream(f"{root}/a").read() == b"x"
    # No request by this one: it keeps the variables about proxies that it was imported with.
    assert store._ready.quick._store.config["region"] == "eu-central-1"
    at = {region: {agent for agent, of in _Frankfurt.asked if of == region} for region in _REGIONS}
    assert at == {"us-east-1": {"Boto3"}, "eu-central-1": {"Boto3", "aws-sdk-cpp"}}
    monkeypatch.setenv("no_proxy", "amazonaws.com")
    assert not store.arrow_filesystem()[0].__reduce__()[1][0]["proxy_options"]["host"]


class _Role(BaseHTTPRequestHandler):
    """Serves the S3 server's keys as the credentials of a container's role."""

    keys: dict[str, str]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(str(self.headers["User-Agent"]))
        answer = json.dumps(self.keys).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


def test_arrow_renews_the_credentials_of_a_role_by_itself(s3_uri, monkeypatch, tmp_path):
    open_store(s3_uri).write("a", b"x")
    assert open_store(s3_uri).arrow_filesystem()[0].__reduce__()[1][0]["access_key"]
    _Role.asked, _Role.keys = (
        [],
        {
            "AccessKeyId": os.environ["AWS_ACCESS_KEY_ID"],
            "SecretAccessKey": os.environ["AWS_SECRET_ACCESS_KEY"],
            "Token": "",
            "Expiration": f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}",
        },
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Role)
    Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", uri)
    filesystem, root = open_store(s3_uri).arrow_filesystem()
    assert filesystem.open_input_stream(f"{root}/a").read() == b"x"
    server.shutdown()
    server.server_close()
    assert any(agent.startswith("aws-sdk-cpp") for agent in _Role.asked)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_ENDPOINT_URL", "site:9000", "Invalid endpoint: site:9000; begin AWS_ENDPOINT_URL"),
        ("AWS_PROFILE", "nosuch", r"profile \(nosuch\) could not be found; check the AWS var"),
    ],
)
def test_a_wrong_aws_variable_is_reported(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^S3 cannot be used: .*{message}"):
        open_store("s3://tests/x").head("a")


def test_a_server_without_a_certificate_that_is_trusted_is_told_with_the_mend(
    s3_server, monkeypatch
):
    endpoint = s3_server.endpoint_url.replace("http://", "https://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    said = rf"no TLS connection to {endpoint} \(.*\); set AWS_CA_BUNDLE to .*, write http://$"
    with pytest.raises(UserError, match=said):
        list(open_store("s3://tests/x").list())


def test_a_node_without_the_profile_gives_errors_that_are_retried(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    store = open_store("s3://tests/x")
    for fetch in (store.read, lambda key: store.open_local(key).__enter__()):
        with pytest.raises(ImageError, match=r"profile \(nosuch\) could not be found") as caught:
            fetch("a")
        assert caught.value.code in TRANSIENT


def test_a_message_of_botocore_becomes_one_line():
    said = r"^x: Parameter validation failed: a b$"
    with pytest.raises(UserError, match=said), user_errors("x", "b", "http://s3"):
        raise ParamValidationError(report="a\nb")
