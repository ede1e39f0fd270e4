"""One HTTP request on the server's side, and the way to answer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from json import dumps
from typing import Any, Protocol

Header = tuple[bytes, bytes]

_STATUS = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
_PIECES_MAX = 256
"""Pieces of a body that are kept apart: each costs far more memory than the two bytes that it may hold."""
_ERROR_TYPES = {400: "invalid_request_error", 413: "invalid_request_error", 431: "invalid_request_error"}


class ServerState(Protocol):
    """What an answer needs to know of its server."""

    @property
    def closing(self) -> bool: ...
    @property
    def date_line(self) -> bytes: ...


class Wire(Protocol):
    """The connection that a request came on, as far as the answer needs it."""

    peer: tuple[str, int]
    secure: bool
    write_paused: bool

    @property
    def server(self) -> ServerState: ...
    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def answered(self, request: Incoming) -> None: ...


class Incoming:
    """One request, and the way to answer it."""

    __slots__ = (
        "_body_begin_s",
        "_body_length",
        "_chunked",
        "_connection",
        "_gathered",
        "_held_bytes",
        "_keep_alive",
        "_pieces",
        "_started",
        "_written",
        "body",
        "closed",
        "complete",
        "context",
        "headers",
        "method",
        "on_body",
        "on_body_end",
        "on_close",
        "on_pause",
        "on_resume",
        "path",
        "peers",
        "query",
        "refusal",
        "streams",
        "version",
    )

    def __init__(self, connection: Wire) -> None:
        self._connection = connection
        self.method = b""
        self.path = ""
        self.peers: tuple[str, ...] = ()
        """Whose shares it counts against; who screens it may add one."""
        self.query = b""
        self.version = "1.1"
        self.headers: list[Header] = []
        """Names are lower-case."""
        self.body = b""
        self.complete = False
        """The whole request is here."""
        self.streams = False
        """The body is handed on in pieces (``on_body``) and not collected."""
        self.closed = False
        """The answer is over, or the client has left."""
        self.on_close: Callable[[], None] | None = None
        """The client left before the answer was complete."""
        self.on_pause: Callable[[], None] | None = None
        """The client reads slower than it is written to."""
        self.on_resume: Callable[[], None] | None = None
        self.on_body: Callable[[bytes], None] | None = None
        self.on_body_end: Callable[[], None] | None = None
        self.context: Any = None
        """The handler's own."""
        self.refusal: Callable[[], None] | None = None
        """Answers it in place of the handler: its head was enough to refuse it."""
        self._pieces: list[bytes] = []
        self._gathered: bytearray | None = None
        """What came before the pieces."""
        self._body_length = 0
        self._held_bytes = 0
        """What of it counts as memory that is held."""
        self._body_begin_s = 0.0
        self._keep_alive = True
        self._started = False
        self._chunked = False
        self._written = False

    @property
    def started(self) -> bool:
        """Whether the answer's head has been sent: it is too late for an error status."""
        return self._started

    @property
    def chunked(self) -> bool:
        """Whether the answer's body goes out in chunks."""
        return self._chunked

    @property
    def client(self) -> tuple[str, int]:
        return self._connection.peer

    @property
    def secure(self) -> bool:
        return self._connection.secure

    @property
    def paused(self) -> bool:
        return self._connection.write_paused

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def respond(
        self,
        status: int,
        body: bytes = b"",
        content_type: bytes = b"application/json",
        headers: Sequence[Header] = (),
    ) -> None:
        """The whole answer in one write."""
        if self.closed:
            return
        assert not self._started, "an answer starts once"
        head = self._head(status, headers)
        if status in (204, 304):
            head.append(b"\r\n")
        else:
            head += (b"content-type: ", content_type, b"\r\ncontent-length: %d\r\n\r\n" % len(body))
            if self.method != b"HEAD":
                head.append(body)
        self._started = True
        self._connection.write(b"".join(head))
        self._over()

    def start(self, status: int, headers: Sequence[Header] = (), length: int | None = None) -> None:
        """The head of an answer whose body comes in pieces; chunked if its length is not known."""
        if self.closed:
            return
        assert not self._started, "an answer starts once"
        bodiless = status in (204, 304)
        if self.version == "1.0" and length is None and not bodiless:
            self._keep_alive = False  # The end of the connection is the end of the body.
        head = self._head(status, headers)
        if bodiless or (self.version == "1.0" and length is None):
            head.append(b"\r\n")
        elif length is not None:
            head.append(b"content-length: %d\r\n\r\n" % length)
        else:
            self._chunked = True
            head.append(b"transfer-encoding: chunked\r\n\r\n")
        self._started = True
        self._connection.write(b"".join(head))

    def write(self, data: bytes) -> None:
        if self.closed or not data or self.method == b"HEAD":
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.write(data)

    def write_chunks(self, data: bytes) -> None:
        """Whole chunks of a ``chunked`` answer, with their framing, which the caller has checked."""
        if not self.closed:
            self._connection.write(data)

    def finish(self) -> None:
        """The body is complete."""
        if self.closed:
            return
        if self._chunked and self.method != b"HEAD":
            self._connection.write(b"0\r\n\r\n")
        self._over()

    def abort(self) -> None:
        """Cut the connection: the client sees that the answer is not complete."""
        if not self.closed:
            self.closed = True
            self._connection.abort()

    def pause_body(self) -> None:
        if not self.closed:
            self._connection.pause_reading()

    def resume_body(self) -> None:
        if not self.closed:
            self._connection.resume_reading()

    def _head(self, status: int, headers: Sequence[Header]) -> list[bytes]:
        connection = self._connection
        server = connection.server
        parts = [_STATUS.get(status) or b"HTTP/1.1 %d Status\r\n" % status, server.date_line]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")  # Joined once, with all else.
        if not self.complete or server.closing:
            self._keep_alive = False  # What is left of the body cannot be told from the next request.
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        elif self.version == "1.0":
            parts.append(b"connection: keep-alive\r\n")
        return parts

    def _over(self) -> None:
        self.closed = True
        self._connection.answered(self)

    def _forget(self) -> None:
        """No cycles: a request is freed when it is over, and the garbage collector has nothing to look for."""
        self.on_close = self.on_pause = self.on_resume = self.on_body = self.on_body_end = None
        self.refusal = None

    def _add(self, data: bytes) -> None:
        """A part of the body that is collected."""
        self._pieces.append(data)
        self._body_length += len(data)
        if len(self._pieces) == _PIECES_MAX:
            self._gathered = self._gathered or bytearray()
            self._gathered += b"".join(self._pieces)
            self._pieces.clear()

    def _collect(self) -> None:
        pieces = self._pieces
        if self._gathered is not None:
            pieces.insert(0, bytes(self._gathered))
            self._gathered = None
        self.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []


def error_body(status: int, message: str, code: str) -> bytes:
    """An OpenAI error object."""
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
