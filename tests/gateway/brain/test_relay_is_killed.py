"""A relay that the brain has given up is killed: with its listening socket open it would keep its share of clients."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from chiron.gateway.brain.relays import Relays
from chiron.gateway.processes.fork_server import RelayStart
from chiron.gateway.processes.workers import START_MAX_S, Workers
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.keys import KeyRing
from chiron.net.clock import LiveClock
from live_gateway import RELAYS, until
from scripted_engine import ScriptedEngine, before
from virtual_loop import run_virtual

WAIT_S = 60.0
STOPPED = """
import os, signal, socket
from chiron.gateway.processes.fork_server import ForkServer, RelayStart

def run(brain, start):
    brain.sendall(b"%d" % os.getpid())
    while True:
        signal.pause()

forks = ForkServer(run)
start, ends = RelayStart(port=1, api_path="", relays=2), []
for name in ("stopped", "other"):
    ours, theirs = socket.socketpair()
    forks.spawn(name, theirs, start)
    theirs.close()
    ends.append((ours, int(ours.recv(100))))
(stopped, stopped_pid), (other, other_pid) = ends
os.kill(stopped_pid, signal.SIGSTOP)
forks.kill("nobody")
forks.kill("stopped")
print(stopped.recv(1), flush=True)
os.kill(other_pid, 0)
forks.kill("stopped")
forks.kill("other")
print(other.recv(1), flush=True)
forks.close()
"""


def test_also_one_that_is_stopped_and_only_that() -> None:
    """In a process of its own: it forks, and this one may have threads."""
    said = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, timeout=WAIT_S, check=False)
    assert (said.stdout, said.stderr, said.returncode) == (b"b''\nb''\n", b"", 0)


def test_and_another_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(), relays=2) as (service, _):
            relays, links = RELAYS[tmp_path], service.gateway.relays.links
            hung = links[0]
            hung.wire.give_up("it has said nothing for 30 s")
            await until(lambda: relays.killed == [hung.name], "it is killed")
            await until(lambda: len(links) == 2 and all(link.listens for link in links), "another is there")
            assert hung not in links

    asyncio.run(main())


class Mute:
    """Processes that hang before they say anything."""

    def __init__(self) -> None:
        self.made: dict[str, socket.socket] = {}
        self.killed: list[str] = []

    def spawn(self, name: str, brain: socket.socket, start: RelayStart) -> None:
        self.made[name] = brain.dup()

    def kill(self, name: str) -> None:
        self.killed.append(name)
        self.made[name].close()


def test_one_that_never_says_hello_is_replaced() -> None:
    async def main() -> None:
        clock, processes = LiveClock(asyncio.get_running_loop()), Mute()
        workers = Workers(clock=clock, processes=processes, start=RelayStart(port=1, api_path="", relays=1))
        models, keys, nobody = Models({}), KeyRing(), cast(Any, None)
        workers.relays = Relays(
            clock=clock, desk=nobody, models=models, keys=keys, engines={}, responded=print, left=workers.left
        )
        beginning = asyncio.get_running_loop().create_task(workers.begin())
        await asyncio.sleep(START_MAX_S - 1.0)
        assert (list(processes.made), processes.killed) == (["relay 1"], [])
        with pytest.raises(OSError, match="did not start within 60 s"):
            await beginning
        await asyncio.sleep(1.0)
        assert (list(processes.made), processes.killed) == (["relay 1", "relay 2"], ["relay 1"])
        processes.made["relay 2"].close()

    run_virtual(main())
