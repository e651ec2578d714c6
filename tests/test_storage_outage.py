"""A server that does not answer for a while, or for good."""

import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
)

from lungopacity.errors import ErrorCode, UserError
from lungopacity.storage import open_store, outage
from tests.fault_proxy import code_of

CONTENT = bytes(range(256)) * 300


def server_down(proxy, seconds: float) -> threading.Timer:
    """The proxy resets every connection for so long."""
    proxy.choose_any = lambda method, path, asked: "reset"
    back = threading.Timer(seconds, setattr, (proxy, "choose_any", None))
    back.start()
    return back


def test_a_server_that_comes_back_within_a_minute_is_waited_for(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("lungopacity.storage.s3_clients._REQUEST_ATTEMPTS", 1)
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    server_down(proxy, 2)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(store.read, ["a"] * 8)) == {CONTENT}
    server_down(proxy, 1)
    store.write("b", CONTENT)
    assert [item.key for item in store.list("b")] == ["b"]


def test_a_server_that_stays_away_is_waited_for_once_and_not_by_every_object(
    proxy, s3_uri, monkeypatch
):
    monkeypatch.setattr("lungopacity.storage.s3_clients._REQUEST_ATTEMPTS", 1)
    monkeypatch.setattr("lungopacity.storage.outage.PATIENCE_S", 1.5)
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    timer = server_down(proxy, 600)
    began = time.monotonic()
    for _ in range(20):
        assert code_of(lambda: store.read("a")) is ErrorCode.UNAVAILABLE
    assert 1.5 < time.monotonic() - began < 20  # every object waiting would take 30
    timer.cancel()
    proxy.choose_any = None
    assert store.read("a") == CONTENT
    server_down(proxy, 0.5).join()
    assert store.read("a") == CONTENT


def test_a_request_that_never_gets_through_is_given_up_even_if_others_do(monkeypatch):
    monkeypatch.setattr(outage, "PATIENCE_S", 1.0)
    monkeypatch.setattr(outage, "_PAUSE_S", 0.05)
    monkeypatch.setattr(outage, "_silent_since", {})
    asked = []

    def request() -> None:
        outage.heard("http://films")  # by another thread
        asked.append(time.monotonic())
        if asked[-1] - asked[0] < 10:
            raise EndpointConnectionError(endpoint_url="http://films")

    with pytest.raises(EndpointConnectionError):
        outage.patiently("http://films", request)
    assert asked[-1] - asked[0] > 0.9


@pytest.mark.parametrize(
    "silence", [ConnectionClosedError, ConnectTimeoutError, EndpointConnectionError]
)
def test_a_server_that_refuses_a_request_is_back(monkeypatch, silence):
    monkeypatch.setattr(outage, "_PAUSE_S", 0.01)
    monkeypatch.setattr(outage, "_silent_since", {"http://films": None})
    answers = iter([silence(endpoint_url="http://films")] * 2 + [ClientError({}, "GetObject")])

    def request() -> None:
        raise next(answers)

    with pytest.raises(ClientError):
        outage.patiently("http://films", request)
    assert outage._silent_since == {"http://films": None}


IN_ANOTHER_PROCESS = """
import pickle, sys
from lungopacity.storage import s3_clients
s3_clients._REQUEST_ATTEMPTS = 1
print(pickle.load(sys.stdin.buffer).read("a").decode())
"""


def test_a_process_that_starts_in_an_outage_waits_as_the_sender_of_its_store_would(
    proxy, s3_uri, monkeypatch
):
    monkeypatch.setattr("lungopacity.storage.s3_clients._REQUEST_ATTEMPTS", 1)
    store = open_store(s3_uri)
    store.write("a", b"here")
    sent = pickle.dumps(store)
    timer = server_down(proxy, 5)
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], input=sent, capture_output=True, timeout=60
    )
    timer.join()
    assert done.stdout == b"here\n", done.stderr
    assert b"cannot be reached; waiting for it" in done.stderr


def test_a_server_that_never_answered_is_not_waited_for(monkeypatch, s3_server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr("lungopacity.storage.s3_clients._REQUEST_ATTEMPTS", 1)
        began = time.monotonic()
        assert code_of(lambda: open_store("s3://films").read("a")) is ErrorCode.UNAVAILABLE
        assert time.monotonic() - began < 40  # waiting takes 60


def test_what_never_answers_is_told_of_soon_and_given_up_after_one_attempt(monkeypatch, caplog):
    monkeypatch.setattr("lungopacity.storage.s3_clients._READ_TIMEOUT_S", 1)
    monkeypatch.setattr(outage, "_SILENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        began = time.monotonic()
        assert code_of(lambda: open_store("s3://films").read("a")) is ErrorCode.TIMEOUT
        with pytest.raises(UserError, match=f"{endpoint} did not answer in time; check AWS"):
            open_store("s3://films").head("a")
        assert time.monotonic() - began < 4  # two requests, of a second each
    assert caplog.messages == [f"the storage at {endpoint} has not answered yet; waiting for it"]
