"""A pipeline of processes whose stages are killed, stopped and scaled while it answers: the tokens are the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from reference import generated
from staged_models import need_torch, prompts, tiny

need_torch()

from stage_nursery import StageNursery  # noqa: E402
from staged_live import LAYERS, NAMES, Head, Stages, killed, stopped  # noqa: E402
from staged_processes import StageProcess, pid_at  # noqa: E402

TOKENS = 24
ROUNDS = 20


@pytest.mark.slow
@pytest.mark.parametrize("fault", [killed, stopped])
def test_a_stage_is_killed_or_stopped_in_mid_stream(fault: Any) -> None:
    given = prompts(4, seed=7)
    expected = [generated(tiny(), prompt, TOKENS) for prompt in given]

    async def main(head: Head, stages: Stages) -> None:
        for round_ in range(ROUNDS):
            stage = round_ % len(LAYERS)
            before = await head.until(lambda said: all(s["ready"] == 2 for s in said))
            asking = asyncio.ensure_future(asyncio.gather(*(head.ask(prompt) for prompt in given)))
            enough = before[stage]["passes"] + 6
            said = await head.until(lambda said, s=stage, n=enough: said[s]["passes"] >= n)  # type: ignore[misc]
            await fault(head, stages, stage, stages.busiest(stage, said))
            assert await asking == expected, f"round {round_}"
        found = await head.stages()
        assert found["losses"] >= ROUNDS
        assert found["replayed_tokens"] > ROUNDS

    with StageNursery() as nursery:
        stages = Stages(nursery, tiny(), "--pace-ms", "5")
        arguments = ["head", str(tiny()), *stages.arguments(), *NAMES, "--silent", "1.5"]
        with StageProcess(arguments) as process:
            asyncio.run(main(Head(process.port), stages))


@pytest.mark.slow
def test_replicas_come_and_go_in_mid_stream_and_what_died_is_replaced() -> None:
    given = prompts(8, seed=8)
    expected = [generated(tiny(), prompt, TOKENS) for prompt in given]
    specs = [{"layers": "0-1", "max": 2}, {"layers": "2-3", "max": 2, "pace_ms": 4}]

    async def main(head: Head) -> None:
        for counts in ([1, 2], [2, 1], [1, 2]):
            asking = asyncio.ensure_future(asyncio.gather(*(head.ask(prompt) for prompt in given * 2)))
            await head.stages({"counts": counts})
            assert await asking == expected * 2
            await head.until(lambda said, c=counts: [(s["ready"], s["draining"]) for s in said] == [(n, 0) for n in c])  # type: ignore[misc]
        found = await head.stages()
        assert found["losses"] == 0
        lost = found["stages"][1]["replicas"][0]["address"]
        asking = asyncio.ensure_future(asyncio.gather(*(head.ask(prompt) for prompt in given)))
        os.kill(pid_at(lost), signal.SIGKILL)
        assert await asking == expected
        said = await head.until(lambda said: said[1]["ready"] == 2 and len(said[1]["replicas"]) == 2)
        assert lost not in [each["address"] for each in said[1]["replicas"]]

    arguments = ["run", str(tiny()), "--stages", json.dumps(specs), *NAMES, "--drain", "0.1", "--silent", "60"]
    with StageProcess(arguments) as process:
        asyncio.run(main(Head(process.port)))
