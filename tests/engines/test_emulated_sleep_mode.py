"""The emulated engine sleeps and wakes as vLLM does, over sockets; calls take their time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from chiron.engines.model import StepTable
from chiron.engines.profile_store import load_profile
from chiron.engines.serve.emulated_engine import EmulatedEngine, EmulatedSettings
from chiron.engines.serve.http import EngineServer
from chiron.engines.serve.sleep_mode import SleepTimes, copy_s
from chiron.net.client import NetError, Origin
from chiron.net.clock import LiveClock
from chiron.net.server import serve

PROFILE = load_profile("llama-3.1-8b/a100/tp1")
MODEL = PROFILE.model


class Client:
    def __init__(self, origin: Origin) -> None:
        self._origin = origin

    async def ask(self, method: str, path: str, content: object = None) -> tuple[int, dict[str, object]]:
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        answer = await self._origin.fetch(method, path, body=body, timeout_s=60.0)
        return answer.status, json.loads(answer.body or b"{}")

    async def sleeps(self) -> bool:
        status, said = await self.ask("GET", "/is_sleeping")
        assert status == 200
        return said == {"is_sleeping": True}

    async def complete(self, tokens: int = 2) -> tuple[int, dict[str, object]]:
        content = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True}
        return await self.ask("POST", "/v1/completions", content)


@asynccontextmanager
async def engine(times: SleepTimes | None) -> AsyncIterator[Client]:
    clock = LiveClock(asyncio.get_running_loop())
    emulated = EmulatedEngine(
        clock=clock,
        number=0,
        name=MODEL,
        profile=PROFILE,
        times=StepTable(PROFILE),
        settings=EmulatedSettings(),
        sleep_times=times,
    )
    routes = emulated.sleep_mode.routes if emulated.sleep_mode is not None else None
    server = await serve(EngineServer(emulated, [MODEL], {}, routes).handle)
    origin = Origin(f"http://127.0.0.1:{server.port}", connect_timeout_s=60.0, keepalive=False)
    try:
        yield Client(origin)
    finally:
        await origin.close()
        await server.close(0)
        clock.stop()


def test_it_sleeps_wakes_and_serves_again() -> None:
    async def story() -> None:
        async with engine(SleepTimes(sleep_s=0.0, wake_s=0.05)) as client:
            assert not await client.sleeps()
            assert await client.ask("POST", "/sleep?level=1") == (200, {})
            assert await client.sleeps()
            assert (await client.ask("GET", "/health"))[0] == 200, "as vLLM's"
            status, said = await client.complete()
            assert (status, said["error"]["code"]) == (503, "sleeping")  # type: ignore[index]
            began_s = asyncio.get_running_loop().time()
            assert await client.ask("POST", "/wake_up") == (200, {})
            assert asyncio.get_running_loop().time() - began_s >= 0.05
            assert not await client.sleeps()
            assert (await client.complete())[0] == 200

    asyncio.run(story())


def test_calls_are_done_one_after_the_other() -> None:
    async def story() -> None:
        async with engine(SleepTimes(sleep_s=0.1, wake_s=0.1)) as client:
            began_s = asyncio.get_running_loop().time()
            falling = asyncio.create_task(client.ask("POST", "/sleep"))
            await asyncio.sleep(0.02)
            assert not await client.sleeps(), "not yet"
            assert (await client.complete())[0] == 503, "but it takes nothing new"
            assert await client.ask("POST", "/wake_up") == (200, {})
            assert asyncio.get_running_loop().time() - began_s >= 0.2
            assert falling.done()
            assert await client.ask("POST", "/wake_up") == (200, {}), "it is awake already"
            assert (await client.complete())[0] == 200

    asyncio.run(story())


def test_what_runs_when_it_falls_asleep_breaks_off() -> None:
    async def story() -> None:
        async with engine(SleepTimes(sleep_s=0.0, wake_s=0.0)) as client:
            running = asyncio.create_task(client.complete(5000))
            await asyncio.sleep(0.1)
            assert (await client.ask("POST", "/sleep"))[0] == 200
            with pytest.raises(NetError):
                await running
            await client.ask("POST", "/wake_up")
            assert (await client.complete())[0] == 200

    asyncio.run(story())


def test_after_level_2_it_has_no_weights_until_they_are_loaded() -> None:
    async def story() -> None:
        async with engine(SleepTimes(sleep_s=600.0, wake_s=0.0, reload_s=0.05)) as client:
            assert (await client.ask("POST", "/sleep?level=2"))[0] == 200, "nothing is copied"
            rpc = {"method": "reload_weights"}
            assert (await client.ask("POST", "/collective_rpc", rpc))[0] == 400
            await client.ask("POST", "/wake_up")
            assert not await client.sleeps()
            status, said = await client.complete()
            assert (status, said["error"]["code"]) == (503, "no_weights")  # type: ignore[index]
            assert (await client.ask("POST", "/collective_rpc", rpc))[0] == 200
            assert (await client.complete())[0] == 200

    asyncio.run(story())


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/sleep?level=3", "level is '3'; it must be 1 or 2"),
        ("/sleep?mode=wait", "mode is 'wait'; it must be abort"),
        ("/sleep?depth=1", "depth: unknown parameter of /sleep; known: level and mode"),
        ("/wake_up?tags=weights", "tags: unknown parameter of /wake_up; known: none"),
        ("/collective_rpc", "method is None; it must be reload_weights"),
    ],
)
def test_what_it_does_not_know_is_refused(path: str, says: str) -> None:
    async def story() -> None:
        async with engine(SleepTimes(sleep_s=0.0, wake_s=0.0)) as client:
            status, said = await client.ask("POST", path)
            assert status == 400
            assert says in said["error"]["message"]  # type: ignore[index]

    asyncio.run(story())


def test_a_body_that_is_nested_too_deep_is_refused() -> None:
    async def story() -> None:
        async with engine(SleepTimes(sleep_s=0.0, wake_s=0.0)) as client:
            assert (await client.ask("POST", "/collective_rpc", b"[" * 100_000))[0] == 400

    asyncio.run(story())


def test_without_sleep_mode_there_are_no_such_routes() -> None:
    async def story() -> None:
        async with engine(None) as client:
            assert (await client.ask("POST", "/sleep"))[0] == 404

    asyncio.run(story())


def test_a_wake_copies_the_weights_of_the_profile() -> None:
    assert copy_s(PROFILE) == 2 * 8_030_261_248 / 20e9
    assert copy_s(load_profile("llama-3.1-70b/h100/tp4")) == 2 * 70_553_706_496 / 80e9
    assert copy_s(replace(PROFILE, name="mine", model="unknown")) == 5.0
