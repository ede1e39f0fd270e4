"""llama.cpp behind the gateway: streams, answers in one piece and batch work; what is learned without its totals."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

from chiron.engines.serve.toy import ToySettings, write_toy
from engine_process import Stream, connected
from live_gateway import ask, ready, serving, until

pytestmark = pytest.mark.slow

CONFIG = """
[models.toy]
engine = "llamacpp"
model_path = "{model}"
threads = 1
max_num_seqs = 4
max_instances = 1

[classes.chat]
kind = "interactive"
ttft = "2s"
itl = "100ms"

[classes.batch]
kind = "batch"
deadline = "1h"
"""
CHAT = "/v1/chat/completions"


def test_streams_pieces_and_batch_work_share_it(tmp_path: Path) -> None:
    model = tmp_path / "small.gguf"
    write_toy(model, ToySettings(hidden=768, layers=6))  # Steps long beside what the gateway takes.

    async def body() -> None:
        async with serving(tmp_path, CONFIG.format(model=model)) as service, connected(service.url) as origin:
            instance, engine = await ready(service)
            learner = service.plane.models["toy"].learner
            over = asyncio.Event()
            tokens: list[int] = []
            streams = 0

            async def client(way: str) -> None:
                nonlocal streams
                while not over.is_set():
                    chat: dict[str, Any] = {
                        "model": "toy",
                        "messages": [{"role": "user", "content": "ba be bi"}],
                        "max_tokens": 80,
                    }
                    if way == "stream":
                        stream = await Stream(origin, CHAT, chat | {"ignore_eos": True}).end()
                        assert stream.complete
                        streams += 1
                    else:
                        tier = {"service_tier": "flex"} if way == "flex" else {}
                        answer = await ask(service.url, CHAT, **{**chat, **tier})
                        tokens.append(answer["usage"]["completion_tokens"])

            async def round_of_work() -> None:
                over.clear()
                answered = len(tokens)
                work = [asyncio.create_task(client(way)) for way in ("stream", "stream", "piece", "flex", "flex")]
                await until(lambda: learner.trusted and len(tokens) > answered, "step times are learned")
                most = max(len(engine.runs), instance.running)
                over.set()
                await asyncio.gather(*work)
                assert 1 <= most <= 4

            async def steps_at_rest() -> tuple[int, float]:
                """As seen from here, and the engine's own count of decode calls, which nobody else reads."""
                idle_s = service.clock.now_s
                await until(lambda: instance.sample and instance.sample.taken_s > idle_s + 0.5, "a look at it at rest")
                assert instance.sample is not None
                return instance.sample.steps, engine.metrics["steps"]

            before = (0, 0.0)
            for _ in range(5):
                # Within 4 %, unless the machine stalls between a step and the clock: once is enough. Tokens taken for
                # steps would be twice as many.
                await round_of_work()
                after = await steps_at_rest()
                share = (after[0] - before[0]) / (after[1] - before[1])
                if 0.6 < share < 1.6:
                    break
                before = after
            assert 0.6 < share < 1.6
            assert tokens
            assert all(count == 80 for count in tokens)
            assert not engine.runs
            assert engine.observer.inside == engine.observer.decoding == engine.observer.held_tokens == 0
            assert instance.sample is not None
            assert 0.6 < instance.sample.decode_tokens / (79 * (streams + len(tokens))) < 1.6
            assert learner.mixes["chat"].output_mean < 200.0

    asyncio.run(body())
