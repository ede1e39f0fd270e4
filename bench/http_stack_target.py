"""What ``bench/http_stack.py`` measures, one process each: servers that answer by themselves, and relays to an engine.

    python bench/http_stack_target.py NAME PORT [ENGINE_URL]

All do the same. A POST is read whole; one that asks for a stream gets events at a pace, any other 400 bytes of JSON.
A GET is answered with the process that serves: one of the libraries serves in a child of the process that is started.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from chiron.net.client import Header, Origin
from chiron.net.server import Incoming, serve
from gateway_mock import answer_body, events
from gateway_relay import Relay

CHUNKS, PACE_S = 100, 0.010
EVENTS, ANSWER = events(CHUNKS), answer_body()
STREAM_TYPE: list[Header] = [(b"content-type", b"text/event-stream")]
JSON_TYPE: list[Header] = [(b"content-type", b"application/json")]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def wants_stream(body: bytes) -> bool:
    return b'"stream": true' in body


async def at_pace(write: Callable[[bytes], Awaitable[None]]) -> None:
    """All events, each when it is due. Every server gets the same: what differs is what ``write`` costs."""
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    for event in EVENTS:
        await write(event)
        due_s += PACE_S
        await asyncio.sleep(due_s - loop.time())


# -- an ASGI application, for every server that hosts one ---------------------------------------------------------


async def body_of(receive: Receive) -> bytes:
    pieces = []
    while True:
        message = await receive()
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def respond(send: Send, body: bytes) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [*JSON_TYPE, length]})
    await send({"type": "http.response.body", "body": body})


async def application(scope: Message, receive: Receive, send: Send) -> None:
    if scope["method"] == "GET":
        await respond(send, b"%d" % os.getpid())
    elif wants_stream(await body_of(receive)):
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_TYPE})

        async def write(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        await at_pace(write)
        await send({"type": "http.response.body", "body": b""})
    else:
        await respond(send, ANSWER)


# -- servers --------------------------------------------------------------------------------------------------------


def own_server(port: int, _: str) -> None:
    """As the gateway uses it: a handler that is called with the whole request."""
    streaming: set[asyncio.Task[None]] = set()

    async def stream(incoming: Incoming) -> None:
        incoming.start(200, STREAM_TYPE)

        async def write(event: bytes) -> None:
            incoming.write(event)

        await at_pace(write)
        incoming.finish()

    def handle(incoming: Incoming) -> None:
        if incoming.method == b"GET":
            incoming.respond(200, b"%d" % os.getpid())
        elif wants_stream(incoming.body):
            task = asyncio.get_running_loop().create_task(stream(incoming))
            streaming.add(task)
            task.add_done_callback(streaming.discard)
        else:
            incoming.respond(200, ANSWER)

    forever(lambda: serve(handle, port=port))


def own_server_asgi(port: int, _: str) -> None:
    """Hosting the same application as the libraries: what is the server's, and what is ASGI's."""
    forever(lambda: serve(lambda incoming: None, port=port, app=application))


def uvicorn(port: int, _: str) -> None:
    run_uvicorn(application, port)


def run_uvicorn(app: Callable[[Message, Receive, Send], Awaitable[None]], port: int) -> None:
    import uvicorn as library

    library.run(
        app, port=port, http="httptools", loop="uvloop", ws="none", lifespan="off", access_log=False, log_level="error"
    )


def granian(port: int, _: str) -> None:
    from granian import Granian

    Granian(
        "http_stack_target:application",
        port=port,
        interface="asginl",
        loop="uvloop",
        http="1",
        websockets=False,
        log_enabled=False,
    ).serve()


# -- relays ---------------------------------------------------------------------------------------------------------


def own_client(port: int, engine: str) -> None:
    """Our client behind our server."""

    async def listen() -> object:
        origin = Origin(engine, idle_max=1024)

        def handle(incoming: Incoming) -> None:
            if incoming.method == b"GET":
                incoming.respond(200, b"%d" % os.getpid())
                return
            call = origin.send(incoming.method, incoming.path.encode(), JSON_TYPE, incoming.body, Relay(incoming))
            incoming.on_close = call.cancel

        return await serve(handle, port=port)

    forever(listen)


def session_of(engine: str) -> Any:
    import aiohttp

    return aiohttp.ClientSession(
        engine,
        connector=aiohttp.TCPConnector(limit=1024),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
    )


def aiohttp_client(port: int, engine: str) -> None:
    """aiohttp's client behind our server."""
    relaying: set[asyncio.Task[None]] = set()

    async def listen() -> object:
        session = session_of(engine)

        async def relay(incoming: Incoming) -> None:
            headers = {"content-type": "application/json"}
            async with session.post(incoming.path, data=incoming.body, headers=headers) as answer:
                if answer.content_length is not None:
                    incoming.respond(answer.status, await answer.read())
                    return
                incoming.start(answer.status, STREAM_TYPE)
                async for data in answer.content.iter_any():
                    incoming.write(data)
                incoming.finish()

        def handle(incoming: Incoming) -> None:
            if incoming.method == b"GET":
                incoming.respond(200, b"%d" % os.getpid())
                return
            task = asyncio.get_running_loop().create_task(relay(incoming))
            incoming.on_close = task.cancel
            relaying.add(task)
            task.add_done_callback(relaying.discard)

        return await serve(handle, port=port)

    forever(listen)


def uvicorn_and_aiohttp(port: int, engine: str) -> None:
    """Nothing of ours."""
    sessions: list[Any] = []

    async def relay(scope: Message, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await respond(send, b"%d" % os.getpid())
            return
        if not sessions:
            sessions.append(session_of(engine))
        headers = {"content-type": "application/json"}
        async with sessions[0].post(scope["path"], data=await body_of(receive), headers=headers) as answer:
            if answer.content_length is not None:
                await respond(send, await answer.read())
                return
            await send({"type": "http.response.start", "status": answer.status, "headers": STREAM_TYPE})
            async for data in answer.content.iter_any():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    run_uvicorn(relay, port)


def forever(listen: Callable[[], Awaitable[object]]) -> None:
    import uvloop

    async def main() -> None:
        server = await listen()
        await asyncio.Event().wait()
        del server

    uvloop.run(main())


SERVERS: dict[str, Callable[[int, str], None]] = {
    "own server": own_server,
    "own server, ASGI": own_server_asgi,
    "uvicorn": uvicorn,
    "granian": granian,
}
RELAYS: dict[str, Callable[[int, str], None]] = {
    "own server, own client": own_client,
    "own server, aiohttp": aiohttp_client,
    "uvicorn, aiohttp": uvicorn_and_aiohttp,
}


if __name__ == "__main__":
    name, port, *engine = sys.argv[1:]
    (SERVERS | RELAYS)[name](int(port), *(engine or [""]))
