"""Step times learned over real sockets, from an engine that tells all and from one that tells nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.engines.model import StepTimes
from chiron.engines.profile_store import load_profile
from engine_process import EngineProcess, Stream, connected
from live_gateway import ready, serving, until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PROFILE = "llama-3.1-70b/a100/tp4"
CONFIG = """
[models.toy]
engine = "{row}"
endpoints = ["{url}"]
max_num_seqs = 64
"""


@pytest.mark.parametrize("row", ["emulated", "openai"])
def test_learned_step_times_are_those_of_the_profile(tmp_path: Path, row: str) -> None:
    engine = EngineProcess("chiron.engines.serve.emulated", "--profile", PROFILE, "--served-model-name", "toy")
    truth = StepTimes(load_profile(PROFILE))

    async def body() -> None:
        async with serving(tmp_path, CONFIG.format(row=row, url=engine.url)) as service:
            _, upstream = await ready(service)
            assert bool(upstream.row.metrics_path) == (row == "emulated")
            learner = service.plane.models["toy"].learner
            over = False

            async def client(number: int, origin: object) -> None:
                while not over:
                    body = {"model": "toy", "prompt": "word " * 50, "max_tokens": 20 + number}
                    await Stream(origin, "/v1/completions", body).end()  # type: ignore[arg-type]

            async with connected(service.url) as origin:
                # The batch grows, so that what a sequence adds can be told from what a step costs.
                clients = []
                for size in (2, 10, 24):
                    clients += [asyncio.create_task(client(n, origin)) for n in range(size)]
                    seen = learner.updates
                    await until(lambda seen=seen: learner.updates >= seen + 6, "more is learned", 30.0)  # type: ignore[misc]
                assert learner.trusted
                over = True
                await asyncio.gather(*clients)
            times = learner.step_times
            for batch, context in ((2, 60), (16, 60), (36, 60)):
                learned = times.fixed_s + batch * (times.per_sequence_s + times.per_context_token_s * context)
                assert learned == pytest.approx(truth.base[batch] + truth.c * batch * context, rel=0.2), batch

    try:
        asyncio.run(body())
    finally:
        engine.stop()
