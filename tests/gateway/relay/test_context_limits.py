"""A prompt that no engine's context can hold is refused at the door, as OpenAI says it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from chiron.engines.rows import ENGINES
from chiron.gateway.relay.context_limit import UNTOLD, longest, read_context
from chiron.net.server import Incoming
from live_gateway import until
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk

CONTEXT = 4096
GOOD = chunk("a") + chunk("b", usage={"prompt_tokens": 5, "completion_tokens": 2}) + b"data: [DONE]\n\n"


def answer(incoming: Incoming) -> None:
    incoming.start(200, SSE)
    incoming.write(GOOD)
    incoming.finish()


class Telling(ScriptedEngine):
    """Tells its context, to who has the key."""

    def __init__(self, context: int) -> None:
        super().__init__(answer)
        self.context = context
        self.keys: set[bytes | None] = set()

    def handle(self, incoming: Incoming) -> None:
        if incoming.method == b"GET" and incoming.path == "/v1/models":
            self.keys.add(incoming.header(b"authorization"))
            entries = [{"id": "m", "max_model_len": self.context}, {"id": "other", "max_model_len": 10**6}]
            incoming.respond(200, json.dumps({"object": "list", "data": entries}).encode())
        else:
            super().handle(incoming)


def chat(characters: int) -> bytes:
    return body(messages=[{"role": "user", "content": "x" * characters}], stream=True)


def test_a_prompt_beyond_every_context_is_refused_at_once_and_is_no_load(tmp_path: Path) -> None:
    async def told() -> None:
        small, large = Telling(CONTEXT // 2), Telling(CONTEXT)
        async with before(tmp_path, small, large) as (service, origin):
            served = service.models.by_name["m"]
            await until(lambda: served.context_tokens == CONTEXT, "both engines have told")
            refused = await Reader(origin, chat(1_000_000)).end()
            error = json.loads(refused.data)["error"]
            assert (refused.status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
            assert error["type"] == "invalid_request_error"
            assert "maximum context length is 4096 tokens" in error["message"]
            ids = json.dumps({"model": "m", "prompt": [7] * 4097}).encode()
            refused = await Reader(origin, ids, b"/v1/completions").end()
            assert refused.status == 400
            assert b"resulted in 4097 tokens" in refused.data
            assert not small.seen + large.seen
            assert service.plane.open_requests == 0
            assert "m" not in [model for model, _ in service.journal.tallies]
            # The engine is the judge of what might fit: 4 bytes make a token of English, but not of every text.
            assert (await Reader(origin, chat(100_000)).end()).status == 200
            many = json.dumps({"model": "m", "prompt": ["x" * 100_000] * 3, "stream": True}).encode()
            assert (await Reader(origin, many, b"/v1/completions").end()).status == 200

    asyncio.run(told())


def test_the_config_overrules_what_an_engine_says_and_estimates_stay_within_it(tmp_path: Path) -> None:
    async def told() -> None:
        engine = Telling(CONTEXT)
        async with before(tmp_path, engine, model="context_tokens = 1000") as (service, origin):
            served = service.models.by_name["m"]
            assert served.context_tokens == 1000
            assert (await Reader(origin, chat(40_000)).end()).status == 400
            assert served.tokens(20_000) == 1000

    asyncio.run(told())


def test_an_engine_that_takes_more_than_it_says_is_believed_no_longer(tmp_path: Path) -> None:
    async def told() -> None:
        engine = Telling(300)
        async with before(tmp_path, engine) as (service, origin):
            served = service.models.by_name["m"]
            await until(lambda: served.context_tokens == 300, "it has told")

            def long(incoming: Incoming) -> None:
                incoming.start(200, SSE)
                incoming.write(chunk("a", usage={"prompt_tokens": 900, "completion_tokens": 1}) + b"data: [DONE]\n\n")
                incoming.finish()

            engine.act = long
            assert (await Reader(origin, chat(3000)).end()).status == 200
            assert served.context_tokens == UNTOLD
            assert (await Reader(origin, chat(30_000)).end()).status == 200

    asyncio.run(told())


@pytest.mark.parametrize(
    ("engine", "said", "context"),
    [
        ("vllm", {"data": [{"id": "m", "max_model_len": 8192}]}, 8192),
        ("sglang", {"data": [{"id": "path/of/it", "max_model_len": 8192}]}, 8192),
        ("openai", {"data": [{"id": "a", "context_length": 1}, {"id": "m", "context_length": 8192}]}, 8192),
        ("openai", {"data": [{"id": "m", "meta": {"n_ctx": 2048, "n_ctx_train": 4096}}]}, 2048),
        ("openai", {"data": [{"id": "a", "max_model_len": 8192}, {"id": "b", "max_model_len": 8192}]}, UNTOLD),
        ("llamacpp", {"default_generation_settings": {"n_ctx": 2048}, "total_slots": 4}, 2048),
        ("tgi", {"max_input_tokens": 1024, "max_total_tokens": 2048}, 2048),
        ("vllm", {"data": [{"id": "m", "max_model_len": 10**20}]}, UNTOLD),
        ("vllm", {"data": [{"id": "m", "max_model_len": 1}]}, UNTOLD),
        ("vllm", {"data": [{"id": "m", "max_model_len": "8192"}]}, UNTOLD),
        ("vllm", {"data": [7, None]}, UNTOLD),
        ("vllm", [], UNTOLD),
        ("llamacpp", {"default_generation_settings": 3}, UNTOLD),
    ],
)
def test_what_engines_say_of_their_context(engine: str, said: Any, context: int) -> None:
    assert read_context(said, ENGINES[engine], "m") == context


def test_one_engine_that_does_not_tell_may_have_any_context() -> None:
    assert longest([2048, 4096]) == 4096
    assert longest([2048, None]) == 2048
    assert longest([2048, UNTOLD]) == UNTOLD
    assert longest([]) == UNTOLD
