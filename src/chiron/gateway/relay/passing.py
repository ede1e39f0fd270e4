"""Requests that are not completions, handed on to the brain's own HTTP server as they come.

Files, batches, models, status and metrics are the brain's. A relay speaks to it over a Unix socket that only this user
can open, one connection for each request: bodies are streamed both ways, with backpressure, and bounded nowhere but
there. The client's address goes along in ``X-Forwarded-For``, as a proxy's would; keys are checked by the brain.

``/health`` is answered here. It says that this process serves, and a relay does without a brain, too: a probe that
asked the brain would take all gateways out of service at once while nobody leads. One that has no brain and finds no
engine either says so: others may have both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httptools

from chiron.gateway.relay.ending import refuse
from chiron.gateway.relay.errors import unavailable
from chiron.net.incoming import Header, Incoming

log = logging.getLogger("chiron.relay")

_HOP = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade expect content-length".split()
)
"""Headers of one connection; the body's framing is made anew."""
_ANSWER_HOP = _HOP | {b"date"}
_WRITE_HIGH_BYTES = 256 * 1024
RETRY_AFTER_S = 1.0
_PROBED = (b"GET", b"HEAD")


class Passing:
    """``handle`` is a handler of ``net.server`` for requests whose bodies are streamed."""

    def __init__(
        self, path: str, how_it_stands: Callable[[], str] = lambda: "", serves: Callable[[], bool] = lambda: True
    ) -> None:
        """``path`` of the Unix socket; ``how_it_stands``: what is known of the brain where nobody answers; ``serves``:
        requests find an engine."""
        self._path = path
        self._how_it_stands = how_it_stands
        self._serves = serves
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, incoming: Incoming) -> None:
        if incoming.path == "/health" and incoming.method in _PROBED:
            if self._serves():
                incoming.respond(200, b'{"status":"ok"}')
            else:
                refuse(incoming, unavailable(f"No engine is reached.{self._how_it_stands()}", RETRY_AFTER_S))
            return
        passage = _Passage(incoming, self._how_it_stands)
        task = asyncio.get_running_loop().create_task(self._connect(passage))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, passage: _Passage) -> None:
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: passage, self._path)
        except OSError as error:
            log.warning("the brain's HTTP server cannot be reached: %s", error)
            passage.fail()


class _Passage(asyncio.Protocol):
    """One request, to the brain and back."""

    def __init__(self, incoming: Incoming, how_it_stands: Callable[[], str]) -> None:
        self._incoming = incoming
        self._how_it_stands = how_it_stands
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._early: list[bytes] = []
        """Of the body, before there is a connection."""
        self._chunked = incoming.header(b"transfer-encoding") is not None
        self._ended = False
        """The request's body is complete."""
        self._headers: list[Header] = []
        self._done = False
        incoming.on_body = self._on_body
        incoming.on_body_end = self._on_body_end
        incoming.on_close = self._on_close
        incoming.on_pause = self._on_pause
        incoming.on_resume = self._on_resume
        incoming.pause_body()

    def fail(self) -> None:
        """There is nobody to answer."""
        incoming = self._incoming
        if self._done or incoming.closed:
            return
        self._done = True
        if incoming.started:
            incoming.abort()
        else:
            refuse(incoming, unavailable(f"The gateway cannot answer this now.{self._how_it_stands()}", RETRY_AFTER_S))

    # -- the client --------------------------------------------------------------------------------------------

    def _on_body(self, data: bytes) -> None:
        if self._transport is None:
            self._early.append(data)
        elif self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._transport.write(data)

    def _on_body_end(self) -> None:
        self._ended = True
        if self._transport is not None and self._chunked:
            self._transport.write(b"0\r\n\r\n")

    def _on_close(self) -> None:
        self._done = True
        if self._transport is not None:
            self._transport.abort()

    def _on_pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _on_resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- the brain ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        if self._incoming.closed:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._transport.write(self._head())
        early, self._early = self._early, []
        for data in early:
            self._on_body(data)
        if self._ended:
            self._on_body_end()
        if self._incoming.paused:
            self._on_pause()
        self._incoming.resume_body()

    def pause_writing(self) -> None:
        self._incoming.pause_body()

    def resume_writing(self) -> None:
        self._incoming.resume_body()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            log.error("the brain's answer cannot be read: %s", error)
            self.fail()
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._parser = None  # It refers to this connection.
        self.fail()

    # -- httptools ---------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if status < 200 or self._done:
            return
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        self._incoming.start(status, [header for header in headers if header[0] not in _ANSWER_HOP], length)
        if self._incoming.method == b"HEAD":  # The parser cannot know that no body follows.
            self._finish()

    def on_body(self, data: bytes) -> None:
        if not self._done:
            self._incoming.write(data)

    def on_message_complete(self) -> None:
        if self._parser is not None and self._parser.get_status_code() >= 200 and not self._done:
            self._finish()

    def _finish(self) -> None:
        self._done = True
        self._incoming.finish()
        self._close()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _head(self) -> bytes:
        incoming = self._incoming
        target = incoming.path.encode("latin-1") + (b"?" + incoming.query if incoming.query else b"")
        lines = [b"%b %b HTTP/1.1\r\nconnection: close\r\n" % (incoming.method, target)]
        lines += [b"%b: %b\r\n" % header for header in incoming.headers if header[0] not in _HOP]
        if not any(name == b"host" for name, _ in incoming.headers):  # HTTP/1.0 may have none.
            lines.append(b"host: localhost\r\n")
        address = incoming.client[0]
        if address:
            lines.append(b"x-forwarded-for: %b\r\n" % address.encode("latin-1", "replace"))
        length = incoming.header(b"content-length")
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif length is not None:
            lines.append(b"content-length: %b\r\n" % length)
        return b"".join((*lines, b"\r\n"))
