"""What a fleet has to know at the next start is in the store that several gateways share, once that can be used."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.config.serve import parse_serve
from chiron.fleet.port import FleetEnvironment, Memory
from chiron.fleet.union import UnionFleet
from chiron.gateway.instances.fleet_memory import FleetMemory
from chiron.gateway.service import Service
from chiron.store.port import StoreDamaged, StoreUnavailable
from memory_store import MemoryStore

MODEL = '[models.m]\nengine = "openai"\nendpoints = ["http://127.0.0.1:9"]\n'


class Trying(MemoryStore):
    """The first two times there is no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals = 2
        self.damaged = False

    async def save_learned(self, name: str, data: bytes) -> None:
        if self.refusals:
            self.refusals -= 1
            raise StoreUnavailable("the server is away")
        await super().save_learned(name, data)

    async def load_learned(self, name: str) -> bytes | None:
        if self.damaged:
            raise StoreDamaged("it is damaged")
        return await super().load_learned(name)


def test_it_waits_for_the_store_and_tries_again() -> None:
    async def run() -> None:
        opened, store = asyncio.Event(), Trying()
        memory = FleetMemory(opened, lambda: store, again_s=0.0)
        saving = asyncio.ensure_future(memory.save("places", b"here"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (store.refusals, saving.done()) == (2, False), "the store is not open yet"
        opened.set()
        await saving
        assert await memory.load("places") == b"here"
        assert store.refusals == 0
        store.damaged = True
        assert await memory.load("places") is None, "as if there were nothing"

    asyncio.run(run())


@pytest.mark.parametrize(("head", "shared"), [("store = 'postgresql://127.0.0.1:9/chiron'\n", True), ("", False)])
def test_gateways_of_one_database_share_it(
    head: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[FleetEnvironment] = []

    class Noted(UnionFleet):
        def __init__(self, sources: object, environment: FleetEnvironment) -> None:
            given.append(environment)
            super().__init__({}, environment)

    monkeypatch.setattr("chiron.gateway.service.UnionFleet", Noted)

    async def run() -> Memory | None:
        config = parse_serve(f"{head}[server]\ndata = '{tmp_path}'\n{MODEL}", directory=tmp_path)
        service = Service(config)
        if not shared:  # There is no server.
            await service.opening.open_store()
            assert service.opening._opened.is_set(), "from now on it can be asked"
        await service.engines.close()
        await service.store.close()
        service.clock.stop()
        (environment,) = given
        return environment.memory

    assert isinstance(asyncio.run(run()), FleetMemory) == shared
