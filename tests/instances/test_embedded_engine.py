"""The embedded engine behind the gateway: batch work gives way and goes on where it was, limits reach the engine."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

pytest.importorskip("openvino_genai")

from chiron.engines.serve.toy import ToySettings, write_toy
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


def test_an_evicted_answer_is_the_uninterrupted_one_and_its_kv_was_kept(tmp_path: Path, model: Path) -> None:
    long, chat = prompt(1, 600), prompt(2, 40)

    async def body() -> None:
        async with serving(tmp_path, config(model, slots=2)) as service:
            _, engine = await ready(service)
            whole = await ask(engine.url, prompt=long, max_tokens=LONG)
            # Another prompt of that length first: how much a prefill without KV computes.
            async with connected(engine.url) as origin:
                before = await metrics(origin)
                flex = asyncio.create_task(
                    ask(service.url, prompt=prompt(3, 600), max_tokens=LONG, service_tier="flex")
                )
                run = await until(lambda: next(iter(engine.runs.values()), None), "batch work runs")
                await until(lambda: run.tokens > 100, "it has made some tokens")
                chats = [asyncio.create_task(ask(service.url, prompt=chat, max_tokens=200)) for _ in range(2)]
                await until(lambda: service.plane.evictions, "interactive requests evict it")
                await asyncio.gather(*chats)
                assert not flex.done()
                answer = await flex
                after = await metrics(origin)
            assert service.plane.evictions == 1
            assert answer["usage"] == {"prompt_tokens": 600, "completion_tokens": LONG, "total_tokens": 600 + LONG}
            # Prefilled: its own prompt, the chats' (the second finds the first's), and little more.
            prefilled = after["chiron:engine_prefill_tokens_total"] - before["chiron:engine_prefill_tokens_total"]
            assert 600 <= prefilled < 600 + 2 * 40 + 64
            assert after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] >= 600 + 32
            assert after["chiron:engine_cancelled_requests_total"] == 1

            again = asyncio.create_task(ask(service.url, prompt=long, max_tokens=LONG, service_tier="flex"))
            run = await until(lambda: next(iter(engine.runs.values()), None), "batch work runs")
            await until(lambda: run.tokens > 150, "it has made some tokens")
            await asyncio.gather(*(ask(service.url, prompt=chat, max_tokens=200) for _ in range(2)))
            answer = await again
            assert service.plane.evictions == 2
            assert answer["choices"][0]["text"] == whole["choices"][0]["text"]

    asyncio.run(body())


def test_a_resumed_answer_goes_on_at_once(tmp_path: Path, model: Path) -> None:
    async def body() -> None:
        async with serving(tmp_path, config(model, slots=2)) as service:
            _, engine = await ready(service)
            flex = asyncio.create_task(ask(service.url, prompt=prompt(4, 900), max_tokens=1148, service_tier="flex"))
            first = await until(lambda: next(iter(engine.runs.values()), None), "batch work runs")
            await until(lambda: first.tokens > 60, "it has made some tokens")
            async with connected(engine.url) as origin:
                before = await metrics(origin)
                await asyncio.gather(*(ask(service.url, prompt=prompt(5, 20), max_tokens=200) for _ in range(2)))
                assert service.plane.evictions == 1
                request = first.request
                second = await until(lambda: engine.runs.get(request.id), "it runs again")
                held = second.tokens
                await until(lambda: second.tokens > held, "it goes on")
                after = await metrics(origin)
            # Prefilled meanwhile: the chats' prompts, and of its own what a kept KV lacks.
            prefilled = after["chiron:engine_prefill_tokens_total"] - before["chiron:engine_prefill_tokens_total"]
            assert prefilled < 2 * 20 + 64
            flex.cancel()

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
                    for _ in range(200):
                        if (said := (await limits(origin))["limit"]) == instance.max_batch_size:
                            return said
                        await asyncio.sleep(0.01)
                    raise AssertionError(f"the engine's limit is {said}, the gate's {instance.max_batch_size}")

                assert await follows() == 3
                risen = False

                async def client(number: int) -> None:
                    while not risen:
                        await ask(service.url, prompt=prompt(number, 30), max_tokens=300)

                work = [asyncio.create_task(client(i)) for i in range(8)]
                await until(lambda: instance.max_batch_size > 3, "step times are learned and the limit rises")
                assert service.plane.models["toy"].learner.trusted
                assert await follows() > 3
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
