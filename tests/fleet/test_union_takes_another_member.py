"""Another source of instances is one file and one member: the gateway knows of it what its fleet says."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from chiron.config.serve import parse_serve
from chiron.core.types import Instance
from chiron.fleet.port import Claim, FleetEnvironment, FleetReport, KindReport, Trouble
from chiron.fleet.records import InstanceRecord, InstanceRecords
from chiron.fleet.union import MEMBERS
from chiron.gateway.service import Service
from chiron.gateway.settings import ServeConfig
from chiron.net.client import Origin
from chiron.net.server import serve
from live_gateway import BESIDES, until
from scripted_engine import CHAT, ScriptedEngine, body, whole

# -- one file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSource:
    """Instances are servers on the gateway's own loop."""

    down: bool = False
    standing: ClassVar[int] = 0
    instances_max: ClassVar[int | None] = None
    gpus: ClassVar[int] = 0
    summary: ClassVar[str] = "on this loop"


HANDED: list[bool] = []
"""Whether another brain follows, by fleet that has ended."""


class LoopFleet:
    def __init__(self, sources: Mapping[str, LoopSource], environment: FleetEnvironment) -> None:
        self._sources = sources
        self._records = InstanceRecords(clock=environment.clock, events=environment.events, serve=self._serve)

    def create(self, instance: Instance) -> None:
        self._records.begin(instance)

    def remove(self, instance: Instance) -> None:
        self._records.end(instance)

    def suspect(self, instance: Instance) -> None:
        self._records.suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        return None  # They end with the gateway.

    def report(self) -> FleetReport:
        full = Trouble(reason="its loop is full", retry_s=3.0, outside=True)
        down = KindReport(trouble=full, instances_max=0)
        return FleetReport(kinds={name: down if each.down else KindReport() for name, each in self._sources.items()})

    async def close(self, *, hands_over: bool = False) -> None:
        HANDED.append(hands_over)
        await self._records.close(5.0)

    async def _serve(self, record: InstanceRecord) -> None:
        if not self._sources[record.instance.kind.name].down:
            server = await serve(ScriptedEngine(whole).handle)
            record.resources.push_async_callback(server.close, 0.0)
            self._records.ready(record, f"http://127.0.0.1:{server.port}")
        await asyncio.Event().wait()


# -- one member ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEMBERS, LoopSource, LoopFleet)  # type: ignore[arg-type]


def config(directory: Path, source: Any) -> ServeConfig:
    text = '[models.m]\nengine = "openai"\nendpoints = ["http://127.0.0.1:9"]\n' + BESIDES
    text += '[limits]\noutage_wait = "200ms"\n'
    read = parse_serve(text, directory=directory)
    (model,) = read.models
    return replace(read, models=(replace(model, kinds=(replace(model.kinds[0], source=source),)),))


def test_its_instances_serve_and_its_troubles_are_told(tmp_path: Path) -> None:
    async def story(down: bool) -> None:
        service = Service(config(tmp_path, LoopSource(down=down)))
        await service.start()
        origin = Origin(service.url)
        try:
            if not down:
                await until(lambda: service.engines.live, "ready")
            answer = await origin.fetch("POST", CHAT.decode(), body=body(), timeout_s=60.0)
            assert answer.status == (503 if down else 200)
            assert (b"its loop is full" in answer.body) == down
            (model,) = service.status()["models"]
            assert ("its loop is full" in (model["outage"] or "")) == down
        finally:
            await origin.close()
            await (service.hand_over() if down else service.stop(0.1))

    HANDED.clear()
    asyncio.run(story(down=False))
    asyncio.run(story(down=True))
    assert HANDED == [False, True], "it hears whether another brain follows"
