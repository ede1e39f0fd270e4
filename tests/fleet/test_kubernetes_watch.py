"""What a watch does with an API server that makes no sense."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import orjson
import pytest

from chiron.fleet.kubernetes.access import Access
from chiron.fleet.kubernetes.client import Client
from chiron.fleet.kubernetes.testing.api import shut
from chiron.fleet.kubernetes.watch import Watch, WatchSettings
from chiron.net.server import Incoming, serve
from fleet_factory import until


@contextlib.asynccontextmanager
async def watching(handle: Callable[[Incoming], None]) -> AsyncIterator[tuple[list[str], list[str]]]:
    """Names that a watch of such a server has heard of, and what it complains of."""
    server = await serve(handle)
    client = Client(Access(url=f"http://127.0.0.1:{server.port}"))
    names: list[str] = []
    said: list[str] = []
    watch = Watch(
        client,
        "/apis/x",
        {},
        changed=lambda item: names.append(item["metadata"]["name"]),
        gone=lambda uid: None,
        troubled=lambda why: said.append(why) if why else None,
        settings=WatchSettings(backoff_first_s=0.01),
    )
    running = asyncio.get_running_loop().create_task(watch.run())
    try:
        yield names, said
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
        await shut(server)


def test_a_list_that_never_ends_is_given_up() -> None:
    def handle(incoming: Incoming) -> None:
        incoming.respond(200, b'{"items": [], "metadata": {"resourceVersion": "1", "continue": "more"}}')

    async def run() -> None:
        async with watching(handle) as (_, said):
            await until(lambda: any("pages" in why for why in said), "it says so")

    asyncio.run(run())


@pytest.mark.parametrize("status", [400, 410, 422])
def test_a_version_that_the_server_itself_cannot_read_is_not_kept(status: int) -> None:
    """Such as after it has been set back to an older state."""
    head = {"name": "a", "uid": "a", "resourceVersion": "nonsense"}
    event = orjson.dumps({"type": "ADDED", "object": {"metadata": head}}) + b"\n"

    def handle(incoming: Incoming) -> None:
        if b"watch=true" not in incoming.query:
            incoming.respond(200, b'{"items": [], "metadata": {"resourceVersion": "1"}}')
        elif b"nonsense" in incoming.query:
            incoming.respond(status, b"{}")
        else:
            incoming.respond(200, event)

    async def run() -> None:
        async with watching(handle) as (names, _):
            await until(lambda: names.count("a") > 2, "it is listed anew again and again")

    asyncio.run(run())


def test_a_refusal_that_never_ends_is_heard_all_the_same() -> None:
    def handle(incoming: Incoming) -> None:
        if b"watch" not in incoming.query:
            incoming.respond(200, b'{"items": [], "metadata": {"resourceVersion": "1"}}')
            return
        incoming.start(500, ())
        for _ in range(80):  # 5 MB, and no end.
            incoming.write(b"no " * 21_845)

    async def run() -> None:
        async with watching(handle) as (_, said):
            await until(lambda: any(why.startswith("500: no no") for why in said), "it says so")

    asyncio.run(run())
