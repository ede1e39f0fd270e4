"""An engine that can be told its max batch size hears of it, also when a first message does not get through."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from chiron.net.server import Incoming, serve
from live_gateway import ready, serving, until


def test_a_limit_that_the_engine_did_not_take_is_sent_again(tmp_path: Path) -> None:
    heard: list[int] = []

    def engine(incoming: Incoming) -> None:
        if incoming.method != b"PUT":
            incoming.respond(200)
            return
        heard.append(json.loads(incoming.body)["limit"])
        incoming.respond(503 if heard.count(7) == 1 else 200)

    async def main() -> None:
        upstream = await serve(engine)
        text = f'[models.m]\nengine = "vllm"\nendpoints = ["http://127.0.0.1:{upstream.port}"]\nmax_num_seqs = 8\n'
        try:
            async with serving(tmp_path, text) as service:
                _, told = await ready(service)
                service.clock.post(lambda: told.set_max_batch_size(7))
                await until(lambda: heard.count(7) == 2, "it was sent again", 10.0)
                await until(lambda: told.limit.call is None, "it was taken", 10.0)
                assert told.limit.sent == 7
        finally:
            await upstream.close(0.0)

    asyncio.run(main())
