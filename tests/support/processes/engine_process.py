"""An engine server as a process of its own, and a streaming client, for tests."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from chiron.engines.metrics import parse_metrics
from chiron.net.client import NetError, Origin

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class EngineProcess:
    """``python -m MODULE ARGUMENTS``, ready when made; ``stop`` it."""

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        if not self.ready_line.startswith("chiron-engine ready port="):
            self.process.kill()
            raise RuntimeError(f"{module} did not start: {self.process.communicate()[1]}")
        self.url = f"http://127.0.0.1:{self.ready_line.strip().rpartition('=')[2]}"

    def stop(self) -> tuple[float, str]:
        """SIGTERM; seconds until it was gone, and what it logged."""
        started_s = time.monotonic()
        self.process.terminate()
        try:
            log = self.process.communicate(timeout=STOP_TIMEOUT_S)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return time.monotonic() - started_s, log


class Stream:
    """One streamed answer, event by event."""

    def __init__(self, origin: Origin, path: str, body: dict[str, Any]) -> None:
        self.events: list[dict[str, Any]] = []
        self.times_s: list[float] = []
        self.status = 0
        self.error: NetError | None = None
        self.complete = False
        self._rest = b""
        self._over = asyncio.Event()
        self._changed = asyncio.Event()
        self.sent_s = time.monotonic()
        data = json.dumps({"stream": True, "return_token_ids": True, **body}).encode()
        self.call = origin.send(b"POST", path.encode(), [(b"content-type", b"application/json")], data, self)

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status

    def on_data(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n\n")
        for line in lines:
            if line == b"data: [DONE]":
                self.complete = True
            else:
                self.events.append(json.loads(line.removeprefix(b"data: ")))
                self.times_s.append(time.monotonic())
        self._changed.set()

    def on_end(self) -> None:
        self._over.set()
        self._changed.set()

    def on_error(self, error: NetError) -> None:
        self.error = error
        self._over.set()
        self._changed.set()

    async def end(self, timeout_s: float = 60.0) -> Stream:
        await asyncio.wait_for(self._over.wait(), timeout_s)
        assert self.error is None
        return self

    async def tokens(self, count: int, timeout_s: float = 60.0) -> list[int]:
        """Wait for that many tokens; those that came."""
        while len(self.token_ids) < count and not self._over.is_set():
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        return self.token_ids

    @property
    def choices(self) -> list[dict[str, Any]]:
        return [event["choices"][0] for event in self.events if event.get("choices")]

    @property
    def token_ids(self) -> list[int]:
        return [id for choice in self.choices for id in choice["token_ids"]]

    @property
    def text(self) -> str:
        return "".join(c["delta"]["content"] if "delta" in c else c["text"] for c in self.choices)

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Origin]:
    origin = Origin(url, idle_max=256, connect_timeout_s=60.0)
    try:
        yield origin
    finally:
        await origin.close()


async def metrics(origin: Origin) -> dict[str, float]:
    return parse_metrics((await origin.fetch("GET", "/metrics")).body.decode())


async def limits(origin: Origin, limit: int | None = None) -> dict[str, int]:
    if limit is None:
        answer = await origin.fetch("GET", "/chiron/limits")
    else:
        answer = await origin.fetch("PUT", "/chiron/limits", body=json.dumps({"limit": limit}).encode())
    assert answer.status == 200, answer.body
    found: dict[str, int] = json.loads(answer.body)
    return found


async def until(condition: Callable[[dict[str, int]], bool], origin: Origin, timeout_s: float = 60.0) -> dict[str, int]:
    """Ask for the limits until they are as wanted."""
    end_s = time.monotonic() + timeout_s
    while True:
        found = await limits(origin)
        if condition(found):
            return found
        assert time.monotonic() < end_s, found
