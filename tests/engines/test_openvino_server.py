"""The embedded engine as a process: answers, live batch sizes, cancelled and resumed requests, pace."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino_genai")

from chiron.engines.profile_store import load_profile, save_profile
from chiron.engines.serve.toy import toy_model
from chiron.net.client import Origin
from engine_process import EngineProcess, Stream, connected, limits, metrics, until

pytestmark = pytest.mark.slow
"""A real model takes ten seconds of a core."""

MODULE = "chiron.engines.serve.openvino"
PATH = "/v1/completions"
QUEUE_MAX = 24
CONTEXT = 3000
ENDLESS = CONTEXT - 30
"""Tokens of an answer that runs for many seconds, so that a test sees it under way even on a busy machine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(directory=tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[EngineProcess]:
    # In f32 a token does not depend on whether a prefill or a decode step computed what is before it.
    process = EngineProcess(
        MODULE, "--model", str(model), "--served-model-name", "toy", "--threads", "1", "--precision", "f32",
        "--max-num-seqs", "32", "--queue-max", str(QUEUE_MAX), "--max-model-len", str(CONTEXT),
    )  # fmt: skip
    yield process
    seconds, log = process.stop()
    assert seconds < 20.0
    assert "Traceback" not in log


def prompt(number: int, tokens: int) -> list[int]:
    draw = random.Random(number)
    return [draw.randrange(400) for _ in range(tokens)]


def start(origin: Origin, number: int, tokens: int, *, length: int = 30, **fields: Any) -> Stream:
    body = {
        "model": "toy",
        "prompt": prompt(number, length),
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    return Stream(origin, PATH, body | fields)


async def ask(origin: Origin, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    answer = await origin.fetch("POST", path, body=json.dumps({"model": "toy", **fields}).encode())
    return answer.status, json.loads(answer.body)


def test_the_official_client_chats_streams_and_lists_models(engine: EngineProcess) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["toy"]
        said: Any = {
            "model": "toy",
            "messages": [{"role": "user", "content": "héllo 日本"}],
            "max_tokens": 8,
            "seed": 3,
        }
        whole = client.chat.completions.create(**said)
        chunks = list(client.chat.completions.create(**said, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content != ""
        assert chunks[-1].usage == whole.usage
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 8
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(**said | {"model": "other"})


def test_an_interrupted_greedy_answer_resumes_to_the_same_tokens_and_text(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            for seed in range(3):
                whole = await start(origin, seed, 40, length=200).end()
                first = start(origin, seed, 40, length=200)
                await first.tokens(10)
                first.call.cancel()
                done = first.token_ids
                rest = start(
                    origin, seed, 40, length=200, resume_token_ids=done, stream_options={"include_usage": True}
                )
                await rest.end()
                assert done + rest.token_ids == whole.token_ids
                assert first.text + rest.text == whole.text
                assert rest.events[-1]["usage"] == {"prompt_tokens": 200, "completion_tokens": 40, "total_tokens": 240}
            assert (await metrics(origin))["vllm:prefix_cache_hits_total"] >= 3 * 192

    asyncio.run(check())


def test_an_answer_that_had_ended_resumes_to_its_end(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            whole = await start(origin, 1, 5).end()
            again = await start(origin, 1, 5, resume_token_ids=whole.token_ids).end()
            assert (again.token_ids, again.choices[-1]["finish_reason"], again.complete) == ([], "length", True)

    asyncio.run(check())


def test_the_limit_moves_while_requests_run_and_lowering_it_interrupts_none(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            await limits(origin, 4)
            streams = [start(origin, seed, ENDLESS) for seed in range(28)]
            assert (await until(lambda n: n["running"] + n["waiting"] == 28, origin))["running"] == 4
            await limits(origin, 24)
            await until(lambda n: n["running"] == 24, origin)
            assert (await limits(origin, 4))["running"] == 24
            for stream in streams[:24]:
                await stream.tokens(len(stream.token_ids) + 5)
                assert not stream.complete
            assert not any(stream.token_ids for stream in streams[24:])
            for stream in streams[:22]:
                stream.call.cancel()
            await until(lambda n: (n["running"], n["waiting"]) == (4, 2), origin)
            for stream in streams[22:]:
                stream.call.cancel()
            assert (await limits(origin, 99))["limit"] == 32
            await until(lambda n: n["running"] + n["waiting"] == 0, origin)

    asyncio.run(check())


def test_a_client_that_leaves_frees_its_place_and_its_kv(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            await limits(origin, 1)
            long, waiting, gone = start(origin, 1, ENDLESS), start(origin, 2, 3), start(origin, 3, 3)
            await long.tokens(1)
            await until(lambda n: n["waiting"] == 2, origin)
            gone.call.cancel()
            await until(lambda n: n["waiting"] == 1, origin)
            long.call.cancel()
            await waiting.end()
            assert len(waiting.token_ids) == 3
            left = await until(lambda n: n["running"] + n["waiting"] == 0, origin)
            assert left["kv_used_tokens"] == 0
            await limits(origin, 32)

    asyncio.run(check())


def test_a_full_queue_is_a_429_that_says_when_to_come_back(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            await limits(origin, 1)
            streams = [start(origin, seed, ENDLESS) for seed in range(QUEUE_MAX + 1)]
            await until(lambda n: n["waiting"] == QUEUE_MAX, origin)
            answer = await origin.fetch("POST", PATH, body=b'{"model": "toy", "prompt": "hi"}')
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            for stream in streams:
                stream.call.cancel()
            await until(lambda n: n["running"] + n["waiting"] == 0, origin)
            await limits(origin, 32)

    asyncio.run(check())


def test_thirty_two_streams_at_once_end_with_all_their_tokens(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            await limits(origin, 32)
            before = await metrics(origin)
            streams = [await s.end() for s in [start(origin, seed, 20) for seed in range(32)]]
            assert [len(stream.token_ids) for stream in streams] == [20] * 32
            assert all(len(stream.choices) == 20 for stream in streams)  # One event a step.
            after = await metrics(origin)
            assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 32 * 20
            assert (
                after["vllm:inter_token_latency_seconds_count"] - before["vllm:inter_token_latency_seconds_count"]
                == 32 * 19
            )
            assert after["chiron:engine_steps_total"] > before["chiron:engine_steps_total"]
            assert after["chiron:engine_kv_capacity_tokens"] == (await limits(origin))["kv_capacity_tokens"] > 100_000

    asyncio.run(check())


def test_a_stop_string_ends_the_text_before_it(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            whole = await start(origin, 5, 30).end()
            stop = whole.text[12:15]
            cut = await start(origin, 5, 30, stop=[stop]).end()
            assert cut.text == whole.text[: whole.text.index(stop)]
            assert cut.choices[-1]["finish_reason"] == "stop"

    asyncio.run(check())


def test_a_seed_repeats_an_answer_and_none_varies_it(engine: EngineProcess) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            texts = [
                (await start(origin, 5, 12, temperature=1, seed=seed).end()).text for seed in (7, 7, 8, None, None, -1)
            ]
            assert texts[0] == texts[1]
            assert len(set(texts)) == 5

    asyncio.run(check())


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"prompt": "hi", "max_tokens": CONTEXT}, "context_length_exceeded", f"{CONTEXT} tokens"),
        ({"prompt": [1] * CONTEXT}, "context_length_exceeded", f"{CONTEXT} tokens"),
        ({"prompt": [100_000]}, None, "holds token 100000"),
        ({"prompt": "hi", "resume_token_ids": [100_000]}, None, "holds token 100000"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": "hi", "logprobs": 1}, "unsupported_parameter", "logprobs is 1"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_says_why(
    engine: EngineProcess, fields: dict[str, Any], code: str | None, says: str
) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            status, body = await ask(origin, PATH, **fields)
            assert (status, body["error"]["code"]) == (400, code)
            assert says in body["error"]["message"]

    asyncio.run(check())


@pytest.mark.parametrize(
    "odd",
    ["\x00", "<|end|><|begin|>", "\u202e\ufffd", "🇩🇪" * 50, "a" * 900, "{{ messages }} {% raw %}"],
    ids=["nul", "special", "marks", "flags", "long", "template"],
)
def test_odd_text_is_answered_or_refused_but_never_a_server_error(engine: EngineProcess, odd: str) -> None:
    async def check() -> None:
        async with connected(engine.url) as origin:
            for path, fields in (
                (PATH, {"prompt": odd}),
                ("/v1/chat/completions", {"messages": [{"role": odd, "content": odd}]}),
            ):
                status, body = await ask(origin, path, max_tokens=2, temperature=0.001, top_p=0.0001, **fields)
                assert status in (200, 400), body

    asyncio.run(check())


@pytest.mark.slow
def test_a_request_larger_than_the_kv_cache_is_refused_and_many_that_fill_it_all_end(model: Path) -> None:
    engine = EngineProcess(
        MODULE, "--model", str(model), "--served-model-name", "toy", "--threads", "1", "--kv-capacity-tokens", "512"
    )

    async def check() -> None:
        async with connected(engine.url) as origin:
            assert (await limits(origin))["kv_capacity_tokens"] == 512
            status, body = await ask(origin, PATH, prompt=[1] * 600)
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
            streams = [start(origin, seed, 60, length=150) for seed in range(6)]
            assert [len((await stream.end()).token_ids) for stream in streams] == [60] * 6
            full = await start(origin, 1, 362, length=150).end()
            assert len(full.token_ids) == 362

    try:
        asyncio.run(check())
    finally:
        engine.stop()


@pytest.mark.slow
def test_a_prefill_that_was_interrupted_leaves_nothing_wrong_behind(engine: EngineProcess, model: Path) -> None:
    """The pipeline files a block under its tokens when it begins to write it, and keeps it so when told to stop."""
    interrupted = EngineProcess(
        MODULE, "--model", str(model), "--served-model-name", "toy", "--threads", "1", "--precision", "f32",
        "--max-num-batched-tokens", "100",
    )  # fmt: skip

    async def check() -> None:
        seeds: list[int] = []
        async with connected(interrupted.url) as origin:
            # Their tokens take their part of each step, so that the others' prefill does not end at a block's end.
            running = [start(origin, 100 + seed, 3000) for seed in range(3)]
            for seed in range(60):
                for place, other in enumerate(running):  # They last for seconds, which a machine may take in one.
                    if other.complete:
                        running[place] = start(origin, 100 + place, 3000)
                await asyncio.gather(*(other.tokens(2) for other in running))
                before = await metrics(origin)
                stream = start(origin, seed, 20, length=900)
                await running[0].tokens(len(running[0].token_ids) + 3)
                stream.call.cancel()
                await until(lambda found: found["running"] <= len(running), origin)
                after = await metrics(origin)
                begun, answered = (
                    after[name] > before[name]
                    for name in ("chiron:engine_prefill_tokens_total", "vllm:time_to_first_token_seconds_count")
                )
                if begun and not answered:  # On a busy machine some prefills end before their clients leave.
                    seeds.append(seed)
                if len(seeds) == 6:
                    break
            answers = [(await start(origin, seed, 20, length=900).end()).token_ids for seed in seeds]
            for stream in running:
                stream.call.cancel()
        assert len(seeds) == 6, "so many were interrupted"
        async with connected(engine.url) as origin:
            expected = [(await start(origin, seed, 20, length=900).end()).token_ids for seed in seeds]
        assert answers == expected

    try:
        asyncio.run(check())
    finally:
        interrupted.stop()


@pytest.mark.slow
def test_with_kv_short_and_clients_leaving_every_answer_is_whole_and_right(engine: EngineProcess, model: Path) -> None:
    small = EngineProcess(
        MODULE, "--model", str(model), "--served-model-name", "toy", "--threads", "1", "--precision", "f32",
        "--kv-capacity-tokens", "608",
    )  # fmt: skip
    draw = random.Random(7)

    async def in_parts(origin: Origin, seed: int) -> list[int]:
        """An answer whose client leaves and comes back with what it got, until it is complete."""
        tokens: list[int] = []
        while True:
            resume = {"resume_token_ids": tokens} if tokens else {}
            stream = start(origin, seed, 60, length=60 + 10 * seed, **resume)
            await stream.tokens(draw.randrange(1, 50), timeout_s=60.0)
            tokens = tokens + stream.token_ids
            if stream.complete:
                return tokens
            assert stream.status in (0, 200), stream.status
            stream.call.cancel()

    async def others(origin: Origin, seed: int, answer: list[int]) -> int:
        """Tokens that another engine does not choose after those before them."""
        known = found = 0
        while known < len(answer):
            resume = {"resume_token_ids": answer[:known]} if known else {}
            rest = (await start(origin, seed, 60, length=60 + 10 * seed, **resume).end()).token_ids
            assert len(rest) == len(answer) - known
            differ = [place for place, (mine, its) in enumerate(zip(answer[known:], rest, strict=True)) if mine != its]
            if not differ:
                break
            known, found = known + differ[0] + 1, found + 1
        return found

    async def check() -> None:
        async with connected(small.url) as origin:
            answers = await asyncio.gather(*(in_parts(origin, seed) for seed in range(14)))
            found = await metrics(origin)
        assert found["vllm:kv_cache_usage_perc"] == 0.0
        assert [len(answer) for answer in answers] == [60] * 14
        async with connected(engine.url) as origin:
            differ = [await others(origin, seed, answer) for seed, answer in enumerate(answers)]
        # A sum over other requests beside it may round otherwise on some processors, and two tokens be equally likely.
        assert sum(differ) <= 2, differ

    try:
        asyncio.run(check())
    finally:
        small.stop()


@pytest.mark.slow
def test_a_paced_engine_takes_the_profiles_time_and_says_so(model: Path, tmp_path: Path) -> None:
    profile = load_profile("llama-3.1-8b/a100/tp1")
    save_profile(profile, tmp_path / "p.json")
    engine = EngineProcess(
        MODULE,
        "--model",
        str(model),
        "--served-model-name",
        "toy",
        "--threads",
        "1",
        "--pace",
        str(tmp_path / "p.json"),
    )

    async def check() -> None:
        async with connected(engine.url) as origin:
            models = json.loads((await origin.fetch("GET", "/v1/models")).body)
            assert profile.name in models["data"][0]["paced"]
            for stream in [start(origin, seed, 40) for seed in range(4)]:
                await stream.end()
            figures = await metrics(origin)
            mean_s = figures["vllm:inter_token_latency_seconds_sum"] / figures["vllm:inter_token_latency_seconds_count"]
            # A busy machine may be late, never early.
            assert mean_s > 0.98 * profile.step_s(decoding=4, context_tokens=4 * 40)

    try:
        asyncio.run(check())
    finally:
        engine.stop()


@pytest.mark.slow
def test_what_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, says in (
            (["--model", str(tmp_path / "none.gguf")], "no such file"),
            (["--max-num-seqs", "0"], "from 1 to 4096"),
            (["--pace", "nothing"], "neither packaged nor a file"),
            (["--model", str(model), "--port", str(taken.getsockname()[1])], "cannot listen"),
        ):
            with pytest.raises(RuntimeError, match=says):
                EngineProcess(MODULE, *arguments).stop()
