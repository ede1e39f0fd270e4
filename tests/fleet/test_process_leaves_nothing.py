"""However gateway, supervisor or engine end, no process stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from child_processes import children
from chiron.fleet.process import orphans
from fleet_factory import STUB, alive, an_instance, kill, local_fleet, pid_in, stub_kind, until, until_sync

SUPERVISOR = (sys.executable, "-m", "chiron.fleet.process.supervisor", "--grace-s", "0.3", "--")

PARENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from chiron.fleet.settings import SleeperSettings
from fleet_factory import an_instance, local_fleet, sleeping_kind

async def main():
    directory = Path(sys.argv[2])
    kind = sleeping_kind("--grandchild", str(directory / "grandchild"), *sys.argv[4:], stop_timeout_s=0.5)
    room = SleeperSettings(host_memory_gb=10.0)
    async with local_fleet(directory / "logs", {"stub": kind}, sleepers=room) as (fleet, heard):
        fleet.create(an_instance(1))
        while not (heard.ready and fleet.report().usage):
            await asyncio.sleep(0.01)
        engine, supervisor = fleet.report().usage[1].pid, fleet._engines[1].process.supervisor_pid
        if sys.argv[3] == "asleep":
            heard.clock.post(lambda: fleet.sleep(an_instance(1)))
            while not heard.sleepers:
                await asyncio.sleep(0.01)
        print(engine, supervisor, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def start_parent(directory: Path, *switches: str, state: str = "awake") -> tuple[subprocess.Popen[str], int, int, int]:
    """A gateway in small; also the process ids of its engine, the engine's child, and the supervisor."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PARENT,
            str(Path(__file__).parents[1] / "support" / "processes"),
            str(directory),
            state,
            *switches,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        engine, supervisor = map(int, parent.stdout.readline().split())
    return parent, engine, pid_in(directory / "grandchild"), supervisor


@pytest.mark.parametrize(
    ("switch", "state"),
    [
        ("--grandchild-session", "awake"),
        ("--ignore-sigterm", "awake"),
        pytest.param("--ignore-sigterm", "asleep", marks=pytest.mark.slow),
    ],
)
def test_kill_9_of_the_gateway_ends_engine_and_grandchild(tmp_path: Path, switch: str, state: str) -> None:
    parent, *others = start_parent(tmp_path, switch, state=state)
    assert all(alive(pid) for pid in others)
    parent.kill()
    parent.wait()
    until_sync(lambda: not any(alive(pid) for pid in others), "all are gone")


def test_what_survives_a_kill_9_of_everything_is_ended_by_the_next_gateway(tmp_path: Path) -> None:
    parent, engine, grandchild, supervisor = start_parent(tmp_path, "--grandchild-session")
    os.kill(parent.pid, signal.SIGSTOP)  # Else it would clean up after its supervisor.
    kill(supervisor)
    until_sync(lambda: not alive(engine), "the engine dies with its supervisor")
    assert alive(grandchild), "nobody is left to know of it"
    assert grandchild not in orphans.kill_orphans(), "its gateway lives"
    parent.kill()
    parent.wait()
    orphans.kill_orphans()  # A fleet in another process of the tests may have been quicker.
    until_sync(lambda: not alive(grandchild), "gone")


def test_kill_9_of_the_supervisor_fails_the_instance_and_ends_engine_and_grandchild(tmp_path: Path) -> None:
    async def story() -> None:
        child = tmp_path / "grandchild"
        kind = stub_kind("--grandchild", str(child), "--grandchild-session")
        async with local_fleet(tmp_path / "logs", {"stub": kind}) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready and fleet.report().usage, "ready")
            engine = fleet.report().usage[1].pid
            kill(fleet._engines[1].process.supervisor_pid)
            await until(lambda: heard.failed == [1], "failed")
            assert "its supervisor was killed" in heard.reasons[1]
            await until(lambda: not alive(engine) and not alive(pid_in(child)), "all are gone")

    asyncio.run(story())


def test_a_crashed_engine_leaves_no_grandchild(tmp_path: Path) -> None:
    async def story() -> None:
        child = tmp_path / "grandchild"
        kind = stub_kind("--grandchild", str(child), "--grandchild-session")
        async with local_fleet(tmp_path / "logs", {"stub": kind}) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready and fleet.report().usage, "ready")
            kill(fleet.report().usage[1].pid)
            await until(lambda: heard.failed == [1], "failed")
            await until(lambda: not alive(pid_in(child)), "the grandchild is gone")

    asyncio.run(story())


def test_a_program_that_is_cancelled_stops_its_engines(tmp_path: Path) -> None:
    pids: list[int] = []

    async def story() -> None:
        async with local_fleet(tmp_path, {"stub": stub_kind()}) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready and fleet.report().usage, "ready")
            pids.append(fleet.report().usage[1].pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(story())
    assert not alive(pids[0])


def test_the_supervisor_forwards_output_and_exit_status() -> None:
    done = subprocess.run(
        [*SUPERVISOR, *STUB, "--exit-code", "5"], stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    assert done.returncode == 5
    assert b"stub: cannot load the model" in done.stderr
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words == [b"pid", b"exit"]
    missing = subprocess.run(
        [*SUPERVISOR, "/no/such/engine"], stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    assert missing.returncode == 127
    assert missing.stdout.startswith(b"error cannot run '/no/such/engine'")


@pytest.mark.parametrize("how", ["pipe closed", "SIGTERM"])
def test_the_supervisor_ends_a_stubborn_engine_when_nobody_wants_it(tmp_path: Path, how: str) -> None:
    child = tmp_path / "child"
    supervisor = subprocess.Popen(
        [*SUPERVISOR, *STUB, "--announce", "--ignore-sigterm", "--grandchild", str(child), "--grandchild-session"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    with supervisor.stdin, supervisor.stdout:
        engine = int(supervisor.stdout.readline().split()[1])
        assert supervisor.stdout.readline().startswith(b"ready ")
        if how == "pipe closed":
            supervisor.stdin.close()
        else:
            supervisor.send_signal(signal.Signals[how])
        assert supervisor.wait(timeout=60.0) == 128 + signal.SIGKILL
    until_sync(lambda: not alive(engine) and not alive(pid_in(child)) and not children(), "all are gone")
