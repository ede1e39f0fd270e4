"""An engine that answers as a test says, on the gateway's own loop, so that a test sees both sides of a request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.net.server import HttpServer, Incoming, serve
from live_gateway import serving, until

SSE = ((b"content-type", b"text/event-stream"),)
CHAT = b"/v1/chat/completions"


def chunk(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps(head | {"choices": [choice]} | more).encode() + b"\n\n"


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()


class ScriptedEngine:
    """Healthy; ``act`` gets every completion."""

    def __init__(self, act: Callable[[Incoming], None] | None = None, port: int = 0) -> None:
        self.act = act
        self.port = port
        self.seen: list[Incoming] = []
        self.left: list[Incoming] = []
        self.server: HttpServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def handle(self, incoming: Incoming) -> None:
        if incoming.method != b"POST":
            incoming.respond(200, b"{}")
            return
        self.seen.append(incoming)
        incoming.on_close = lambda: self.left.append(incoming)
        if self.act is not None:
            self.act(incoming)

    async def close(self) -> None:
        """Of its servers the last one: a test may have closed the first and opened another."""
        await self.server.close(0.0)


@asynccontextmanager
async def before(
    directory: Path,
    *engines: ScriptedEngine,
    model: str = "",
    extra: str = "",
    relays: int = 0,
    changes: Sequence[str] = (),
) -> AsyncIterator[tuple[Service, Origin]]:
    """A gateway in front of these engines, which are all ready, and a client of it."""
    async with AsyncExitStack() as stack:
        for engine in engines:
            engine.server = await serve(engine.handle, port=engine.port)
            stack.push_async_callback(engine.close)
        urls = [engine.url for engine in engines]
        text = f'[models.m]\nengine = "openai"\nendpoints = {urls}\nmax_num_seqs = 4\n{model}\n{extra}'
        service = await stack.enter_async_context(serving(directory, text, relays, changes))
        await until(lambda: len(service.engines.live) == len(engines), "the engines are ready")
        origin = Origin(service.url, connect_timeout_s=60.0)
        stack.push_async_callback(origin.close)
        yield service, origin


class Reader:
    """A client of a stream: what it has of the answer so far."""

    def __init__(self, origin: Origin, data: bytes, path: bytes = CHAT) -> None:
        self.status = 0
        self.data = b""
        self.over = ""
        self.call = origin.send(b"POST", path, [(b"content-type", b"application/json")], data, self)

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        self.data += data

    def on_end(self) -> None:
        self.over = "end"

    def on_error(self, error: Exception) -> None:
        self.over = type(error).__name__

    async def end(self) -> Reader:
        await until(lambda: self.over, "the answer is over")
        return self

    @property
    def error(self) -> dict[str, Any]:
        """The error event that a stream ended with."""
        found: dict[str, Any] = json.loads(self.data.rstrip().rpartition(b"\n\n")[2].removeprefix(b"data: "))["error"]
        return found


def whole(incoming: Incoming) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    choice = {"index": 0, "message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
    answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    incoming.respond(200, json.dumps(answer).encode())
