"""A request that fails leaves nothing behind; one that only finds no room now waits; what a head is told all holds."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from typing import Any

import pytest

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged.service import Pace  # noqa: E402
from chiron.engines.staged.tokenizer import ModelTokenizer  # noqa: E402
from staged_site import StagedSite, staged_site, until  # noqa: E402

PROMPT = prompts(3, seed=0)[0]
ENDLESS = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}


def test_with_one_choice_the_others_end() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(site.post("/v1/completions", {**ENDLESS, "n": 3}))
            await until(lambda: len(site.engine._running) == 3)
            generation = next(iter(site.engine._running.values()))
            site.engine.pipeline._give_up(generation.sequence, "as a test")
            status, said = await asking
            assert (status, json.loads(said)["error"]["message"]) == (503, "The pipeline is broken: as a test.")
            assert not site.engine.pipeline.running
            await until(lambda: site.replicas[0][0].service.kv.sequences == 0)

    asyncio.run(main())


def test_one_that_is_alone_waits_for_kv_that_other_heads_have() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(site.complete(PROMPT, 24))
            await until(lambda: bool(site.engine._running))
            (generation,) = site.engine._running.values()
            site.engine.pipeline.remove(generation.sequence)
            generation.preempted()
            assert await asking == recorded("llama")[0]

    asyncio.run(main())


def test_one_that_fills_the_kv_to_the_last_token_is_answered() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), kv_tokens=len(PROMPT) + 24) as site:
            assert await site.complete(PROMPT, 24) == recorded("llama")[0]

    asyncio.run(main())


@pytest.mark.parametrize("address", ["127.0.0.1:²", "127.0.0.1:99999", "127.0.0.1", ":8"])
def test_one_address_that_is_none_changes_nothing(address: str) -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3")) as site:
            before = addresses(site)
            told = {"replicas": [["127.0.0.1:9", *before[0]], [address]]}
            status, said = await site.post("/chiron/stages", told, "PUT")
            assert (status, json.loads(said)["error"]["param"]) == (400, "replicas")
            assert f"replica {address!r}: must be HOST:PORT" in json.loads(said)["error"]["message"]
            assert addresses(site) == before

    asyncio.run(main())


def test_a_long_prompt_is_tokenised_while_others_are_answered() -> None:
    def slowly(text: str, *, special: bool) -> list[int]:
        begun.set()
        assert release.wait(60.0)
        return whole.encode(text, special=special)

    whole = ModelTokenizer(tiny())
    begun, release = threading.Event(), threading.Event()

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            site.engine.tokenizer.encode = slowly  # type: ignore[method-assign]
            body = {"model": "tiny", "prompt": "bada " * 8000, "max_tokens": 1}
            asking = asyncio.ensure_future(site.post("/v1/completions", body))
            await until(begun.is_set)
            assert len(await site.complete(PROMPT, 2)) == 2
            release.set()
            status, said = await asking
            assert (status, json.loads(said)["error"]["code"]) == (400, "context_length_exceeded")

    asyncio.run(main())


LONG = "bada " * 4000
TOOL = {"type": "function", "function": {"name": "look", "description": LONG, "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"at": LONG})}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "bada"}]}
CALLED = [
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "bada"},
]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": LONG}),
        ("/v1/chat/completions", {**CHAT, "tools": [TOOL]}),
        ("/v1/chat/completions", {**CHAT, "messages": [*CHAT["messages"], *CALLED]}),
    ],
    ids=["prompt", "tools", "calls"],
)
def test_one_whose_tokenising_breaks_is_answered_whatever_makes_it_long(path: str, body: dict[str, Any]) -> None:
    def broken(text: str, *, special: bool) -> list[int]:
        threads.append(threading.current_thread())
        raise RuntimeError("as a test")

    threads: list[threading.Thread] = []

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            site.engine.tokenizer.encode = broken  # type: ignore[method-assign]
            async with asyncio.timeout(60.0):
                status, said = await site.post(path, body)
            assert (status, json.loads(said)["error"]["code"]) == (500, "engine_failed")

    asyncio.run(main())
    assert threads
    assert threading.main_thread() not in threads


def test_other_threads_run_while_a_prompt_is_tokenised() -> None:
    tokenizer, counted, over = ModelTokenizer(tiny()), 0, False

    def count() -> None:
        nonlocal counted
        while not over:
            counted += 1
            time.sleep(0)

    switch_s = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(3600.0)  # Others run only while it lets them.
    try:
        until_s, moved = time.monotonic() + 60.0, False
        while not moved and time.monotonic() < until_s:
            before = counted
            tokenizer.encode(LONG, special=True)
            moved = counted > before
    finally:
        sys.setswitchinterval(switch_s)
        over = True
        thread.join()
    assert moved


def addresses(site: StagedSite) -> list[list[str]]:
    return [[replica.address for replica in replicas] for replicas in site.engine.pipeline.replicas]
