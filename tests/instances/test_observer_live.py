"""Step times learned over real sockets, from an engine that tells all and from one that tells nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.engines.model import StepTable
from chiron.engines.profile_store import load_profile
from engine_process import EngineProcess, Stream, connected
from live_gateway import ready, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PROFILE = "llama-3.1-70b/a100/tp4"
CLIENTS = (2, 12, 36)
BATCHES = (2, 16, 36)
CONTEXT = 60
CONFIG = """
[models.toy]
engine = "{row}"
endpoints = ["{url}"]
max_num_seqs = 64
"""


@pytest.mark.parametrize("row", ["emulated", "openai"])
def test_learned_step_times_are_those_of_the_profile(tmp_path: Path, row: str) -> None:
    engine = EngineProcess("chiron.engines.serve.emulated", "--profile", PROFILE, "--served-model-name", "toy")
    truth = StepTable(load_profile(PROFILE))
    steps_s = pytest.approx([truth.base[batch] + truth.c * batch * CONTEXT for batch in BATCHES], rel=0.2)

    async def body() -> None:
        async with serving(tmp_path, CONFIG.format(row=row, url=engine.url)) as service:
            _, upstream = await ready(service)
            assert bool(upstream.row.metrics_path) == (row == "emulated")
            learner = service.plane.models["toy"].learner
            clients, over = 0, False

            async def client(number: int, origin: object) -> None:
                while not over:
                    if number >= clients:
                        await asyncio.sleep(0.02)
                        continue
                    body = {"model": "toy", "prompt": "word " * 50, "max_tokens": 20 + number}
                    await Stream(origin, "/v1/completions", body).end()  # type: ignore[arg-type]

            def learned() -> list[float]:
                times = learner.step_times
                sequence_s = times.per_sequence_s + times.per_context_token_s * CONTEXT
                return [times.fixed_s + batch * sequence_s for batch in BATCHES]

            async with connected(service.url) as origin:
                work = [asyncio.create_task(client(n, origin)) for n in range(max(CLIENTS))]
                for _ in range(5):  # Once is enough, but for a machine that stalls now and then.
                    # The batch grows, so that what a sequence adds can be told from what a step costs.
                    for size in CLIENTS:
                        clients = size
                        seen = learner.updates
                        await until(lambda seen=seen: learner.updates >= seen + 6, "more is learned", 60.0)  # type: ignore[misc]
                    assert learner.trusted
                    if learned() == steps_s:
                        break
                over = True
                await asyncio.gather(*work)
            assert learned() == steps_s

    try:
        asyncio.run(body())
    finally:
        engine.stop()
