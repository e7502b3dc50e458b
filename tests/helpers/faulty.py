"""An HTTP server between a client and a store that fails as it is told: it refuses, answers 5xx, breaks off, or is silent."""

import http.client
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, TypeVar

ANSWERS = {
    "slow-down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "refused": (403, "AccessDenied"),
}
"""Faults that are answers -> status, and S3's name for them."""

# Other faults: `drop`, the connection ends before the answer; `cut`, in the midst of it; `half`, in the midst of what is sent;
# `silence`, nothing comes; `slow`, the answer comes in pieces.


class Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    range: str


class Faulty(ThreadingHTTPServer):
    """Forwards to `store` (host:port) what `fault` returns None for. Counts the faults by kind."""

    daemon_threads = True

    def __init__(self, store: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.fault: Callable[[Asked], str | None] = lambda _: None
        self.injected = Counter[str]()
        self.asked: list[Asked] = []
        self.over = threading.Event()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients that give up are part of the tests."""


def each_once(kinds: tuple[str, ...]) -> Callable[[Asked], str | None]:
    """A fault for the first time that each thing is asked: the kinds in turn, for each method apart."""
    seen, lock = set[Asked](), threading.Lock()
    turns: dict[str, Iterator[str]] = {}

    def fault(asked: Asked) -> str | None:
        with lock:
            if asked in seen:
                return None
            seen.add(asked)
            return next(turns.setdefault(asked.method, itertools.cycle(kinds)))

    return fault


S = TypeVar("S", bound=ThreadingHTTPServer)


@contextmanager
def running(server: S) -> Iterator[S]:
    """A server that answers for as long as the block lasts."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@contextmanager
def before(store: str) -> Iterator[Faulty]:
    """A server in front of a store."""
    with running(Faulty(store)) as server:
        try:
            yield server
        finally:
            server.over.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def _forward(self) -> None:
        asked = Asked(self.command, self.path, self.headers.get("Range") or "")
        self.server.asked.append(asked)
        kind = self.server.fault(asked)
        if kind:
            self.server.injected[kind] += 1
        body = self._body(half=kind == "half")
        if kind in ("drop", "half"):
            self._end()
        elif kind == "silence":
            self.server.over.wait(20)
            self._end()
        elif kind in ANSWERS:
            status, name = ANSWERS[kind]
            self._answer(status, {}, f"<Error><Code>{name}</Code><Message>planted</Message></Error>".encode())
        else:
            self._pass_on(body, kind)

    def _body(self, half: bool) -> bytes:
        """What is sent, or its first half."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            n_bytes = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(n_bytes // 2 if half else n_bytes)
        pieces = []
        while n_bytes := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(n_bytes // 2 if half else n_bytes))
            if half:
                break
            self.rfile.readline()
        else:
            self.rfile.readline()
        return b"".join(pieces)

    def _pass_on(self, body: bytes, kind: str | None) -> None:
        connection = http.client.HTTPConnection(self.server.store, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        headers = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "server", "date")
        }
        if self.command == "HEAD" and kind == "cut":
            self._end()
            return
        self._answer(answer.status, headers, data, kind)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, kind: str | None = None) -> None:
        self.send_response(status)
        length = {name.lower(): value for name, value in headers.items()}.get("content-length", str(len(data)))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            self._end()
        elif kind == "slow":
            for start in range(0, len(data), max(1, len(data) // 4)):
                self.wfile.write(data[start : start + max(1, len(data) // 4)])
                time.sleep(0.05)
        else:
            self.wfile.write(data)

    def _end(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - its name in the class above
        """Nothing."""
