"""A pipeline of processes whose stages are killed, stopped and scaled while it answers: the tokens are the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from reference import generated
from staged_models import need_torch, prompts, tiny

need_torch()

from stage_nursery import Forked, StageNursery  # noqa: E402
from staged_processes import StageProcess, pid_at  # noqa: E402
from staged_site import request  # noqa: E402

TOKENS = 24
ROUNDS = 20
LAYERS = ("0-0", "1-2", "3-3")
NAMES = ("--served-model-name", "tiny")


class Head:
    def __init__(self, port: int) -> None:
        self.port = port

    async def stages(self, told: dict[str, Any] | None = None) -> dict[str, Any]:
        status, said = await request(self.port, "/chiron/stages", told, "PUT" if told else "GET")
        assert status == 200, said
        found: dict[str, Any] = json.loads(said)
        return found

    async def until(self, met: Callable[[list[Any]], bool]) -> list[Any]:
        async with asyncio.timeout(120.0):
            while not met(stages := (await self.stages())["stages"]):
                await asyncio.sleep(0.01)
        return stages

    async def ask(self, prompt: list[int]) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        status, said = await request(self.port, "/v1/completions", body)
        assert status == 200, said
        found: list[int] = json.loads(said)["choices"][0]["token_ids"]
        return found


class Stages:
    """Two replicas of each, told to the head."""

    def __init__(self, nursery: StageNursery) -> None:
        self._nursery = nursery
        self.replicas = [[self.start(stage) for _ in range(2)] for stage in range(len(LAYERS))]

    def start(self, stage: int) -> Forked:
        return self._nursery.start("--model", str(tiny()), "--layers", LAYERS[stage], "--pace-ms", "5")

    @property
    def addresses(self) -> list[list[str]]:
        return [[each.address for each in replicas] for replicas in self.replicas]

    def arguments(self) -> list[str]:
        told = zip(LAYERS, self.addresses, strict=True)
        return [word for layers, addresses in told for word in ("--stage", f"{layers}={','.join(addresses)}")]

    def busiest(self, stage: int, said: list[Any]) -> Forked:
        loads = {each["address"]: each["sequences"] for each in said[stage]["replicas"]}
        return max(self.replicas[stage], key=lambda each: loads[each.address])


async def killed(head: Head, stages: Stages, stage: int, victim: Forked) -> None:
    """Another one in its place."""
    os.kill(victim.pid, signal.SIGKILL)
    stages.replicas[stage].remove(victim)
    stages.replicas[stage].append(await asyncio.to_thread(stages.start, stage))
    await head.stages({"replicas": stages.addresses})


async def stopped(head: Head, stages: Stages, stage: int, victim: Forked) -> None:
    """Until the head has noticed."""
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        await head.until(lambda said: _state(said[stage], victim) == "down")
    finally:
        os.kill(victim.pid, signal.SIGCONT)


def _state(stage: dict[str, Any], replica: Forked) -> str:
    (found,) = [str(each["state"]) for each in stage["replicas"] if each["address"] == replica.address]
    return found


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
        stages = Stages(nursery)
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
