"""A proxy on loopback that passes requests on to a real S3 server, and spoils some of them on the way."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import urlsplit


class Exchange(BaseHTTPRequestHandler):
    """One request, to be passed on, answered or dropped."""

    protocol_version = "HTTP/1.1"
    upstream: str  # host:port
    body: bytes

    def fault(self) -> bool:
        """Spoil this exchange; True if it is dealt with."""
        raise NotImplementedError

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):  # the client has had enough
            super().handle_one_request()

    def _any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.fault():
            self.deliver(*self.fetch())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def fetch(self) -> tuple[int, HTTPMessage, bytes]:
        """The server's answer."""
        connection = HTTPConnection(self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name not in ("Expect", "Connection")}
        connection.request(self.command, self.path, self.body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def deliver(self, status: int, headers: HTTPMessage, content: bytes, *, pause_at: int = 0, pause_s: float = 0.0,
                cut_at: int | None = None) -> None:  # fmt: skip
        """Send an answer, perhaps with a pause in it or without its end."""
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        size = headers["Content-Length"] if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        if pause_s:
            self.wfile.write(content[:pause_at])
            time.sleep(pause_s)
            content = content[pause_at:]
        self.wfile.write(content[:cut_at])
        if cut_at is not None:
            self.close_connection = True

    def answer(self, status: int, code: str) -> None:
        """An error as S3 gives it."""
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>as told</Message></Error>"
        headers = HTTPMessage()
        headers["Content-Type"] = "application/xml"
        self.deliver(status, headers, b"" if self.command == "HEAD" else text.encode())

    def reset(self) -> None:
        """Break the connection off."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Nothing: errors are meant."""


Fault = Callable[[Exchange], bool]  # True: the exchange is dealt with


def no_conditions(exchange: Exchange) -> bool:
    """A server that knows no conditional writes, such as Swift."""
    conditional = exchange.command == "PUT" and not {"If-Match", "If-None-Match"}.isdisjoint(exchange.headers)
    if conditional:
        exchange.answer(501, "NotImplemented")
    return conditional


def first(times: int, fault: Fault, *, method: str = "") -> Fault:
    """Only the first few requests, of one kind if it is named."""
    numbers, lock = count(), threading.Lock()

    def limited(exchange: Exchange) -> bool:
        if method and exchange.command != method:
            return False
        with lock:
            number = next(numbers)
        return number < times and fault(exchange)

    return limited


def failing(status: int, code: str) -> Fault:
    """This error and nothing else."""

    def fail(exchange: Exchange) -> bool:
        exchange.answer(status, code)
        return True

    return fail


def resetting(exchange: Exchange) -> bool:
    """The connection is broken off before the request arrives."""
    exchange.reset()
    return True


def losing_the_answer(exchange: Exchange) -> bool:
    """The request is carried out, but nobody hears of it."""
    exchange.fetch()
    exchange.reset()
    return True


def cutting(exchange: Exchange) -> bool:
    """Half a body."""
    status, headers, content = exchange.fetch()
    exchange.deliver(status, headers, content, cut_at=len(content) // 2)
    return True


def pausing(seconds: float) -> Fault:
    """Silence in the middle of a body."""

    def pause(exchange: Exchange) -> bool:
        status, headers, content = exchange.fetch()
        exchange.deliver(status, headers, content, pause_at=len(content) // 2, pause_s=seconds)
        return True

    return pause


def corrupting(exchange: Exchange) -> bool:
    """One bit is flipped."""
    status, headers, content = exchange.fetch()
    exchange.deliver(status, headers, bytes([content[0] ^ 1]) + content[1:])
    return True


def counting(requests: list[tuple[str, str]]) -> Fault:
    """None; each method and path with query is kept."""

    def note(exchange: Exchange) -> bool:
        requests.append((exchange.command, exchange.path))
        return False

    return note


def dating(date: str) -> Fault:
    """The client's clock is another."""

    def date_back(exchange: Exchange) -> bool:
        exchange.headers.replace_header("X-Amz-Date", date)
        return False

    return date_back


@contextmanager
def faulty(upstream: str, fault: Fault) -> Iterator[str]:
    """The URL of a proxy in front of `upstream`."""

    handler = type("Handler", (Exchange,), {"upstream": urlsplit(upstream).netloc, "fault": fault})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
