"""The gateway before a real vLLM. Skipped unless CHIRON_TEST_VLLM names a Python that has vLLM (CONTRIBUTING.md)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from chiron.engines.metrics import read_row
from chiron.engines.rows import ENGINES
from chiron.net.client import Origin
from fault_site import Answer, Api, FaultSite, chat, config, item
from ports import free_port
from vllm_process import CONTEXT_TOKENS, MODEL, VllmProcess, write_model

PYTHON = os.environ.get("CHIRON_TEST_VLLM", "")
GATE = 4
"""Max batch size in Chiron; the engine itself would run more."""
ENGINE_SEQS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="CHIRON_TEST_VLLM names no Python that has vLLM"),
]


@dataclass
class Site:
    """A vLLM and a gateway before it."""

    vllm: VllmProcess
    gateway: FaultSite


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("vllm")
    model = write_model(directory / "model", hidden=512, layers=8)
    port = free_port()
    keys = f'engine = "vllm"\nendpoints = ["http://127.0.0.1:{port}"]\nserved_model_name = "{MODEL}"'
    with (
        VllmProcess(PYTHON, model, directory / "vllm.log", port, "--max-num-seqs", str(ENGINE_SEQS)) as vllm,
        FaultSite(directory, config(f"{keys}\nmax_num_seqs = {GATE}")) as gateway,
    ):
        asyncio.run(ready(gateway))
        yield Site(vllm, gateway)


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """What the (asynchronous) condition says once it is true."""
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):
            await asyncio.sleep(0.05)
    return found


async def ready(gateway: FaultSite) -> None:
    async with Api(gateway.url) as api:

        async def instance() -> bool:
            return any(each["state"] == "ready" for each in await instances(api))

        await until(instance, "an instance is ready")


async def instances(api: Api) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await api.get("/chiron/status"))["models"][0]["instances"]
    return found


async def figures(origin: Origin) -> dict[str, float]:
    """What Chiron reads of vLLM's metrics."""
    answer = await origin.fetch("GET", "/metrics")
    assert answer.status == 200
    return read_row(ENGINES["vllm"], answer.body.decode())


@dataclass
class Watched:
    """The most that the engine ran, and let wait, while somebody looked."""

    running: float = 0.0
    waiting: float = 0.0
    looks: list[Mapping[str, float]] = field(default_factory=list)


@asynccontextmanager
async def watched(url: str) -> AsyncIterator[Watched]:
    found = Watched()
    origin = Origin(url, keepalive=False)

    async def look() -> None:
        while True:
            said = await figures(origin)
            found.looks.append(said)
            found.running = max(found.running, said["running"])
            found.waiting = max(found.waiting, said["waiting"])
            await asyncio.sleep(0.02)

    task = asyncio.create_task(look())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.wait([task])
        await origin.close()


async def ask(api: Api, path: str, **body: Any) -> tuple[int, Any]:
    answer = await api.ask("POST", path, {"model": "m", "max_tokens": 5, "ignore_eos": True, **body})
    return answer.status, answer.body if body.get("stream") else json.loads(answer.body)


def events(body: bytes) -> list[dict[str, Any]]:
    parts = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
    assert parts.pop() == b"[DONE]"
    return [json.loads(part) for part in parts]


