"""What the network does to a fetch, between the real server and our client."""

import pytest

from lungopacity.errors import ErrorCode, ImageError
from lungopacity.storage import open_store
from tests.fault_proxy import fault_proxy

CONTENT = bytes(range(256)) * 300


@pytest.fixture
def proxy(s3_server, monkeypatch):
    monkeypatch.setattr("lungopacity.storage.s3._BACKOFF_S", 0.005)
    with fault_proxy(s3_server.endpoint_url) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "flip"])
def test_a_passing_fault_is_mended_by_fetching_again(proxy, s3_uri, fault):
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = fault, 2
    assert store.read("a") == CONTENT
    assert sum(proxy.gets.values()) == 3
    proxy.gets.clear()
    with store.open_local("a") as file:
        assert file.read() == CONTENT
    assert sum(proxy.gets.values()) == 3


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("cut", ErrorCode.UNAVAILABLE, "connection broke|cut short"),
        ("flip", ErrorCode.DIGEST_MISMATCH, "differs from"),
    ],
)
def test_a_lasting_fault_has_its_code_and_gives_no_bytes(proxy, s3_uri, fault, code, message):
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = fault, 1000
    with pytest.raises(ImageError, match=message) as caught:
        store.read("a")
    assert caught.value.code is code
    assert sum(proxy.gets.values()) == 4


def test_a_server_that_only_fails_is_unavailable(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("lungopacity.storage.s3._REQUEST_ATTEMPTS", 2)
    store = open_store(s3_uri)
    store.write("a", CONTENT)
    proxy.fault, proxy.times = "503", 1000
    with pytest.raises(ImageError) as caught:
        store.read("a")
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert sum(proxy.gets.values()) == 2
