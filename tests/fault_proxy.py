"""A proxy in front of the real S3 server that breaks some of its answers."""

from __future__ import annotations

import http.client
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["503", "reset", "cut", "flip"]


class FaultProxy(ThreadingHTTPServer):
    """Breaks the first `times` answers to GETs of each key that ends in `suffix`."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.fault: Fault | None = None
        self.times = 0
        self.gets: Counter[str] = Counter()
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
        if self.command == "GET" and "list-type" not in self.path:
            with server.lock:
                server.gets[self.path] += 1
                fault = server.fault if server.gets[self.path] <= server.times else None
        if fault == "503":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        # The Host header stays: the signature covers it.
        upstream = http.client.HTTPConnection(server.upstream, timeout=30)
        upstream.request(
            self.command, self.path, self.rfile.read(length) or None, dict(self.headers)
        )
        answer = upstream.getresponse()
        body = answer.read()
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "content-length", "connection")
        }
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        self._answer(answer.status, headers, body, cut=fault == "cut")
        upstream.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _forward

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
