"""A pipeline of processes whose stages are killed, stopped and scaled while it answers: the tokens are the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from typing import Any

import pytest

from reference import generated
from staged_models import need_torch, prompts, tiny

need_torch()

from staged_processes import StageProcess  # noqa: E402
from staged_site import request  # noqa: E402

TOKENS = 24
ROUNDS = 20
STAGES = [{"layers": "0-0", "max": 2}, {"layers": "1-2", "min": 2, "max": 3, "pace_ms": 4}, {"layers": "3-3"}]


class Instance:
    def __init__(self, port: int) -> None:
        self.port = port

    async def stages(self, counts: list[int] | None = None) -> dict[str, Any]:
        body = {"counts": counts} if counts else None
        status, said = await request(self.port, "/chiron/stages", body, "PUT" if counts else "GET")
        assert status == 200, said
        found: dict[str, Any] = json.loads(said)
        return found

    async def until(self, met: Any) -> dict[str, Any]:
        async with asyncio.timeout(120.0):
            while not met(said := await self.stages()):
                await asyncio.sleep(0.05)
        return said

    async def strike(self, stage: int, which: int, number: signal.Signals) -> int:
        """Send a replica's process a signal; which. One may just have been replaced, if the machine stalls."""
        async with asyncio.timeout(120.0):
            while True:
                replicas = (await self.stages())["stages"][stage]["replicas"]
                ready = [each["address"] for each in replicas if each["state"] == "ready"]
                pid = pid_at(ready[which % len(ready)]) if ready else None
                if pid is not None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                        return pid
                await asyncio.sleep(0.05)

    async def ask(self, prompt: list[int]) -> list[int]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        status, said = await request(self.port, "/v1/completions", body)
        assert status == 200, said
        found: list[int] = json.loads(said)["choices"][0]["token_ids"]
        return found


def pid_at(address: str) -> int | None:
    """The process that listens there."""
    import psutil

    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            return connection.pid
    return None


def calls(said: dict[str, Any], stage: int) -> int:
    return int(said["stages"][stage]["passes"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_is_killed_or_stopped_twenty_times_in_mid_stream(number: signal.Signals) -> None:
    given = prompts(4, seed=7)
    expected = [generated(tiny(), prompt, TOKENS) for prompt in given]

    async def main(instance: Instance) -> None:
        for round_ in range(ROUNDS):
            before = await instance.stages()
            asking = asyncio.ensure_future(asyncio.gather(*(instance.ask(prompt) for prompt in given)))
            await instance.until(lambda said, before=before: calls(said, 1) >= calls(before, 1) + 6)  # type: ignore[misc]
            victim = await instance.strike(1, round_, number)
            assert await asking == expected, f"round {round_}"
            if number == signal.SIGSTOP:
                with suppress(ProcessLookupError):  # It may have been killed and replaced by then.
                    os.kill(victim, signal.SIGCONT)
            await instance.until(lambda said: sum(e["state"] == "ready" for e in said["stages"][1]["replicas"]) >= 2)

    with StageProcess(["run", str(tiny()), "--stages", json.dumps(STAGES), *NAMES, "--silent", "1.5"]) as process:
        asyncio.run(main(Instance(process.port)))


@pytest.mark.slow
def test_replicas_come_and_go_in_mid_stream() -> None:
    given = prompts(8, seed=8)
    expected = [generated(tiny(), prompt, TOKENS) for prompt in given]

    async def main(instance: Instance) -> None:
        for counts in ([2, 3, 1], [1, 2, 1], [2, 2, 1], [1, 3, 1]):
            asking = asyncio.ensure_future(asyncio.gather(*(instance.ask(prompt) for prompt in given * 2)))
            await instance.stages(counts)
            assert await asking == expected * 2
            await instance.until(lambda said, c=counts: [s["ready"] for s in said["stages"]] == c)  # type: ignore[misc]
        assert (await instance.stages())["losses"] == 0

    with StageProcess(["run", str(tiny()), "--stages", json.dumps(STAGES), *NAMES, "--drain", "0.1"]) as process:
        asyncio.run(main(Instance(process.port)))


NAMES = ("--served-model-name", "tiny")
