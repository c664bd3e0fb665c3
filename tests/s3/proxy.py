"""An HTTP proxy on loopback that answers 500 and 503, drops connections and cuts bodies.

What happens to a request is a hash of the seed, of what is asked for and of how often it was asked
for before, so the same requests meet the same faults in whatever order they come.
"""

from __future__ import annotations

import hashlib
import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

#: What can happen to a request. An error or a drop comes before the server hears of the request,
#: or after it did what was asked; a cut in the middle of the body that goes in, or that comes out.
#: Beside these there is "forbidden".
FAULTS = (
    "error before",
    "error after",
    "drop before",
    "drop after",
    "cut in",
    "cut out",
)
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        number: from 0, over all that reached the proxy.
        method: PUT, GET, ...
        path: with its query.
        turn: how often the same was asked for before.
    """

    number: int
    method: str
    path: str
    turn: int


def seeded(seed: int, errors: float, drops: float) -> Callable[[Request], str | None]:
    """Faults at random.

    Args:
        seed: of the draws.
        errors: fraction of requests that are answered 500 or 503.
        drops: fraction whose connection is dropped or whose body is cut.
    """

    def fault(request: Request) -> str | None:
        text = f"{seed} {request.method} {request.path} {request.turn}"
        digest = hashlib.sha256(text.encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        if draw < errors:
            return FAULTS[digest[8] % 2]
        if draw < errors + drops:
            return FAULTS[2 + digest[8] % 4]
        return None

    return fault


@dataclass
class Proxy:
    """A proxy to a server on loopback, used as a context manager.

    Attributes:
        port: of the server.
        fault: what happens to a request; None lets it pass.
        before_drop: called before a connection is dropped.
        seen: number of requests by what happened to them ("passed" where nothing did).
    """

    port: int
    fault: Callable[[Request], str | None] = lambda request: None
    before_drop: Callable[[], object] = lambda: None
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._turns: Counter[tuple[str, str]] = Counter()
        self._number = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Listen at a free port."""
        handler = type("Bound", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def decide(self, method: str, path: str) -> str | None:
        """What happens to the request that has just come."""
        with self._lock:
            turn = self._turns[method, path]
            self._turns[method, path] += 1
            request = Request(self._number, method, path, turn)
            self._number += 1
            fault = self.fault(request)
            self.seen[fault or "passed"] += 1
        return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed in mid-request: nothing to say."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle_expect_100(self) -> bool:
        """Nothing before the fault is known."""
        self.expects = True
        return True

    def _handle(self) -> None:
        fault = self.proxy.decide(self.command, self.path)
        if fault == "drop before":
            return self._drop()
        if getattr(self, "expects", False):
            self.send_response_only(100)
            self.end_headers()
            self.expects = False
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut in":
            self.rfile.read(length // 2)
            return self._drop()
        body = self._chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        if fault == "error before":
            return self._refuse(503, "SlowDown")
        if fault == "forbidden":
            return self._refuse(403, "AccessDenied")
        answer, data = self._forward(body)
        if fault == "error after":
            return self._refuse(500, "InternalError")
        if fault == "drop after":
            return self._drop()
        self._answer(answer, data, len(data) // 2 if fault == "cut out" else None)
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _chunks(self) -> bytes:
        """A body in chunks, put together."""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """What the server answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=30)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection", "transfer-encoding"):
                    connection.putheader(name, value)
            if self.headers.get("Transfer-Encoding"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def _answer(self, answer: http.client.HTTPResponse, data: bytes, cut: int | None) -> None:
        """Pass an answer on, all of it or its beginning."""
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = str(len(data))
        if self.command == "HEAD":
            length = answer.getheader("Content-Length") or "0"
        self.send_header("Content-Length", length)
        self.end_headers()
        if cut is None:
            self.wfile.write(data)
            return
        self.wfile.write(data[:cut])
        self._drop()

    def _refuse(self, status: int, code: str) -> None:
        """Answer with an error."""
        data = f"<Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _drop(self) -> None:
        """Reset the connection."""
        self.wfile.flush()
        self.proxy.before_drop()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
