"""The first process of several: what it starts, starts again and ends with, on hand-made brains and relays.

Each in a process of its own: it forks, and this one may have threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

WAIT_S = 60.0
SCRIPT = """
import os, signal, socket, sys, tempfile, time
from pathlib import Path
from chiron.gateway.processes.keeper import Keeper
from chiron.gateway.processes.reserved import reserve
from chiron.gateway.processes.start import RelayStart

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def live(end, silent=False):
    "Say that it lives until the keeper says, or is, something else."
    end.settimeout(0.1)
    while True:
        try:
            return end.recv(100)
        except TimeoutError:
            if not silent:
                end.sendall(b"alive\\n")

def first(path):
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def relay(end, start):
    number = os.getpid()
    tell("relay", number)
    live(end, silent=SILENT and first(start.folder.parent / "seen"))
    return 0

SILENT = False
folder, port = Path(tempfile.mkdtemp(prefix="chiron-", dir=os.getcwd())), reserve("127.0.0.1", 0)
def keep(**others):
    keeper = Keeper(relay=relay, start=RelayStart(port=port.number, folder=folder, relays=2), port=port,
                    stopping=[signal.SIGTERM, signal.SIGINT], **others)
    seat = keeper.run()
    if seat is None:
        tell("over", keeper.status)
        sys.exit(keeper.status)
    tell("brain", seat.number, os.getpid())
    return seat
"""
SERVES = """
seat = keep()
seat.socket.sendall(b"open\\nready\\n")
tell("told", live(seat.socket).decode().split()[0])
sys.exit(7)
"""


class Keeper:
    """A keeper with its brains and relays, and what they say."""

    def __init__(self, directory: Path, script: str) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT + script], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        family = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait(WAIT_S)
        for each in family:
            if each.is_running():
                each.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def lines(self, count: int) -> list[list[str]]:
        """The next ones, in no order."""
        assert self.process.stdout is not None
        return sorted(self.process.stdout.readline().decode().split() for _ in range(count))

    def gone(self, pids: list[Any]) -> bool:
        found = [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]
        return not psutil.wait_procs(found, WAIT_S)[1]


def test_a_brain_that_cannot_start_is_not_started_again_and_gives_its_status(tmp_path: Path) -> None:
    with Keeper(tmp_path, 'keep().socket.sendall(b"alive\\n")\nsys.exit(3)') as keeper:
        assert [line[0] for line in keeper.lines(2)] == ["brain", "over"]
        assert keeper.process.wait(WAIT_S) == 3
        assert list(tmp_path.iterdir()) == []


def test_a_killed_brain_has_a_successor_and_the_relays_are_the_same(tmp_path: Path) -> None:
    with Keeper(tmp_path, SERVES) as keeper:
        (brain, first, second) = keeper.lines(3)
        assert [brain[:2], first[0], second[0]] == [["brain", "1"], "relay", "relay"]
        os.kill(int(brain[2]), signal.SIGKILL)
        ((_, number, successor),) = keeper.lines(1)
        assert number == "2"
        assert all(psutil.pid_exists(int(pid)) for _, pid in (first, second))
        keeper.process.terminate()
        assert keeper.lines(2) == [["over", "7"], ["told", str(int(signal.SIGTERM))]]
        assert keeper.process.wait(WAIT_S) == 7
        assert keeper.gone([successor, first[1], second[1]])
        assert list(tmp_path.iterdir()) == []


def test_a_killed_relay_has_a_successor_and_the_brain_is_the_same(tmp_path: Path) -> None:
    with Keeper(tmp_path, SERVES) as keeper:
        (brain, first, _) = keeper.lines(3)
        os.kill(int(first[1]), signal.SIGKILL)
        assert keeper.lines(1)[0][0] == "relay"
        assert psutil.pid_exists(int(brain[2]))


def test_no_process_outlives_a_killed_keeper_not_even_one_that_is_stopped(tmp_path: Path) -> None:
    with Keeper(tmp_path, SERVES) as keeper:
        (brain, first, second) = keeper.lines(3)
        os.kill(int(first[1]), signal.SIGSTOP)
        keeper.process.kill()
        assert keeper.gone([brain[2], first[1], second[1]])


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    script = 'seat = keep()\nseat.socket.sendall(b"open\\nready\\n")\nlive(seat.socket)\ntell("told")\nsignal.pause()'
    with Keeper(tmp_path, script) as keeper:
        pids = [line[-1] for line in keeper.lines(3)]
        keeper.process.terminate()
        assert keeper.lines(1) == [["told"]]
        keeper.process.send_signal(signal.SIGINT)
        assert keeper.process.wait(WAIT_S) == 128 + signal.SIGINT
        assert keeper.gone(pids)


@pytest.mark.slow
def test_one_that_says_nothing_is_killed_and_only_that(tmp_path: Path) -> None:
    with Keeper(
        tmp_path, SERVES.replace("keep()", "keep(quiet_max=8)").replace("seat", "SILENT = True\nseat", 1)
    ) as keeper:
        (brain, *relays) = keeper.lines(3)
        ((_, successor),) = keeper.lines(1)
        alive = [pid for _, pid in relays if psutil.pid_exists(int(pid))]
        assert len(alive) == 1
        assert successor not in alive
        assert psutil.pid_exists(int(brain[2]))
