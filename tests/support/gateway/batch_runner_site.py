"""A batch runner on a real store, with a fake control plane, under virtual time."""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from chiron.core.clock import Callback, VirtualClock
from chiron.gateway.batch.runner import BatchRunner
from chiron.gateway.batch.settings import RunnerSettings
from chiron.gateway.relay.key_ring import KeyRing
from chiron.store.port import Batch
from chiron.store.sqlite.store import SqliteStore
from gateway_site import FakePlane, jsonl, line, models

WALL_S = 1_800_000_000.0
ENDPOINT = "/v1/chat/completions"
TUNING = RunnerSettings(finish_wait_s=0.001)
SETTLED_TURNS = 20
"""Turns of the loop without a call of the store, after which no task of the runner has anything left to do."""


class Clock(VirtualClock):
    """Virtual time with a date."""

    def post(self, callback: Callback) -> None:
        callback()

    def wall_s(self, when_s: float) -> float:
        return WALL_S + when_s

    def from_wall_s(self, wall_s: float) -> float:
        return wall_s - WALL_S


class Watched:
    """A store that knows whether calls of it are under way."""

    def __init__(self, store: Any) -> None:
        self.under_way = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            self.under_way += 1
            try:
                return await found(*arguments, **options)
            finally:
                self.under_way -= 1

        return call


class Site:
    """A store, a plane, a runner; time moves when ``until`` says so."""

    def __init__(self, directory: Path, answer: Callable[[str], Any] = str.upper, **options: Any) -> None:
        self.clock = Clock()
        self.plane = FakePlane(self.clock, answer)
        self.store = options.pop("store", SqliteStore)(directory, wall=self.wall_s)
        self._watched = Watched(self.store)
        self.keys = options.pop("keys", KeyRing())
        self.models = options.pop("models", models())
        self._options: dict[str, Any] = {"tuning": TUNING} | options

    def wall_s(self) -> float:
        return self.clock.wall_s(self.clock.now_s)

    async def start(self) -> "Site":
        await self.store.open()
        ids = iter(range(1, 1 << 40))
        self.runner = BatchRunner(
            store=self._watched,  # type: ignore[arg-type]
            clock=self.clock,
            completions=self.plane,
            announcements=self.plane,
            models=self.models,
            keys=self.keys,
            next_id=lambda: next(ids),
            **self._options,
        )
        await self.runner.start()
        return self

    async def stop(self) -> None:
        await self.runner.close()
        await self.store.close()

    async def upload(self, *lines: dict[str, Any], window_s: float = 3600.0, owner: str = "") -> Batch:
        upload = await self.store.begin_file("batch", "in.jsonl", owner, 1 << 30)
        await upload.write(jsonl(*lines))
        file = await upload.commit()
        return await self.store.create_batch(
            owner=owner,
            input_file_id=file.id,
            endpoint=ENDPOINT,
            completion_window="1h",
            deadline_s=self.wall_s() + window_s,
            metadata={},
            now_s=self.wall_s(),
        )

    async def submit(self, *lines: dict[str, Any], **options: Any) -> Batch:
        batch = await self.upload(*lines, **options)
        self.runner.created(batch)
        return batch

    async def until(self, done: Callable[[], Any], step_s: float = 0.05) -> None:
        """Move virtual time until ``done`` (a value, or a coroutine's)."""
        for _ in range(4000):
            result = done()
            if isinstance(result, Awaitable):
                result = await result
            if result:
                return
            await self._settled()
            self.clock.run_until(self.clock.now_s + step_s)
        raise AssertionError(f"never: {self.runner.summary()}")

    async def _settled(self) -> None:
        """Once the runner waits for time alone: virtual time must not run away from the threads of the store."""
        turns = 0
        while turns < SETTLED_TURNS:
            await asyncio.sleep(0.001 if self._watched.under_way else 0.0)
            turns = 0 if self._watched.under_way else turns + 1

    async def ended(self, batch: Batch, step_s: float = 0.05) -> Batch:
        async def over() -> bool:
            found = await self.store.get_batch(batch.id, None)
            return found.status in ("completed", "failed", "expired", "cancelled")

        await self.until(over, step_s)
        return await self.store.get_batch(batch.id, None)

    async def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        data = b"".join([block async for block in self.store.read_file(file_id, None)])
        return [json.loads(each) for each in data.splitlines()]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


def many(count: int, content: str = "x", prefix: str = "") -> list[dict[str, Any]]:
    return [line(f"{prefix}{i}", f"{content} {i}") for i in range(count)]
