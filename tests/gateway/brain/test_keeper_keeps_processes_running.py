"""The first process of several: what it starts, starts again and ends with, on hand-made brains and relays.

Each in a process of its own: it forks, and this one may have threads.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from chiron.gateway.processes import keeper as keeping
from chiron.gateway.processes.fence import machine_s
from chiron.gateway.processes.reserved import Port
from chiron.gateway.processes.start import RelayStart

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
            with suppress(psutil.NoSuchProcess):  # They end just now, by themselves.
                each.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def lines(self, count: int) -> list[list[str]]:
        """The next ones, in no order."""
        assert self.process.stdout is not None
        return sorted(self.process.stdout.readline().decode().split() for _ in range(count))

    def gone(self, pids: list[Any]) -> bool:
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return not psutil.wait_procs(found, WAIT_S)[1]


def test_a_brain_that_cannot_start_is_not_started_again_and_gives_its_status(tmp_path: Path) -> None:
    with Keeper(tmp_path, 'keep().socket.sendall(b"alive\\n")\nsys.exit(3)') as keeper:
        assert [line[0] for line in keeper.lines(2)] == ["brain", "over"]
        assert keeper.process.wait(WAIT_S) == 3
        assert list(tmp_path.iterdir()) == []


def test_a_brain_that_asks_for_another_one_before_it_has_served_has_a_successor(tmp_path: Path) -> None:
    with Keeper(tmp_path, "seat = keep()\nsys.exit(76 if seat.number == 1 else 3)") as keeper:
        assert [line[:2] for line in keeper.lines(3)] == [["brain", "1"], ["brain", "2"], ["over", "3"]]


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


@pytest.mark.parametrize("end", ["sys.exit(75)", 'seat.socket.sendall(b"until 1.000\\n")\nsignal.pause()'])
def test_a_leader_whose_lease_ends_while_it_is_told_to_stop_has_stopped(tmp_path: Path, end: str) -> None:
    with Keeper(tmp_path, SERVES.replace("sys.exit(7)", end)) as keeper:
        keeper.lines(3)
        keeper.process.terminate()
        assert keeper.lines(2) == [["over", "0"], ["told", str(int(signal.SIGTERM))]]
        assert keeper.process.wait(WAIT_S) == 0


def test_orphans_that_the_first_process_of_a_container_inherits_are_reaped(tmp_path: Path) -> None:
    inherits = "import ctypes\nctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # As the first process does.\n"
    leaves = """
seat = keep()
child, pids = os.fork(), []
if child == 0:
    orphan = os.fork()
    if orphan == 0:
        time.sleep(0.2)
        os._exit(0)
    tell("orphan", orphan)
    os._exit(0)
os.waitpid(child, 0)
seat.socket.sendall(b"open\\nready\\n")
live(seat.socket)
"""
    with Keeper(tmp_path, "import time\n" + inherits + leaves) as keeper:
        lines = keeper.lines(4)
        (orphan,) = [pid for what, *_, pid in lines if what == "orphan"]
        assert keeper.gone([orphan])


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


def test_relays_let_requests_end_also_without_a_brain(tmp_path: Path) -> None:
    lingers = """
def relay(end, start):
    tell("relay", os.getpid())
    live(end)
    tell("asked")
    while not Path("go").exists():
        try:
            if not end.recv(100):
                tell("cut off")
                os._exit(1)
        except TimeoutError:
            pass
    tell("done")
    return 0
"""
    with Keeper(tmp_path, lingers + SERVES.replace("keep()", "keep(grace_s=60.0)")) as keeper:
        (brain, *_) = keeper.lines(3)
        keeper.process.terminate()
        assert keeper.lines(3) == [["asked"], ["asked"], ["told", str(int(signal.SIGTERM))]]
        assert keeper.gone([brain[2]])
        (tmp_path / "go").touch()
        assert keeper.lines(3) == [["done"], ["done"], ["over", "7"]]


def test_where_none_can_be_started_what_runs_goes_on(tmp_path: Path) -> None:
    refuses = """
fork = os.fork
def forks_later():
    if not Path("full").exists():
        return fork()
    Path("full").unlink()
    tell("refused")
    raise BlockingIOError(11, "no more processes")
os.fork = forks_later
"""
    with Keeper(tmp_path, refuses + SERVES) as keeper:
        (brain, first, second) = keeper.lines(3)
        (tmp_path / "full").touch()
        os.kill(int(first[1]), signal.SIGKILL)
        assert keeper.lines(1) == [["refused"]]
        assert keeper.lines(1)[0][0] == "relay"
        assert all(psutil.pid_exists(int(pid)) for pid in (brain[2], second[1]))


def test_a_leader_is_killed_by_the_last_that_it_said_not_by_the_last_that_was_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The keeper may have stalled, and the leader renewed its lease meanwhile."""
    start, ours = RelayStart(port=1, folder=tmp_path, relays=0), socket.socketpair()
    keeper = keeping.Keeper(relay=lambda end, start: 0, start=start, port=Port([], 1), stopping=[])
    leader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    brain = keeper._brain
    try:
        brain.pid, brain.socket, brain.until_s = leader.pid, ours[0], machine_s() - 1.0
        ours[1].sendall(b"alive\n" * 2000 + f"until {machine_s() + 600:.3f}\n".encode())
        keeper._look(late=False)
        assert not caplog.records
        ours[1].sendall(f"until {machine_s() - 1.0:.3f}\n".encode())
        brain.until_s = machine_s() - 1.0
        keeper._look(late=False)
        assert leader.wait(WAIT_S) == -signal.SIGKILL
    finally:
        leader.kill()
        leader.wait(WAIT_S)
        for end in ours:
            end.close()


def test_a_leader_that_renews_its_lease_and_says_nothing_else_hangs() -> None:
    """Another thread of its process says until when it leads."""
    start, ours = RelayStart(port=1, folder=Path(), relays=0), socket.socketpair()
    keeper = keeping.Keeper(relay=lambda end, start: 0, start=start, port=Port([], 1), stopping=[])
    brain = keeper._brain
    brain.pid, brain.socket, brain.quiet = 1, ours[0], 7
    try:
        for said, quiet in ((f"until {machine_s() + 600:.3f}\n", 7), ("alive\n", 0)):
            ours[1].sendall(said.encode())
            keeper._read(brain)
            assert brain.quiet == quiet
    finally:
        for end in ours:
            end.close()


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
