"""ASGI 3 applications behind ``net.server``: bodies are streamed both ways, with backpressure. HTTP only."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from chiron.net.incoming import Incoming, error_body

log = logging.getLogger("chiron.http")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_BUFFER_MAX_BYTES = 256 * 1024


def host_app(app: App) -> Callable[[Incoming], None]:
    """A handler that runs ``app`` for each request it gets, in a task of its own."""
    tasks: set[asyncio.Task[None]] = set()

    def handle(request: Incoming) -> None:
        cycle = _Cycle(request)
        task = asyncio.get_running_loop().create_task(cycle.run(app))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return handle


class _Cycle:
    """One request and its answer."""

    def __init__(self, request: Incoming) -> None:
        self._request = request
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._ended = request.complete
        self._left = False
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        if not request.paused:  # The client may not have read the answer before this one.
            self._writable.set()
        request.on_body = self._on_body
        request.on_body_end = self._on_body_end
        request.on_close = self._on_close
        request.on_pause = self._writable.clear
        request.on_resume = self._writable.set
        if request.body:
            self._on_body(request.body)

    async def run(self, app: App) -> None:
        request = self._request
        try:
            await app(self._scope(), self._receive, self._send)
        except Exception:
            log.exception("%s %s failed", request.method.decode("latin-1"), request.path)
            if not request.started and not request.closed:
                request.respond(500, error_body(500, "internal error", "internal_error"))
        finally:
            if not request.closed:
                request.abort()  # The application gave no complete answer.

    def _scope(self) -> Scope:
        request = self._request
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.version,
            "method": request.method.decode("latin-1"),
            "scheme": "https" if request.secure else "http",
            "path": unquote(request.path),
            "raw_path": request.path.encode("latin-1"),
            "query_string": request.query,
            "root_path": "",
            "headers": request.headers,
            "client": request.client,
            "server": None,
            "state": {"peers": request.peers},
        }

    def _on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._buffered += len(data)
        if self._buffered > _BUFFER_MAX_BYTES and not self._paused:
            self._paused = True
            self._request.pause_body()
        self._news.set()

    def _on_body_end(self) -> None:
        self._ended = True
        self._news.set()

    def _on_close(self) -> None:
        self._left = True
        self._news.set()
        self._writable.set()

    async def _receive(self) -> Message:
        while not self._pieces and not self._ended and not self._left:
            self._news.clear()
            await self._news.wait()
        if self._pieces:
            body = b"".join(self._pieces)
            self._pieces.clear()
            self._buffered = 0
            if self._paused:
                self._paused = False
                self._request.resume_body()
            more, self._ended = not self._ended, False
            return {"type": "http.request", "body": body, "more_body": more}
        if self._ended and not self._left:
            # Once only; after that, the application waits for the client to disconnect or for the answer's end.
            self._ended = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        request = self._request
        if self._left:
            return
        if message["type"] == "http.response.start":
            headers = [(bytes(k).lower(), bytes(v)) for k, v in message.get("headers", [])]
            length = next((int(v) for k, v in headers if k == b"content-length"), None)
            skipped = (b"content-length", b"transfer-encoding", b"connection", b"date")
            request.start(message["status"], [h for h in headers if h[0] not in skipped], length)
        elif message["type"] == "http.response.body":
            request.write(message.get("body", b""))
            if not message.get("more_body", False):
                request.finish()
            elif not self._writable.is_set():
                await self._writable.wait()
