"""Whatever an engine says, the gateway stays whole: what cannot be is as if it had not been said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf, isfinite
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.core.types import Instance, InstanceKind
from chiron.engines import claims
from chiron.engines.metrics import read_row
from chiron.engines.rows import ENGINES
from chiron.engines.serve.faulty import FIGURES, NUMBERS, FaultyEngine
from chiron.gateway.instances.observer import EngineObserver
from chiron.gateway.relay.collect import CollectError, Collector
from chiron.gateway.service import Service
from chiron.net.client import NetError, Origin, TimedOutError
from chiron.net.server import Incoming, serve
from live_gateway import serving, until
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk

CHAT = "/v1/chat/completions"


def says(usage: object, *, stream: bool) -> Any:
    """One token, and then this usage."""

    def act(incoming: Incoming) -> None:
        if stream:
            incoming.start(200, SSE)
            end = chunk("", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            incoming.write(chunk("one") + end + chunk("", choices=[], usage=usage) + b"data: [DONE]\n\n")
            incoming.finish()
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": "one"}, "finish_reason": "stop"}
        incoming.respond(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    return act


def page_of(service: Service) -> dict[str, Any]:
    """The status page and the metrics, both of which must work."""
    assert b"chiron_generation_tokens_total" in service._render_metrics()
    found: dict[str, Any] = json.loads(json.dumps(service.status(), allow_nan=False))
    return found


ABSURD = (10**19, 10**20, 10**12, 2**63, 10**9)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", ABSURD)
def test_an_absurd_count_of_tokens_harms_nothing(tmp_path: Path, tokens: int, stream: bool) -> None:
    async def main() -> None:
        usage = {"prompt_tokens": tokens, "completion_tokens": tokens, "total_tokens": 2 * tokens}
        async with before(tmp_path, ScriptedEngine(says(usage, stream=stream))) as (service, origin):
            for fields in ({"max_tokens": 5}, {}, {"service_tier": "flex"}):
                if fields.get("service_tier") and not stream:
                    continue
                reader = await Reader(origin, body(stream=stream, **fields)).end()
                assert (reader.status, reader.over) == (200, "end")
            await until(lambda: service.plane.open_requests == 0, "they are over")
            classes = page_of(service)["models"][0]["classes"]
            made, asked = (sum(c[name] for c in classes) for name in ("generation_tokens", "prompt_tokens"))
            assert made < 300, "a token or two each, and an estimate by bytes where nothing else can be seen"
            assert asked < 300
            assert service.result().summary is not None

    asyncio.run(main())


def test_a_client_pays_for_what_can_be_seen(tmp_path: Path) -> None:
    """The engine says 50,000 tokens in a stream of one, at once."""

    async def main() -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 50_000, "total_tokens": 50_003}
        engine = ScriptedEngine(says(usage, stream=True))
        async with before(tmp_path, engine) as (service, origin):
            await Reader(origin, body(stream=True, max_tokens=60_000)).end()
            await until(lambda: service.plane.open_requests == 0, "it is over")
            (cls,) = page_of(service)["models"][0]["classes"]
            assert (cls["generation_tokens"], cls["prompt_tokens"]) == (1, 3)

    asyncio.run(main())


@asynccontextmanager
async def faulty(directory: Path, seed: int, *, valid_share: float = 0.5) -> AsyncIterator[tuple[Service, Origin]]:
    engine = FaultyEngine(seed, valid_share=valid_share)
    server = await serve(engine.handle)
    text = f'[models.m]\nengine = "vllm"\nendpoints = ["http://127.0.0.1:{server.port}"]\nmax_num_seqs = 4\n'
    try:
        async with serving(directory, text) as service:
            await until(lambda: service.engines.live, "it is ready")
            origin = Origin(service.url)
            yield service, origin
            await origin.close()
    finally:
        await server.close(0.0)


async def try_all(origin: Origin, turns: int) -> list[int]:
    """Requests of every kind; the statuses that came, 0 for a connection that was cut."""
    statuses = []
    kinds: list[dict[str, Any]] = [{}, {"stream": True}, {"service_tier": "flex"}]
    kinds.append({"stream": True, "service_tier": "flex", "max_tokens": 3})
    for turn in range(turns):
        fields = kinds[turn % len(kinds)]
        try:
            answer = await origin.fetch("POST", CHAT, body=body(**fields), timeout_s=60.0)
        except TimedOutError:
            pytest.fail("nobody waits for ever")
        except NetError:
            statuses.append(0)
        else:
            assert b"internal_error" not in answer.body, "a 500 may be the engine's own, not the gateway's"
            statuses.append(answer.status)
    return statuses


@pytest.mark.parametrize("seed", [1, 2])
def test_an_engine_that_lies_about_everything_leaves_the_gateway_whole(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with faulty(tmp_path, seed) as (service, origin):
            statuses = await try_all(origin, 32)
            assert 200 in statuses
            assert all(status < 600 for status in statuses), statuses
            await until(lambda: service.plane.open_requests == 0, "they are over")
            page = page_of(service)
            for instance in page["models"][0]["instances"]:
                assert 0.0 <= instance["kv_usage"] <= 1.0
            assert all(c["generation_tokens"] < 10_000 for c in page["models"][0]["classes"])
            rest = json.loads((await origin.fetch("GET", "/chiron/status")).body)
            assert rest["models"][0]["name"] == "m"

    asyncio.run(main())
    assert not [record for record in caplog.records if record.exc_info], caplog.text


INSTANCE_KIND = InstanceKind(
    name="k", gpu="g", gpus=1, price_per_gpu_hour=0.0, kv_capacity_tokens=100_000, max_num_seqs=64
)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_samples_stay_finite_and_never_go_back(seed: int, looks: int) -> None:
    engine, observer = FaultyEngine(seed), EngineObserver(Instance(1, "m", INSTANCE_KIND, "mixed", 0.0), 0.0)
    last = None
    for look in range(1, looks + 1):
        for row in ENGINES.values():
            said = read_row(row, engine.metrics())
            assert all(isfinite(value) and value >= 0.0 for value in said.values())
            sample = observer.sample(float(look), said)
            values = [getattr(sample, name) for name in sample.__slots__]
            assert all(isfinite(value) and value >= 0 for value in values)
            if last is not None:
                for name in ("steps", "busy_s", "decode_tokens", "prefill_tokens", "context_tokens"):
                    assert getattr(sample, name) >= getattr(last, name), name
            last = sample


TOLD = {"steps": 100.0, "busy_s": 2.0, "decode_tokens": 500.0, "prefill_tokens": 1000.0, "context_tokens": 1e5}


@pytest.mark.parametrize(
    "jump",
    [
        *({name: -1.0} for name in TOLD),
        {"steps": 1e12},
        {"busy_s": 3600.0},
        {"decode_tokens": 1e15},
        {"context_tokens": 1e18},
        {"steps": 0.0, "decode_tokens": 5.0},
    ],
)
def test_totals_that_cannot_have_grown_so_do_not_count(jump: dict[str, float]) -> None:
    observer = EngineObserver(Instance(1, "m", INSTANCE_KIND, "mixed", 0.0), 0.0)
    observer.sample(1.0, TOLD)
    before = observer.sample(2.0, {name: 2 * value for name, value in TOLD.items()})
    broken = {name: 2 * value + jump.get(name, 0.0) for name, value in TOLD.items()}
    after = observer.sample(3.0, broken)
    assert [getattr(after, name) for name in TOLD] == [getattr(before, name) for name in TOLD]


@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 40))
def test_a_collected_stream_is_an_answer_or_an_error(seed: int, chat: bool, events: int) -> None:
    engine, collector = FaultyEngine(seed), Collector(chat)
    try:
        for _ in range(events):
            collector.feed(engine.event(chat=chat))
            assert 0 <= collector.tokens < 1000
        assert all(type(id) is int and 0 <= id <= claims.TOKEN_ID_MAX for id in collector.token_ids)
        answer = collector.result()
    except CollectError:
        return
    assert all(0 <= choice["index"] < claims.CHOICES_MAX for choice in answer["choices"])
    usage = answer.get("usage")
    assert usage is None or claims.usage(usage) == usage


@given(
    st.sampled_from([n for n in NUMBERS if type(n) is int]) | st.integers(-5, 2000),
    st.integers(0, 500),
    st.integers(0, 10_000),
    st.floats(0.0, 10.0),
    st.none() | st.integers(0, 3000),
    st.booleans(),
)
def test_counts_of_tokens_are_within_all_that_is_known(
    said: int, seen: int, answer_bytes: int, took_s: float, most: int | None, streams: bool
) -> None:
    _, claimed = claims.usage_in(b'{"usage": {"completion_tokens": %d}}' % said)
    tokens = claims.output_tokens(
        claimed, seen=seen, before=0, answer_bytes=answer_bytes, took_s=took_s, most=most, streams=streams
    )
    limit = inf if most is None else most
    assert tokens in (said, seen) or (not streams and tokens <= min(limit, answer_bytes))
    if tokens != seen:
        assert 0 <= tokens <= min(limit, max(answer_bytes, took_s * claims.TOKENS_PER_S_MAX) + 1)
    if 0 < said <= min(limit, answer_bytes) and said >= seen:
        assert tokens == said, "an engine that counts right is believed"


@pytest.mark.parametrize("before", [b"", b"x", b'"', b'"completion', b'_tokens"', b'"total_tokens": 9, ', b'"' * 40])
@pytest.mark.parametrize(
    ("said", "found"),
    [
        (b"", (None, None)),
        (b'"prompt_tokens": 7', (7, None)),
        (b'"completion_tokens":8', (None, 8)),
        (b'"prompt_tokens" : 7, "completion_tokens": 8', (7, 8)),
        (b'"prompt_tokens": 1, "completion_tokens": 8, "prompt_tokens": 2', (2, 8)),
        (b'"prompt_tokens": 7.5, "completion_tokens": 12345678901', (None, None)),
        (b'"prompt_tokens": 999999999', (None, None)),
    ],
)
def test_usage_is_found_wherever_it_begins(before: bytes, said: bytes, found: tuple[int | None, int | None]) -> None:
    assert claims.usage_in(before + said) == found


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 9}, 9),
        ({"max_tokens": 5, "n": 3}, 15),
        ({"max_tokens": 5, "n": 2, "best_of": 4}, 20),
        ({"max_tokens": 5, "prompt": ["a", "b"], "n": 2}, 20),
        ({"max_tokens": 5, "prompt": [1, 2, 3]}, 5),
        ({"max_tokens": True}, None),
        ({"max_tokens": 10**30}, None),
        ({"max_tokens": 5, "n": 10**30}, 5),
        ({"max_tokens": "5", "n": None, "prompt": []}, None),
    ],
)
def test_what_a_request_allows(fields: dict[str, Any], most: int | None) -> None:
    assert claims.output_tokens_max(fields) == most


@given(
    st.lists(
        st.tuples(st.sampled_from(["kv_usage", "running", "steps", "kv_capacity_tokens"]), st.sampled_from(FIGURES))
    )
)
def test_figures_are_finite_and_in_range(said: list[tuple[str, str]]) -> None:
    numbers = {}
    for name, text in said:
        try:
            numbers[name] = float(text)
        except ValueError:
            continue
    found = claims.figures(numbers)
    assert all(isfinite(value) and 0.0 <= value <= claims.TOTAL_MAX for value in found.values())
    assert found.get("kv_usage", 0.0) <= 1.0


def test_what_waits_and_fits_no_engine_is_told_when_that_is_known(tmp_path: Path) -> None:
    """An engine says only later how little KV it has: the gateway had guessed more."""

    async def main() -> None:
        said, running = [b""], []

        def handle(incoming: Incoming) -> None:
            if incoming.method == b"POST":
                running.append(incoming)
            else:
                incoming.respond(200, said[0], b"text/plain")

        server = await serve(handle)
        text = f'[models.m]\nengine = "vllm"\nendpoints = ["http://127.0.0.1:{server.port}"]\nmax_num_seqs = 1\n'
        async with serving(tmp_path, text) as service:
            await until(lambda: service.engines.live, "it is ready")
            origin = Origin(service.url)
            first = Reader(origin, body())
            await until(lambda: running, "the only place is taken")
            long = [{"role": "user", "content": "x" * 40_000}]
            waiting = [Reader(origin, body(messages=long, **fields)) for fields in ({}, {"service_tier": "flex"})]
            short = Reader(origin, body())
            await until(lambda: len(service.desk.open) == 4, "three wait")
            said[0] = b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1\n'
            for reader in waiting:
                await reader.end()
                assert (reader.status, json.loads(reader.data)["error"]["code"]) == (400, "context_length_exceeded")
            assert not short.over
            running[0].respond(200, b"{}")
            await until(lambda: len(running) == 2, "what fits goes on")
            running[1].respond(200, b"{}")
            for reader in (first, short):
                assert (await reader.end()).status == 200
            await origin.close()
        await server.close(0.0)

    asyncio.run(main())
