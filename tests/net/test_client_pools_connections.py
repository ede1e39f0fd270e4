"""Connections to an engine are kept for the next request, and not for ever."""

from __future__ import annotations

import asyncio
import time

from chiron.net.client import Origin
from chiron.net.server import Incoming, serve


def test_connections_of_a_burst_are_closed_once_they_have_idled() -> None:
    async def story() -> None:
        def answer(incoming: Incoming) -> None:
            asyncio.get_running_loop().call_later(0.02, lambda: incoming.respond(200, b"{}"))

        server = await serve(answer)
        origin = Origin(f"http://127.0.0.1:{server.port}", idle_s=1.0)
        try:
            await asyncio.gather(*(origin.fetch("GET", "/") for _ in range(20)))
            assert len(server.connections) == 20
            until_s = time.monotonic() + 30.0
            while len(server.connections) > 1:
                assert time.monotonic() < until_s, f"{len(server.connections)} connections are still open"
                await origin.fetch("GET", "/")
            await origin.fetch("GET", "/")
            assert len(server.connections) == 1, "the one in use is kept"
        finally:
            await origin.close()
            await server.close()

    asyncio.run(story())
