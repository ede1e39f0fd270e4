"""A client that leaves just before the end of its answer has had its tokens: its key pays for them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from chiron.gateway.relay.keys import hash_secret
from live_gateway import until
from scripted_engine import CHAT, SSE, ScriptedEngine, before, body, chunk

KEYS = f"""
[[keys]]
name = "a"
hash = "{hash_secret(b"secret")}"
tokens_per_minute = 100
"""
HEADERS = {"authorization": "Bearer secret"}


def test_a_stream_that_is_called_off_counts_as_far_as_it_came(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine, extra=KEYS) as (service, origin):
            call = asyncio.create_task(
                origin.fetch("POST", CHAT.decode(), body=body(stream=True), headers=HEADERS, timeout_s=60.0)
            )
            await until(lambda: engine.seen, "it runs")
            engine.seen[0].start(200, SSE)
            engine.seen[0].write(chunk("word") * 200)
            (run,) = next(iter(service.engines.live.values())).runs.values()
            await until(lambda: run.tokens == 200, "the tokens have been passed on")
            call.cancel()
            await until(lambda: not service.desk.open, "it is over")
            refused = await origin.fetch("POST", CHAT.decode(), body=body(), headers=HEADERS)
            assert refused.status == 429
            assert "100 tokens per minute" in json.loads(refused.body)["error"]["message"]

    asyncio.run(main())
