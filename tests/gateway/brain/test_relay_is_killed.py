"""A relay that the brain has given up: its place is free at once, and another comes. Who kills it is the keeper, whose
tests are in ``test_keeper_keeps_processes_running``."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from chiron.gateway.brain.relays import Relays
from chiron.gateway.processes.workers import START_MAX_S, Workers
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.key_ring import KeyRing
from chiron.net.clock import LiveClock
from chiron.net.loop import run_on_loop
from live_gateway import RELAYS, until
from lone_desk import lone_desk
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
        workers, keys = Workers(clock=clock, count=1), KeyRing()
        relays = workers.relays = Relays(
            clock=clock,
            desk=lone_desk(clock, keys),
            models=Models({}),
            keys=keys,
            engines={},
            responded=lambda status, count: None,
            left=workers.left,
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


@pytest.mark.parametrize(("stops", "told"), [(True, 0), (False, 1)])
def test_one_that_leaves_is_told_of_unless_its_gateway_stops(
    stops: bool, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It may hear of the stop before the brain does."""

    async def main() -> None:
        clock = LiveClock(asyncio.get_running_loop())
        workers, keys = Workers(clock=clock, count=1), KeyRing()
        workers.relays = Relays(
            clock=clock,
            desk=lone_desk(clock, keys),
            models=Models({}),
            keys=keys,
            engines={},
            responded=lambda status, count: None,
            left=workers.left,
        )
        link = workers.relays.link("relay 1")
        link.pid = 7
        workers.left(link, "its connection was lost")
        await asyncio.sleep(0.1)
        if stops:
            await workers.stop(0.0)
        await asyncio.sleep(1.0)

    run_virtual(main())
    assert caplog.text.count("has left: ") == told


SAYS_HELLO = """
import socket, sys
import msgspec
from chiron.gateway.port.messages import VERSION_MIN, Hello
wire = socket.socket(socket.AF_UNIX)
wire.connect(sys.argv[1])
frame = msgspec.msgpack.encode([Hello(version_min=VERSION_MIN, nonce="0123456789abcdef")])
wire.sendall(len(frame).to_bytes(4, "big") + frame)
sys.stdin.readline()
wire.close()
sys.stdin.readline()
"""


@pytest.mark.parametrize("run", [asyncio.run, run_on_loop], ids=["asyncio", "as served"])
def test_its_places_are_free_once_its_process_has_ended_and_kept_while_it_may_come_back(
    run: Callable[[Coroutine[Any, Any, None]], None],
) -> None:
    async def main() -> None:
        # Its clock stands, so that nothing is over because time has passed.
        clock = LiveClock(asyncio.get_running_loop(), time_s=lambda: 1.0)
        workers, keys = Workers(clock=clock, count=1), KeyRing()
        relays = workers.relays = Relays(
            clock=clock,
            desk=lone_desk(clock, keys),
            models=Models({}),
            keys=keys,
            engines={},
            responded=lambda status, count: None,
            left=workers.left,
        )
        with tempfile.TemporaryDirectory(prefix="chiron-") as folder:
            path = Path(folder) / "brain"
            await workers.open(path)
            relay = subprocess.Popen([sys.executable, "-c", SAYS_HELLO, path], stdin=subprocess.PIPE)
            try:
                await until(lambda: bool(relays.links), "it has said hello")
                (link,) = relays.links
                assert relay.stdin is not None
                relay.stdin.write(b"close\n")
                relay.stdin.flush()
                await until(lambda: link.gone and not relays.links, "its connection is closed")
                assert not link.buried
                relay.kill()
                await until(lambda: link.buried, "its process has ended")
            finally:
                relay.kill()
                relay.communicate()
            await workers.stop(0.0)
            clock.stop()

    run(main())
