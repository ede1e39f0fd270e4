"""A model with several kinds of instances is served by those that there are."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")


from chiron.net.client import Origin
from chiron.net.server import serve
from live_gateway import serving, until
from scripted_engine import CHAT, ScriptedEngine, body, whole

QUICK = 'policy = "quick"\n[policies.quick]\npolicy = "chiron"\ntick = "500ms"\n'
DEAD = '{ name = "first", engine = "openai", endpoints = ["http://127.0.0.1:9"] }'
DIES = f'{{ name = "first", engine = "command", command = ["{sys.executable}", "-c", "exit(7)", "{{port}}"] }}'


@pytest.mark.parametrize("first", [DEAD, DIES], ids=["endpoints down", "starts fail"])
def test_a_kind_that_does_not_come_is_passed_over_and_the_next_one_serves(tmp_path: Path, first: str) -> None:
    async def main() -> None:
        engine = ScriptedEngine(whole)
        engine.server = await serve(engine.handle)
        second = f'{{ name = "second", engine = "openai", endpoints = ["{engine.url}"] }}'
        text = f"{QUICK}[models.m]\nmin_instances = 1\nmax_instances = 1\ninstances = [{first}, {second}]\n"
        text += '[fleet.backoff]\nbackoff_first = "50ms"\ncrash_loop_starts = 1\n'
        async with serving(tmp_path, text) as service:
            await until(lambda: service.engines.live, "an instance is ready")
            (live,) = service.engines.live.values()
            assert live.instance.kind.name == "m/second"
            origin = Origin(service.url)
            answer = await origin.fetch("POST", CHAT.decode(), body=body(), timeout_s=60.0)
            assert answer.status == 200
            await origin.close()
            await until(lambda: not service.outages.now, "nobody is told that there is none")
        await engine.server.close(0.0)

    asyncio.run(main())


def test_endpoints_that_are_down_leave_their_share_to_the_next_kind(tmp_path: Path) -> None:
    async def main() -> None:
        engines = [ScriptedEngine(whole) for _ in range(2)]
        for engine in engines:
            engine.server = await serve(engine.handle)
        urls = ["http://127.0.0.1:9", engines[0].url]
        first = f'{{ name = "first", engine = "openai", endpoints = {urls} }}'
        second = f'{{ name = "second", engine = "openai", endpoints = ["{engines[1].url}"] }}'
        text = f"{QUICK}[models.m]\nmin_instances = 2\nmax_instances = 2\ninstances = [{first}, {second}]\n"
        async with serving(tmp_path, text) as service:
            await until(lambda: len(service.engines.live) == 2, "two instances are ready")
            kinds = sorted(live.instance.kind.name for live in service.engines.live.values())
            assert kinds == ["m/first", "m/second"]
        for engine in engines:
            await engine.server.close(0.0)

    asyncio.run(main())
