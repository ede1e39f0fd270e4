"""The embedded engine behind the gateway: batch work gives way and goes on where it was, limits reach the engine."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino_genai")

from chiron.engines.serve.toy import ToySettings, write_toy
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.service import Service
from engine_process import connected, limits, metrics
from live_gateway import ask, ready, serving, until

pytestmark = pytest.mark.slow

LONG = 1400
"""Tokens of an answer that takes seconds."""

CONFIG = """
[models.toy]
engine = "openvino"
model_path = "{model}"
threads = 1
max_num_seqs = {slots}
min_instances = {least}
max_instances = 1
kv_capacity_tokens = 20000
# In f32 a token does not depend on whether a prefill or a decode step computed what is before it.
args = ["--precision", "f32"]
{settings}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Slow enough to be interrupted, small enough to load at once.
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_toy(path, ToySettings(hidden=256, layers=2, context_tokens=2048))
    return path


def config(model: Path, *, slots: int, least: int = 1, settings: str = "") -> str:
    return CONFIG.format(model=model, slots=slots, least=least, settings=settings)


def prompt(seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(400) for _ in range(tokens)]


async def interrupted(
    service: Service, engine: InstanceEngine, long: list[int], chat: list[int], tokens: int = LONG
) -> dict[str, Any]:
    """Batch work's answer: when it has made some tokens, two interactive requests take all places. It is evicted
    once, unless this process stalls while the engine's does not, and it ends before they come."""
    flex = asyncio.create_task(ask(service.url, prompt=long, max_tokens=tokens, service_tier="flex"))
    await until(lambda: flex.done() or any(run.tokens > 100 for run in engine.runs.values()), "it makes tokens")
    await asyncio.gather(*(ask(service.url, prompt=chat, max_tokens=200) for _ in range(2)))
    return await flex


def test_an_evicted_answer_is_the_uninterrupted_one_and_its_kv_was_kept(tmp_path: Path, model: Path) -> None:
    long, chat = prompt(1, 600), prompt(2, 40)

    async def body() -> None:
        async with serving(tmp_path, config(model, slots=2)) as service:
            _, engine = await ready(service)
            whole = await ask(engine.url, prompt=long, max_tokens=LONG)
            # Another prompt of that length first: how much a prefill without KV computes.
            async with connected(engine.url) as origin:
                for seed in range(3, 8):
                    before = await metrics(origin)
                    answer = await interrupted(service, engine, prompt(seed, 600), chat)
                    after = await metrics(origin)
                    if service.plane.evictions:
                        break
            assert service.plane.evictions == 1
            assert answer["usage"] == {"prompt_tokens": 600, "completion_tokens": LONG, "total_tokens": 600 + LONG}
            # Prefilled: its own prompt, the chats' (the second finds the first's), and little more.
            prefilled = after["chiron:engine_prefill_tokens_total"] - before["chiron:engine_prefill_tokens_total"]
            assert 600 <= prefilled < 600 + 2 * 40 + 64
            assert after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] >= 600 + 32
            assert after["chiron:engine_cancelled_requests_total"] == 1

            for _ in range(5):
                answer = await interrupted(service, engine, long, chat)
                if service.plane.evictions == 2:
                    break
            assert service.plane.evictions == 2
            assert answer["choices"][0]["text"] == whole["choices"][0]["text"]

    asyncio.run(body())


def test_a_resumed_answer_goes_on_at_once(tmp_path: Path, model: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path, config(model, slots=2)) as service:
            _, engine = await ready(service)
            async with connected(engine.url) as origin:
                for seed in range(4, 9):
                    before = await metrics(origin)
                    answer = await interrupted(service, engine, prompt(seed, 900), prompt(50, 20), 1148)
                    after = await metrics(origin)
                    if service.plane.evictions:
                        break
            assert service.plane.evictions == 1
            assert answer["usage"]["completion_tokens"] == 1148
            # Prefilled: its prompt, the chats', and of its own tokens what a kept KV lacks.
            prefilled = after["chiron:engine_prefill_tokens_total"] - before["chiron:engine_prefill_tokens_total"]
            assert 900 <= prefilled < 900 + 2 * 20 + 64

    asyncio.run(body())


def test_the_engines_own_limit_follows_the_gate(tmp_path: Path, model: Path) -> None:
    settings = """
[policies.chiron]
initial_max_batch_size = 3
"""

    async def body() -> None:
        async with serving(tmp_path, config(model, slots=8, settings=settings)) as service:
            instance, engine = await ready(service)
            async with connected(engine.url) as origin:

                async def follows() -> int:
                    async with asyncio.timeout(60.0):
                        while (said := (await limits(origin))["limit"]) != instance.max_batch_size:
                            await asyncio.sleep(0.01)
                    return said

                assert await follows() == 3
                risen = False

                async def client(number: int) -> None:
                    while not risen:
                        await ask(service.url, prompt=prompt(number, 30), max_tokens=300)

                work = [asyncio.create_task(client(i)) for i in range(8)]
                async with asyncio.timeout(60.0):  # A stall may lower it again for a while.
                    while await follows() <= 3:
                        await asyncio.sleep(0.01)
                assert service.plane.models["toy"].learner.trusted
                risen = True
                await asyncio.gather(*work)
                assert len(engine.runs) == 0

    asyncio.run(body())


def test_from_zero_every_request_waits_for_the_engine(tmp_path: Path, model: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path, config(model, slots=8, least=0)) as service:
            assert not service.plane.instances
            answers = await asyncio.gather(*(ask(service.url, prompt=prompt(i, 20), max_tokens=5) for i in range(6)))
            assert all(answer["usage"]["completion_tokens"] == 5 for answer in answers)
            assert len(service.plane.instances) == 1
            assert service.plane.models["toy"].cold_starts_seen == 1

    asyncio.run(body())
