"""A Ray cluster in memory, and the gateways that have instances there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from child_processes import children
from chiron.fleet.port import FleetEnvironment, KindReport, Memory
from chiron.fleet.ray.cluster import Answer, Question, RayCluster, RayError
from chiron.fleet.ray.fleet import RayFleet
from chiron.fleet.ray.instances import RayTimes
from chiron.fleet.ray.places import NAME, from_bytes
from chiron.fleet.ray.source import RaySource
from chiron.fleet.ray.testing import MemoryRay
from chiron.net.clock import LiveClock
from fleet_factory import STUB, Heard, quick_settings

QUICK = RayTimes(
    quick_s=0.01,
    calm_s=0.02,
    backoff_first_s=0.02,
    backoff_max_s=0.05,
    settle_s=0.05,
    other_s=0.05,
    patience_s=1.0,
    unknown_s=0.2,
)

SOURCE = RaySource(command=(*STUB, "--announce"), resources={"GPU": 1.0}, stop_timeout_s=5.0, start_timeout_s=60.0)


class Shared:
    """Implements ``Memory``."""

    def __init__(self) -> None:
        self.saved: dict[str, bytes] = {}

    async def load(self, name: str) -> bytes | None:
        return self.saved.get(name)

    async def save(self, name: str, data: bytes) -> None:
        self.saved[name] = data

    @property
    def namespaces(self) -> set[str]:
        return {place.namespace for place in from_bytes(self.saved.get(NAME, b"[]"), NAME)}


class Sometimes:
    """Implements ``RayCluster``: one that answers while ``answers`` says so."""

    def __init__(self, cluster: RayCluster, answers: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._answers = answers

    async def ask(self, question: Question) -> Answer:
        if not self._answers():
            raise RayError("the agent hangs")
        return await self._cluster.ask(question)

    async def close(self) -> None:
        await self._cluster.close()


class Site:
    """A cluster in memory, and the gateways before it."""

    def __init__(self, directory: Path, lease_s: float) -> None:
        self.ray = MemoryRay({"a": {"GPU": 1.0}, "b": {"GPU": 1.0}}, directory, lease_s=lease_s)
        self.elsewhere: dict[str, MemoryRay] = {}
        """Other clusters, by address."""
        self.silent: set[str] = set()
        """Addresses at which nobody answers."""
        self.notes: list[str] = []
        self.directory = directory
        self._stack = contextlib.AsyncExitStack()

    def gateway(
        self,
        *,
        advise: bool = False,
        kind: str = "stub",
        source: RaySource = SOURCE,
        also: Mapping[str, RaySource] | None = None,
        owner: str = "",
        spare_s: float = 600.0,
        settle_s: float = 0.0,
        grace_s: float = 0.0,
        memory: Memory | None = None,
        directory: Path | None = None,
        none: bool = False,
    ) -> tuple[RayFleet, Heard]:
        clock = LiveClock(asyncio.get_running_loop())
        self._stack.callback(clock.stop)
        heard = Heard(clock)
        environment = FleetEnvironment(
            clock=clock,
            events=heard,
            log_directory=self.directory,
            settings=quick_settings(),
            owner=lambda: owner,
            directory=directory or self.directory,
            memory=memory,
            settle_s=settle_s,
            grace_s=grace_s,
            advise=advise,
            noted=lambda kind, text: self.notes.append(text),
        )
        sources, times = {} if none else {kind: source, **(also or {})}, replace(QUICK, spare_s=spare_s)
        fleet = RayFleet(sources, environment, connect=self._connect, times=times)
        self._stack.push_async_callback(fleet.close)
        return fleet, heard

    def _connect(self, source: RaySource) -> RayCluster:
        ray = self.elsewhere.get(source.address, self.ray)
        return Sometimes(ray.connect(source), lambda: source.address not in self.silent)

    @property
    def names(self) -> list[str]:
        return list(self.ray.instances)

    def pid(self, name: str = "") -> int:
        (pid,) = self.ray.engine_pids(name or self.names[0])
        return pid

    def engine(self, kind: str) -> int:
        (name,) = [name for name in self.names if f":{kind}:" in name]
        return self.pid(name)

    async def close(self) -> None:
        await self._stack.aclose()
        for ray in (self.ray, *self.elsewhere.values()):
            await ray.close()


def told(directory: Path, story: Callable[[Site], Coroutine[Any, Any, None]], lease_s: float = 600.0) -> None:
    async def run() -> None:
        site = Site(directory, lease_s)
        try:
            await story(site)
        finally:
            await site.close()

    asyncio.run(run())
    assert not children(), "nothing is left"


def report(fleet: RayFleet, kind: str = "stub") -> KindReport:
    return fleet.report().kinds[kind]


def die(fleet: RayFleet) -> None:
    """As by kill -9: nobody is told anything."""
    for task in fleet._running:
        task.cancel()
