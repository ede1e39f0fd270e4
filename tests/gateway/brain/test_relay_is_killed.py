"""A relay that the brain has given up: its place is free at once, and another comes. Who kills it is the keeper, whose
tests are in ``test_keeper_keeps_processes_running``."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest

from chiron.gateway.brain.relays import Relays
from chiron.gateway.processes.workers import START_MAX_S, Workers
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.keys import KeyRing
from chiron.net.clock import LiveClock
from live_gateway import RELAYS, until
from scripted_engine import ScriptedEngine, before
from virtual_loop import run_virtual


def test_and_another_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(), relays=2) as (service, _):
            running, links = RELAYS[tmp_path].running, service.gateway.relays.links
            hung, first = links[0], list(running)
            hung.wire.give_up("it has said nothing for 30 s")
            await until(lambda: sum(each in running for each in first) == 1, "it has ended")
            await until(lambda: len(links) == 2 and all(link.listens for link in links), "another is there")
            assert hung not in links

    asyncio.run(main())


def test_one_that_never_says_hello_is_given_up() -> None:
    async def main() -> None:
        clock = LiveClock(asyncio.get_running_loop())
        workers = Workers(clock=clock, count=1)
        nobody = cast(Any, None)
        relays = workers.relays = Relays(
            clock=clock, desk=nobody, models=Models({}), keys=KeyRing(), engines={}, responded=print, left=workers.left
        )
        with tempfile.TemporaryDirectory(prefix="chiron-") as folder:
            await workers.open(Path(folder) / "brain")
            reader, writer = await asyncio.open_unix_connection(Path(folder) / "brain")
            waiting = asyncio.get_running_loop().create_task(workers.wait())
            await reader.readexactly(4)  # It is greeted, and says nothing.
            with pytest.raises(OSError, match="did not start within 60 s"):
                await waiting
            await reader.read()
            assert clock.now_s == pytest.approx(START_MAX_S, abs=1.0)
            assert relays.links == []
            writer.close()
            await workers.stop(0.0)

    run_virtual(main())
