"""A running engine takes another token budget over a real socket, and a prompt then takes more and shorter steps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from chiron.engines.model import StepTable
from chiron.engines.profile_store import load_profile
from chiron.engines.serve.emulated_engine import EmulatedEngine, EmulatedSettings, at_speed
from chiron.engines.serve.http import EngineServer
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from chiron.net.server import serve
from live_gateway import ask, ready, serving, until

PROFILE = at_speed(replace(load_profile("llama-3.1-8b/a100/tp1"), max_num_batched_tokens=512), 100.0)


def test_steps_of_an_emulated_engine_get_shorter_while_it_runs(tmp_path: Path) -> None:
    async def main() -> None:
        clock = LiveClock(asyncio.get_running_loop())
        engine = EmulatedEngine(
            clock=clock, number=1, name="m", profile=PROFILE, times=StepTable(PROFILE), settings=EmulatedSettings()
        )
        upstream = await serve(EngineServer(engine, ["m"], {}).handle)
        text = (
            f'[models.m]\nengine = "emulated"\nendpoints = ["http://127.0.0.1:{upstream.port}"]\n'
            "max_num_batched_tokens = 512\n"
        )
        try:
            async with serving(tmp_path, text) as service:
                instance, told = await ready(service)
                assert instance.kind.live_token_budget

                async def steps(first: int) -> int:
                    before = engine.sample().steps
                    prompt = list(range(first, first + 512))
                    await ask(service.url, model="m", prompt=prompt, max_tokens=1)
                    return engine.sample().steps - before

                assert await steps(1000) == 1
                service.clock.post(lambda: told.set_max_num_batched_tokens(64))
                await until(lambda: engine.limits()["max_num_batched_tokens"] == 64, "it was told")
                assert await steps(2000) == 8
                service.clock.post(lambda: told.set_max_num_batched_tokens(9999))
                await until(lambda: engine.limits()["max_num_batched_tokens"] == 512, "its own is the most")
                assert await steps(3000) == 1
        finally:
            await upstream.close(0.0)
            clock.stop()

    asyncio.run(main())


def test_an_engine_that_cannot_says_so_and_takes_its_limit_all_the_same() -> None:
    class Fixed:
        limit = 8

        def set_limit(self, limit: int) -> None:
            self.limit = limit

        def limits(self) -> dict[str, int]:
            return {"limit": self.limit}

    async def main() -> None:
        upstream = await serve(EngineServer(Fixed(), ["m"], {}).handle)  # type: ignore[arg-type]
        origin = Origin(f"http://127.0.0.1:{upstream.port}", connect_timeout_s=60.0)
        try:
            refused = await origin.fetch("PUT", "/chiron/limits", body=b'{"max_num_batched_tokens": 64}')
            assert refused.status == 400
            assert b"max_num_batched_tokens cannot be changed here" in refused.body
            for body, status in ((b'{"limit": 4}', 200), (b'{"max_num_batched_tokens": 0}', 400), (b"{}", 400)):
                assert (await origin.fetch("PUT", "/chiron/limits", body=body)).status == status
        finally:
            await origin.close()
            await upstream.close(0.0)

    asyncio.run(main())
