"""A gateway whose instance is a pipeline of processes: under load its bottleneck gets a replica, and loses it after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from staged_models import need_torch, tiny

need_torch()

from chiron.net.client import NetError  # noqa: E402
from fault_site import Answer, Api, FaultSite, chat, config  # noqa: E402
from serve_trial import events, until, verdicts  # noqa: E402

SLOW = 'pace = "100ms", pace_per_sequence = "50ms"'
WAIT_S = 240.0

SETTINGS = {
    "stage-hpa": 'target = 0.4, sync = "2s", rate_period = "2s", stale = "20s", stabilise_down = "3s"',
    "stage-balance": 'tick = "1s", rate_window = "5s", look_back = "1s", hold = "2s"',
}
"""Quick, and such that a busy machine does not hide which stage is slow."""


def text(policy: str) -> str:
    model = "\n".join(
        [
            'engine = "staged"',
            f"model_path = {json.dumps(str(tiny()))}",
            f'stages = [{{ layers = "0-0" }}, {{ layers = "1-3", max = 2, {SLOW} }}]',
            "max_instances = 1",
            'start_timeout = "10m"',
        ]
    )
    return config(
        model,
        extra=f"""
[classes.chat]
kind = "interactive"
ttft = "60s"
itl = "10s"

[policies.chiron]
stages = {{ policy = "{policy}", {SETTINGS[policy]} }}
""",
    )


async def stages_until(api: Api, met: Callable[[list[Any]], bool]) -> None:
    """Asked of the instance itself."""
    async with asyncio.timeout(WAIT_S):
        (instance,) = (await api.get("/chiron/status"))["models"][0]["instances"]
        async with Api(instance["url"]) as pipeline:
            while True:
                try:
                    if met((await pipeline.get("/chiron/stages"))["stages"]):
                        return
                except NetError:
                    pass
                await asyncio.sleep(0.1)


async def load(api: Api, answers: list[Answer]) -> None:
    """Twelve requests at once, without end."""
    while True:
        if sum(not answer.over.is_set() for answer in answers) < 12:
            answers.append(Answer(api.origin, chat(f"question {len(answers)}", tokens=10, stream=True)))
        await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("policy", SETTINGS)
def test_the_bottleneck_gets_a_second_replica_under_load_and_loses_it_after(tmp_path: Path, policy: str) -> None:
    async def story(site: FaultSite) -> dict[str, int]:
        async with Api(site.url) as api:
            await until(_ready, api, "ready", WAIT_S)
            answers: list[Answer] = []
            loading = asyncio.ensure_future(load(api, answers))
            try:
                await stages_until(api, lambda stages: stages[1]["ready"] == 2)
                await stages_until(api, lambda stages: all(each["calls"] for each in stages[1]["replicas"]))
            finally:
                loading.cancel()
            found = await verdicts(answers, WAIT_S)
            await stages_until(api, lambda stages: [(s["ready"], s["draining"]) for s in stages] == [(1, 0)] * 2)
            return found

    with FaultSite(tmp_path, text(policy)) as site:
        assert set(asyncio.run(story(site))) == {"complete"}
    decided = [line for line in events(site) if line.get("kind") == "stage"]
    steps = [(line["before"], line["after"]) for line in decided]
    assert steps == [(1, 2), (2, 1)] * max(1, len(steps) // 2), "more than once only where the machine stalled"
    assert {line["subject"] for line in decided} == {"m#1/1-3"}
    assert all(line["reason"] for line in decided)


def _ready(status: dict[str, Any]) -> bool:
    return any(each["state"] == "ready" for each in status["models"][0]["instances"])
