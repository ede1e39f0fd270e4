"""A probe asks whether this gateway answers: a relay says so itself, also while nobody leads."""

from __future__ import annotations

import asyncio
from pathlib import Path

from chiron.gateway.relay.passing import Passing
from chiron.net.client import Origin
from chiron.net.server import serve


def test_only_what_a_brain_alone_could_answer_is_refused_while_there_is_none(tmp_path: Path) -> None:
    async def main() -> None:
        passing = Passing(str(tmp_path / "nobody listens here"))
        server = await serve(passing.handle, streamed=passing.handle, is_app=lambda incoming: True)
        origin = Origin(f"http://127.0.0.1:{server.port}")
        try:
            for method, body in (("GET", b'{"status":"ok"}'), ("HEAD", b"")):
                answer = await origin.fetch(method, "/health")
                assert (answer.status, answer.body) == (200, body)
            for method, path in (("GET", "/ready"), ("GET", "/health/x"), ("POST", "/health")):
                assert (await origin.fetch(method, path)).status == 503
        finally:
            await origin.close()
            await server.close(0)

    asyncio.run(main())


def test_a_relay_whose_requests_find_no_engine_is_not_healthy(tmp_path: Path) -> None:
    async def main() -> None:
        passing = Passing(str(tmp_path / "nobody listens here"), lambda: " It stands badly.", lambda: False)
        server = await serve(passing.handle, streamed=passing.handle, is_app=lambda incoming: True)
        origin = Origin(f"http://127.0.0.1:{server.port}")
        try:
            answer = await origin.fetch("GET", "/health")
            assert (answer.status, b"No engine is reached. It stands badly." in answer.body) == (503, True)
            assert (await origin.fetch("HEAD", "/health")).status == 503
        finally:
            await origin.close()
            await server.close(0)

    asyncio.run(main())
