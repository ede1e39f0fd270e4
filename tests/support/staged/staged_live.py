"""A pipeline of processes, and what befalls it: replicas killed, stopped, added and taken out."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stage_nursery import Forked, StageNursery
from staged_site import request

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
                await asyncio.sleep(0.02)
        return stages

    async def ask(self, prompt: list[int], tokens: int = 24) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        status, said = await request(self.port, "/v1/completions", body)
        assert status == 200, said
        found: list[int] = json.loads(said)["choices"][0]["token_ids"]
        return found


class Stages:
    """Two replicas of each, told to the head."""

    def __init__(self, nursery: StageNursery, model: Path, *options: str) -> None:
        self._nursery = nursery
        self._options = ("--model", str(model), *options)
        self.replicas = [[self.start(stage) for _ in range(2)] for stage in range(len(LAYERS))]

    def start(self, stage: int) -> Forked:
        return self._nursery.start(*self._options, "--layers", LAYERS[stage])

    @property
    def addresses(self) -> list[list[str]]:
        return [[each.address for each in replicas] for replicas in self.replicas]

    def arguments(self) -> list[str]:
        told = zip(LAYERS, self.addresses, strict=True)
        return [word for layers, addresses in told for word in ("--stage", f"{layers}={','.join(addresses)}")]

    def busiest(self, stage: int, said: Sequence[Any]) -> Forked:
        loads = {each["address"]: each["sequences"] for each in said[stage]["replicas"]}
        return max(self.replicas[stage], key=lambda each: loads[each.address])


async def killed(head: Head, stages: Stages, stage: int, victim: Forked) -> None:
    """Another one in its place."""
    os.kill(victim.pid, signal.SIGKILL)
    stages.replicas[stage].remove(victim)
    await added(head, stages, stage, victim)


async def stopped(head: Head, stages: Stages, stage: int, victim: Forked) -> None:
    """Until the head has noticed."""
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        await head.until(lambda said: _state(said[stage], victim) == "down")
    finally:
        os.kill(victim.pid, signal.SIGCONT)


async def added(head: Head, stages: Stages, stage: int, victim: Forked) -> None:
    """One more, which running sequences do not go through."""
    stages.replicas[stage].append(await asyncio.to_thread(stages.start, stage))
    await head.stages({"replicas": stages.addresses})


async def removed(head: Head, stages: Stages, stage: int, victim: Forked) -> None:
    """The one that has most sequences."""
    stages.replicas[stage].remove(victim)
    await head.stages({"replicas": stages.addresses})


def _state(stage: dict[str, Any], replica: Forked) -> str:
    (found,) = [str(each["state"]) for each in stage["replicas"] if each["address"] == replica.address]
    return found
