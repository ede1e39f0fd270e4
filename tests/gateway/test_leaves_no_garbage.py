"""A request is freed when it ends: nothing of it waits for the garbage collector, whose pauses clients would feel."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from pathlib import Path

import pytest

from chiron.config.serve import parse_serve
from chiron.gateway.relay.calls import RelayCall
from chiron.gateway.relay.keys import hash_secret
from chiron.gateway.service import Service
from chiron.net.client import Call, ConnectError, Header, NetError, Origin
from chiron.net.server import Incoming, serve
from live_gateway import until
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk

REQUESTS = 50


def engine(incoming: Incoming) -> None:
    """Answers everything at once."""
    if b'"stream": true' not in incoming.body:
        incoming.respond(200, b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}')
        return
    incoming.start(200, [(b"content-type", b"text/event-stream")])
    incoming.write(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
    incoming.write(b"data: [DONE]\n\n")
    incoming.finish()


async def uncollected(directory: Path, fields: dict[str, object]) -> int:
    """Objects that only the garbage collector could free after some requests."""
    upstream = await serve(engine)
    text = f'[models.m]\nengine = "openai"\nendpoints = ["http://127.0.0.1:{upstream.port}"]\n[server]\nport = 0\n'
    service = Service(parse_serve(text, directory=directory, file="chiron.toml"))
    client = Origin(await service.start())
    body = json.dumps({"model": "m", "prompt": "hi"} | fields).encode()

    async def ask() -> None:
        answer = await client.fetch("POST", "/v1/completions", body=body)
        assert answer.status == 200, answer

    try:
        async with asyncio.timeout(60):
            while (await client.fetch("GET", "/ready")).status != 200:
                await asyncio.sleep(0.02)
        await ask()
        gc.collect()
        gc.disable()
        for _ in range(REQUESTS):
            await ask()
        return gc.collect()
    finally:
        gc.enable()
        gc.set_threshold(700, 10, 10)
        gc.freeze()
        await client.close()
        await service.stop(0.0)
        await upstream.close(0.0)


def test_an_answer_in_one_piece_leaves_nothing_behind(tmp_path: Path) -> None:
    assert asyncio.run(uncollected(tmp_path, {})) < REQUESTS


def test_a_stream_leaves_nothing_behind(tmp_path: Path) -> None:
    assert asyncio.run(uncollected(tmp_path, {"stream": True})) < REQUESTS


@pytest.mark.parametrize(
    ("config", "header", "status"),
    [(f'[[keys]]\nname = "k"\nhash = "{hash_secret(b"k")}"\n', "x-any", 401), ("", "sec-fetch-site", 403)],
    ids=["no key", "a page of another site"],
)
def test_a_refusal_leaves_nothing_behind(tmp_path: Path, config: str, header: str, status: int) -> None:
    text = f'[models.m]\nengine = "openai"\nendpoints = ["http://127.0.0.1:9"]\n[server]\nport = 0\n{config}'

    async def main() -> int:
        service = Service(parse_serve(text, directory=tmp_path, file="chiron.toml"))
        client = Origin(await service.start())
        gc.unfreeze()

        async def ask() -> None:
            answer = await client.fetch("POST", "/v1/completions", body=b"{}", headers={header: "cross-site"})
            assert answer.status == status, answer

        try:
            await ask()
            gc.collect()
            gc.disable()
            for _ in range(REQUESTS):
                await ask()
            return sum(type(each).__name__ in ("Connection", "Incoming", "ApiError") for each in gc.get_objects())
        finally:
            gc.enable()
            gc.set_threshold(700, 10, 10)
            gc.freeze()
            await client.close()
            await service.stop(0.0)

    assert asyncio.run(main()) < REQUESTS


class Refused:
    """A receiver that waits for an error."""

    def __init__(self) -> None:
        self.came = asyncio.Event()

    def on_head(self, status: int, headers: list[Header]) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...

    def on_error(self, error: NetError) -> None:
        assert isinstance(error, ConnectError)
        self.came.set()


def test_a_connection_that_is_refused_leaves_no_request_behind() -> None:
    async def main(port: int) -> int:
        origin = Origin(f"http://127.0.0.1:{port}")
        gc.collect()
        gc.disable()
        try:
            for _ in range(REQUESTS):
                refused = Refused()
                origin.send(b"POST", b"/", (), b"{}", refused)
                async with asyncio.timeout(60):
                    await refused.came.wait()
            return sum(type(each) is Call for each in gc.get_objects())
        finally:
            gc.enable()
            await origin.close()

    with socket.socket() as bound:  # Nobody listens there.
        bound.bind(("127.0.0.1", 0))
        assert asyncio.run(main(bound.getsockname()[1])) < 5


@pytest.mark.parametrize("who", ["client", "engine"])
def test_an_answer_that_breaks_off_leaves_no_request_behind(tmp_path: Path, who: str) -> None:
    def begins(incoming: Incoming) -> None:
        if who == "client":
            incoming.start(200, SSE)
            incoming.write(chunk("one"))
        else:
            incoming.start(200, length=100)
            incoming.write(b"{")
            asyncio.get_running_loop().call_soon(incoming.abort)

    async def main() -> int:
        engine = ScriptedEngine(begins)
        async with before(tmp_path, engine) as (service, origin):
            gc.unfreeze()
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    reader = Reader(origin, body(stream=who == "client"))
                    await until(lambda: reader.data or reader.over, "it begins")  # noqa: B023
                    reader.call.cancel()
                    await until(lambda: not service.desk.open, "it is over")
                    engine.seen.clear()
                    engine.left.clear()
                await until(lambda: len(service._server.connections) < 2, "its connection is gone")  # type: ignore[union-attr]
                return sum(type(each) in (RelayCall, Incoming) for each in gc.get_objects())
            finally:
                gc.enable()
                gc.set_threshold(700, 10, 10)
                gc.freeze()

    assert asyncio.run(main()) < 5
