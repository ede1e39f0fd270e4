"""What tests of ``chiron serve`` under load share: emulated engines, clients, the event log."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from chiron.telemetry.event_log import read_event_log
from fault_site import Answer, Api, FaultSite, chat

PROFILE = "llama-3.1-8b/a100/tp1"


def emulated(**keys: object) -> str:
    """Keys of a model whose emulated engines the gateway starts; ``args`` are the engine's own."""
    values = {"engine": "emulated", "profile": PROFILE, "max_num_seqs": 16, **keys}
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())


@contextmanager
def emulated_fleet(count: int, *options: str) -> Iterator[list[str]]:
    """URLs of engines that the gateway did not start."""
    command = [sys.executable, "-m", "chiron.engines.serve.emulated", "--profile", PROFILE, "--fleet", str(count)]
    process = subprocess.Popen(
        [*command, "--served-model-name", "m", *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        with process.stdout:
            ports = process.stdout.readline().strip().rpartition("=")[2].split(",")
            assert len(ports) == count, ports
        yield [f"http://127.0.0.1:{int(port)}" for port in ports]
    finally:
        process.kill()
        process.wait()


async def send(api: Api, per_s: float, for_s: float, *, model: str = "m", tokens: int = 40) -> list[Answer]:
    """A steady stream of requests, streaming and not; returns when all have been sent."""
    answers: list[Answer] = []
    began_s = time.monotonic()
    for number in range(round(per_s * for_s)):
        await asyncio.sleep(max(0.0, began_s + number / per_s - time.monotonic()))
        body = chat(f"question {number}", tokens=tokens, stream=number % 4 > 0) | {"model": model}
        answers.append(Answer(api.origin, body))
    return answers


async def verdicts(answers: list[Answer], timeout_s: float = 60.0) -> Counter[str]:
    return Counter([await answer.end(timeout_s) for answer in answers])


async def until(condition: Callable[[dict[str, Any]], Any], api: Api, what: str, timeout_s: float = 60.0) -> Any:
    """What ``condition`` says of the gateway's status once it is true."""
    until_s = time.monotonic() + timeout_s
    while not (found := condition(status := await api.get("/chiron/status"))):
        assert time.monotonic() < until_s, (f"not within {timeout_s:g} s: {what}", status)
        await asyncio.sleep(0.05)
    return found


def ready(status: dict[str, Any], model: int = 0) -> int:
    return sum(i["state"] == "ready" for i in status["models"][model]["instances"])


def events(site: FaultSite) -> list[dict[str, Any]]:
    """The event log of a gateway that has ended, rotated files included, oldest first."""
    return list(read_event_log(site.directory / "chiron-data" / "events.jsonl"))


def check_log(site: FaultSite) -> None:
    """Nothing in the gateway's own log that nobody expects, and a good end."""
    text = site.log.read_text()
    assert "Traceback" not in text, text
    assert " ERROR " not in text, text


def check_ends(lines: list[dict[str, Any]]) -> Counter[str]:
    """Every arrival has exactly one end; outcomes are counted."""
    arrived = Counter(line["request"] for line in lines if line.get("event") == "arrival")
    ended = Counter(line["request"] for line in lines if line.get("event") == "ended")
    assert arrived == ended
    assert set(arrived.values()) <= {1}
    return Counter(line["outcome"] for line in lines if line.get("event") == "ended")