MESSAGES = [{"role": "user", "content": "hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPTS: dict[str, dict[str, Any]] = {CHAT: {"messages": MESSAGES}, TEXT: {"prompt": "x"}}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def test_answers_in_one_piece_and_as_streams(site: Site) -> None:
    async def run() -> None:
        async with Api(site.gateway.url) as api:
            for path, prompt in PROMPTS.items():
                status, whole = await ask(api, path, **prompt)
                assert (status, whole["usage"]["completion_tokens"]) == (200, 5)
                status, body = await ask(api, path, **prompt, **USAGE)
                assert status == 200
                assert events(body)[-1]["usage"].items() <= whole["usage"].items()
                status, body = await ask(api, path, **prompt, stream=True)
                assert not any(event.get("usage") for event in events(body)), "nobody asked for it"

    asyncio.run(run())


def test_what_vllm_refuses_reaches_the_client_as_it_said(site: Site) -> None:
    async def run() -> None:
        async with Api(site.gateway.url) as api:
            for stream in (False, True):
                over = CONTEXT_TOKENS + 1
                answer = await api.ask("POST", "/v1/chat/completions", chat(tokens=over, stream=stream))
                assert answer.status == 400
                assert str(CONTEXT_TOKENS) in json.loads(answer.body)["error"]["message"]

    asyncio.run(run())


def test_the_metrics_row_fits_this_version(site: Site) -> None:
    async def run() -> None:
        origin = Origin(site.vllm.url, keepalive=False)
        async with Api(site.gateway.url) as api:
            before = await figures(origin)
            assert before.keys() >= ENGINES["vllm"].metrics.keys()
            status, _ = await ask(api, "/v1/chat/completions", messages=MESSAGES, max_tokens=50)
            assert status == 200

            async def counted() -> bool:
                return (await figures(origin))["generation_tokens"] == before["generation_tokens"] + 50

            await until(counted, "vLLM counts the tokens")
            after = await figures(origin)
            assert after["itl_count"] == before["itl_count"] + 49
            assert after["steps"] >= before["steps"] + 50

            async def learned() -> bool:
                return (await instances(api))[0]["kv_capacity_tokens"] == after["kv_capacity_tokens"]

            await until(learned, "its KV capacity is learned", 10.0)
        await origin.close()

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_place(site: Site) -> None:
    async def run() -> None:
        engine, gateway = Origin(site.vllm.url, keepalive=False), Origin(site.gateway.url, keepalive=False)
        answer = Answer(gateway, chat(tokens=CONTEXT_TOKENS // 2))
        await answer.first.wait()
        assert (await figures(engine))["running"] == 1
        answer.call.cancel()

        async def free() -> bool:
            return (await figures(engine))["running"] == 0

        await until(free, "its place is free", 5.0)
        await gateway.close()
        await engine.close()

    asyncio.run(run())


def test_the_engine_never_runs_more_than_the_gate_lets_in(site: Site) -> None:
    async def run() -> None:
        gateway = Origin(site.gateway.url, keepalive=False)
        async with watched(site.vllm.url) as seen:
            answers = [Answer(gateway, chat(f"{i}", tokens=40)) for i in range(5 * GATE)]
            assert {await answer.end() for answer in answers} == {"complete"}
        assert seen.running == GATE
        assert seen.waiting <= GATE, "only on their way to their first step"
        await gateway.close()

    asyncio.run(run())


async def outcome(api: Api, batch_id: str, timeout_s: float = 120.0) -> list[str]:
    """The ids of a batch's result lines, once it is completed."""

    async def ended() -> Any:
        batch = await api.batch(batch_id)
        return batch if batch["status"] in ("completed", "failed", "expired", "cancelled") else None

    batch = await until(ended, "the batch ends", timeout_s)
    assert batch["status"] == "completed"
    lines = await api.lines(batch, "output_file_id")
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in lines} == {150}
    return [line["custom_id"] for line in lines]


def test_interactive_requests_evict_batch_items_which_start_again(site: Site) -> None:
    async def run() -> None:
        async with Api(site.gateway.url) as api, watched(site.vllm.url) as seen:
            batch_id = await api.submit(item(f"b{i}", tokens=150) for i in range(3 * GATE))

            async def full() -> bool:
                return bool(seen.looks) and seen.looks[-1]["running"] == GATE

            await until(full, "the batch fills the engine")
            before = (await api.get("/chiron/status"))["evictions"]
            answers = [Answer(api.origin, chat(f"{i}")) for i in range(2)]
            assert {await answer.end() for answer in answers} == {"complete"}
            assert (await api.get("/chiron/status"))["evictions"] >= before + 2
            assert await outcome(api, batch_id) == [f"b{i}" for i in range(3 * GATE)]
        assert seen.running == GATE, "evicted requests have left before others come"

    asyncio.run(run())


def test_vllm_is_killed_under_load_and_comes_back(site: Site) -> None:
    async def run() -> None:
        async with Api(site.gateway.url) as api:
            batch_id = await api.submit(item(f"k{i}", tokens=150) for i in range(3 * GATE))
            answers = [Answer(api.origin, chat(f"{i}", tokens=400)) for i in range(2)]
            for answer in answers:
                await answer.first.wait()
            site.vllm.kill()
            assert {await answer.end() for answer in answers} == {"error event"}
            assert all(b"engine_lost" in answer.text for answer in answers)

            held = Answer(api.origin, chat("held while there is no engine"))
            await asyncio.to_thread(site.vllm.start)
            assert await held.end(60.0) == "complete"
            assert await outcome(api, batch_id) == [f"k{i}" for i in range(3 * GATE)]

    asyncio.run(run())
