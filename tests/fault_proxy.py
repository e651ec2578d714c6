"""A proxy in front of the real S3 server that breaks some of its answers."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

from lungopacity.errors import ErrorCode, ImageError

Fault = Literal["503", "404", "403", "reset", "cut", "flip", "delay", "lost answer"]
_DELAY_S = 1.0

_CODES = {"503": "SlowDown", "404": "NoSuchKey", "403": "AccessDenied"}


class FaultProxy(ThreadingHTTPServer):
    """Breaks the first `times` answers to GETs of each key, or those that `choose` selects."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.fault: Fault | None = None
        self.times = 0
        self.choose: Callable[[str, int], Fault | None] | None = None
        """The fault for a GET, from its path and how often that was requested."""
        self.choose_any: Callable[[str, str, int], Fault | None] | None = None
        """The same for requests of every kind, from method, path and how often that was
        requested."""
        self.on_request: Callable[[str, str], None] | None = None
        """Called with method and path before a request is forwarded."""
        self.gets: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _forward(self) -> None:
        server = self.server
        fault = None
        if server.on_request is not None:
            server.on_request(self.command, self.path)
        if server.choose_any is not None:
            with server.lock:
                server.asked[self.command, self.path] += 1
                times = server.asked[self.command, self.path]
            fault = server.choose_any(self.command, self.path, times)
        if self.command == "GET" and "list-type" not in self.path:
            with server.lock:
                server.gets[self.path] += 1
                if server.choose is not None:
                    fault = server.choose(self.path, server.gets[self.path])
                elif server.gets[self.path] <= server.times:
                    fault = server.fault
        # Even if the request is then refused: an unread body would be taken for the next request.
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        if fault is not None and fault in _CODES:
            body = f"<Error><Code>{_CODES[fault]}</Code></Error>".encode()
            self._answer(int(fault), {}, body)
            return
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "delay":
            time.sleep(_DELAY_S)
        # The Host header stays: the signature covers it.
        upstream = http.client.HTTPConnection(server.upstream, timeout=30)
        try:
            upstream.request(self.command, self.path, sent, dict(self.headers))
            answer = upstream.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):  # the server is down
            self.close_connection = True
            return
        if fault == "lost answer":  # the request was done, and its answer is lost
            upstream.close()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "content-length", "connection")
        }
        length = answer.getheader("Content-Length")
        if self.command == "HEAD" and length is not None:
            headers["Content-Length"] = length
        if fault == "flip":
            at = server.gets[self.path] % len(body)  # another byte each time, as by chance
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        self._answer(answer.status, headers, body, cut=fault == "cut")
        upstream.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        # An answer to HEAD has no body, and the server's Content-Length.
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client may have been killed
                self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client may have been killed
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()


def code_of(act: Callable[[], object]) -> ErrorCode:
    """The code of the `ImageError` that `act` raises."""
    with pytest.raises(ImageError) as caught:
        act()
    return caught.value.code
