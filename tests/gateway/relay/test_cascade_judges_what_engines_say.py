"""A cascade reads log-probabilities as each engine says them, waits for none that do not come, and keeps none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from cascade_site import cascade, close, entry, event, post, tally, text_of, token
from chiron.engines.rows import ENGINES
from chiron.net.server import Incoming
from live_gateway import COMPLETIONS, until
from scripted_engine import SSE, Reader, ScriptedEngine, body, whole

SURE = -0.1


def test_an_answer_without_log_probabilities_is_not_waited_for(tmp_path: Path) -> None:
    """The small model is stopped while it writes; what has said nothing yet, or only thought, may still be judged."""
    thought = event({"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": None})

    async def main() -> None:
        small, large = ScriptedEngine(lambda incoming: incoming.start(200, SSE)), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large) as (_, origin):
            asks = asyncio.ensure_future(post(origin, {}))
            await until(lambda: small.seen, "the small model is asked")
            small.seen[0].write(token("w", None) * 16)
            await until(lambda: small.left, "the small model is stopped")
            assert (await asks).status == 200
            assert (await tally(origin))["escalated"] == {"unjudged": 1}

            reader = Reader(origin, body(stream=True, model="chat"))
            await until(lambda: len(small.seen) == 2, "the small model is asked")
            small.seen[1].write(thought * 40 + token("w", None) * 15 + token("w", SURE) * 3)
            await until(lambda: text_of(reader.data) == "w" * 18, "its answer is given")
            small.seen[1].write(close(3))
            small.seen[1].finish()
            await reader.end()
            assert len(large.seen) == 1

    asyncio.run(main())


def test_llama_cpp_says_those_of_text_as_of_a_chat_and_only_if_asked_for_one(tmp_path: Path) -> None:
    def answer(incoming: Incoming) -> None:
        asked = json.loads(incoming.body).get("logprobs", 0)
        logprobs = {"content": [entry(SURE)]} if asked > 0 else None
        chunk = event({"index": 0, "text": "w", "logprobs": logprobs, "finish_reason": None})
        incoming.start(200, SSE)
        incoming.write(chunk * 4 + event({"index": 0, "text": "", "finish_reason": "stop"}) + b"data: [DONE]\n\n")
        incoming.finish()

    async def main() -> None:
        small, large = ScriptedEngine(answer), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large, engine="llamacpp") as (_, origin):
            wants: dict[str, Any]
            for wants in ({}, {"logprobs": 0}):
                asks = json.dumps({"model": "chat", "prompt": "hello", **wants}).encode()
                found = await origin.fetch("POST", COMPLETIONS, body=asks, timeout_s=60.0)
                (choice,) = json.loads(found.body)["choices"]
                assert choice["text"] == "wwww"
                said = choice["logprobs"]
                assert said is None if not wants else [each["top_logprobs"] for each in said["content"]] == [[]] * 4
            assert not large.seen

    asyncio.run(main())


def test_a_token_that_is_none_of_the_likeliest_makes_no_answer_surer(tmp_path: Path) -> None:
    """vLLM's chat tells the chosen token first and then the likeliest, so many in all as it was asked for."""
    chosen, likeliest = entry(-3.0, -0.6, -1.0), 0.55 - 0.37

    def answer(incoming: Incoming) -> None:
        asked = json.loads(incoming.body)["top_logprobs"]
        logprobs = {"content": [{**chosen, "top_logprobs": chosen["top_logprobs"][:asked]}]}
        incoming.start(200, SSE)
        incoming.write(event({"index": 0, "delta": {"content": "w"}, "logprobs": logprobs}) * 3 + close(3))
        incoming.finish()

    async def main() -> None:
        small, large = ScriptedEngine(answer), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large, rule=', test = "margin"') as (_, origin):
            assert likeliest < 0.3
            assert (await post(origin, {})).status == 200
            assert (await tally(origin))["escalated"] == {"unsure": 1}

    asyncio.run(main())


def test_what_nobody_asked_for_is_not_kept(tmp_path: Path) -> None:
    """Twenty likeliest tokens are thousands of bytes for each that is said."""
    rule = ', test = "entropy"'

    async def main() -> None:
        small, large = ScriptedEngine(lambda incoming: incoming.start(200, SSE)), ScriptedEngine()
        async with cascade(tmp_path, small, large, rule=rule) as (service, origin):
            for fields, kept in (
                ({}, 0),
                ({"stream": True, "logprobs": True, "top_logprobs": 2}, 0),
                ({"logprobs": True, "top_logprobs": 2}, 2),
            ):
                small.seen.clear()
                asks = asyncio.ensure_future(post(origin, fields))
                await until(lambda: small.seen, "the small model is asked")
                call: Any = next(iter(service.gateway.desk.open.values())).payload
                sent = token("w", SURE) * 5
                small.seen[0].write(sent)
                await until(lambda: call._collector.tokens == 5, "it is read")  # noqa: B023
                content = call._collector.logprobs.get("content", [])
                assert [len(each["top_logprobs"]) for each in content] == [kept] * (5 if kept else 0)
                assert 0 < call._collector._bytes_max - call._collector._bytes_left < len(sent)
                small.seen[0].write(close(5))
                small.seen[0].finish()
                assert (await asks).status == 200
            assert not large.seen

    asyncio.run(main())


def test_another_try_of_what_nobody_has_read_is_judged_anew(tmp_path: Path) -> None:
    """As a relay without a brain tries again: the first answer was sure, the second is another one."""

    async def main() -> None:
        small, large = ScriptedEngine(lambda incoming: incoming.start(200, SSE)), ScriptedEngine(whole)
        async with cascade(tmp_path, small, large) as (service, origin):
            asks = asyncio.ensure_future(post(origin, {}))
            await until(lambda: small.seen, "the small model is asked")
            (request,) = service.gateway.desk.open.values()
            call: Any = request.payload
            small.seen[0].write(token("w", SURE) * 3)
            await until(lambda: call._collector.tokens == 3, "it is read")
            call.message(ENGINES["openai"], "small", request)
            call.data(token("w", -3.0) * 3)
            await until(lambda: large.seen, "the large one is asked")
            assert (await asks).status == 200
            assert (await tally(origin))["escalated"] == {"unsure": 1}

    asyncio.run(main())
