"""A server of ``chiron.net`` and a client that speaks bytes, for tests."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from chiron.net.server import Handler, HttpServer, Incoming, ServerLimits, serve

_CHUNK = re.compile(rb"([0-9a-f]+)\r\n")
HELLO = b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """One answer off the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


def answers(data: bytes, *heads: int) -> tuple[list[Answer], bytes]:
    """The complete answers in ``data`` and what is left. ``heads``: positions of answers without a body."""
    found: list[Answer] = []
    while True:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return found, data
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers = dict(line.split(": ", 1) for line in lines)
        if status < 200 or status in (204, 304) or len(found) in heads:
            body: bytes | None = b""
        elif headers.get("transfer-encoding") == "chunked":
            body, rest = dechunk(rest)
        else:
            length = int(headers["content-length"])
            body, rest = (rest[:length], rest[length:]) if len(rest) >= length else (None, rest)
        if body is None:
            return found, data
        found.append(Answer(status, headers, body))
        data = rest


def dechunk(data: bytes) -> tuple[bytes | None, bytes]:
    """(None, data) while the last chunk is missing."""
    chunks: list[bytes] = []
    at = 0
    while match := _CHUNK.match(data, at):
        size = int(match[1], 16)
        at = match.end() + size + 2
        if not size:
            return b"".join(chunks), data[at:]
        chunks.append(data[match.end() : at - 2])
    return None, data


class Wire(asyncio.Transport):
    """A transport that is a byte string: for a protocol without a socket."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.sent = b""
        self.closing = False
        self.ended = False
        self.reading = True
        self.protocol = protocol
        protocol.connection_made(self)

    def feed(self, *blocks: bytes) -> Wire:
        for block in blocks:
            if not self.closing:
                self.protocol.data_received(block)
        return self

    def write(self, data: Any) -> None:
        self.sent += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    abort = close

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


@dataclass
class Echo:
    """A handler that answers at once with what it was asked, and remembers it."""

    seen: list[Incoming] = field(default_factory=list)

    def __call__(self, request: Incoming) -> None:
        self.seen.append(request)
        text = b"%b %b?%b %b" % (request.method, request.path.encode(), request.query, request.body)
        request.respond(200, text, b"text/plain")


@dataclass
class Hold:
    """A handler that keeps requests for the test to answer."""

    seen: list[Incoming] = field(default_factory=list)
    left: list[Incoming] = field(default_factory=list)
    paused: int = 0
    resumed: int = 0

    def __call__(self, request: Incoming) -> None:
        self.seen.append(request)
        request.on_close = lambda: self.left.append(request)
        request.on_pause = self._pause
        request.on_resume = self._resume

    def _pause(self) -> None:
        self.paused += 1

    def _resume(self) -> None:
        self.resumed += 1


@asynccontextmanager
async def serving(handle: Handler, grace_s: float = 0.0, **options: Any) -> AsyncIterator[HttpServer]:
    limits = ServerLimits(**options.pop("limits", {}))
    server = await serve(handle, limits=limits, **options)
    try:
        yield server
    finally:
        await server.close(grace_s)
    if not server.connections:
        assert server.held_bytes == 0, "each body is let go once"


class Peer:
    """A client of bytes on a socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.data = b""

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answers(self, count: int, *heads: int) -> list[Answer]:
        """Read until there are so many."""
        while len(answers(self.data, *heads)[0]) < count:
            block = await asyncio.wait_for(self.reader.read(1 << 16), 60.0)
            assert block, f"closed after {self.data!r}"
            self.data += block
        found, self.data = answers(self.data, *heads)
        return found

    async def rest(self, timeout_s: float = 60.0) -> bytes:
        """All until the server closes; also what came before a reset."""
        blocks = [self.data]
        try:
            while block := await asyncio.wait_for(self.reader.read(1 << 16), timeout_s):
                blocks.append(block)
        except ConnectionResetError:
            blocks.append(b"(reset)")
        self.data = b"".join(blocks)
        return self.data

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except (ConnectionResetError, BrokenPipeError):
            return


@asynccontextmanager
async def peer(port: int, **options: Any) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    found = Peer(reader, writer)
    try:
        yield found
    finally:
        await found.close()


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key; skips without openssl."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(["openssl", "req", *options.split(), *names], check=True, capture_output=True)
    return cert, key
