"""What tests of real fleets share: stub engines, a listener that remembers, and waiting with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from child_processes import children
from chiron.core.types import Instance, InstanceKind
from chiron.fleet.health import HealthSettings
from chiron.fleet.port import FleetEnvironment
from chiron.fleet.process.fleet import ProcessFleet, ProcessSource
from chiron.fleet.process.sleepers import SleepSource
from chiron.fleet.settings import FleetSettings, SleeperSettings
from chiron.fleet.starts import BackoffSettings, StartStatus
from chiron.net.clock import LiveClock

STUB = (sys.executable, "-I", "-S", str(Path(__file__).with_name("engine_stub.py")))

QUICK_HEALTH = HealthSettings(
    health_period_s=0.1, health_timeout_s=60.0, suspect_period_s=0.02, poll_first_s=0.02, poll_max_s=0.1
)
"""Quick to ask, patient with the answer: a busy machine may hold up a sound stub for seconds."""


def quick_settings(**backoff: float) -> FleetSettings:
    given = {"backoff_first_s": 0.1, "backoff_max_s": 0.4, "stable_after_s": 0.3, "start_wait_s": 60.0, **backoff}
    return FleetSettings(
        health=QUICK_HEALTH,
        backoff=BackoffSettings(**given),  # type: ignore[arg-type]
        usage_period_s=0.1,
        logs_kept=6,
    )


def stub_kind(*switches: str, port: str | None = "{port}", **values: object) -> ProcessSource:
    """A stub as a process kind; ``port=None``: it chooses one and prints the ready line."""
    ports = ("--port", port) if port else ("--announce",)
    return ProcessSource(command=(*STUB, *ports, *switches), **{"stop_timeout_s": 2.0, **values})  # type: ignore[arg-type]


SLEEP = SleepSource(gb=10.0, sleep_path="/sleep?level=1", wake_path="/wake_up", asleep_path="/is_sleeping")


def sleeping_kind(*switches: str, gb: float = SLEEP.gb, **values: object) -> ProcessSource:
    return stub_kind("--sleeps", *switches, sleep=replace(SLEEP, gb=gb), **values)


def an_instance(number: int, kind: str = "stub", model: str = "org/model") -> Instance:
    shape = InstanceKind(name=kind, gpu="none", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=1000, max_num_seqs=8)
    return Instance(number, model, shape, "mixed", 0.0)


class Heard:
    """Hears what a fleet tells. Every call must come inside a post of the clock."""

    def __init__(self, clock: LiveClock) -> None:
        self.ready: list[int] = []
        self.failed: list[int] = []
        self.leaving: list[int] = []
        self.asleep: list[int] = []
        self.sleepers: dict[str, int] = {}
        self.urls: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.clock = clock

    def instance_ready(self, instance: Instance, url: str) -> None:
        assert self.clock._posting
        instance.state = "ready"
        self.ready.append(instance.id)
        self.urls[instance.id] = url

    def instance_leaving(self, instance: Instance, reason: str) -> None:
        assert self.clock._posting
        self.leaving.append(instance.id)
        self.reasons[instance.id] = reason

    def instance_asleep(self, instance: Instance) -> None:
        assert self.clock._posting
        instance.state = "gone"
        self.asleep.append(instance.id)

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        assert self.clock._posting
        self.sleepers = dict(asleep)

    def instance_failed(self, instance: Instance, reason: str) -> None:
        assert self.clock._posting
        instance.state = "gone"
        self.failed.append(instance.id)
        self.reasons[instance.id] = reason


def starts_of(fleet: ProcessFleet, kind: str = "stub") -> StartStatus:
    starts = fleet.report().kinds[kind].starts
    assert starts is not None
    return starts


@contextlib.asynccontextmanager
async def local_fleet(
    directory: Path,
    kinds: dict[str, ProcessSource],
    settings: FleetSettings | None = None,
    devices: tuple[str, ...] = (),
    sleepers: SleeperSettings | None = None,
) -> AsyncIterator[tuple[ProcessFleet, Heard]]:
    clock = LiveClock(asyncio.get_running_loop())
    heard = Heard(clock)
    environment = FleetEnvironment(
        clock=clock,
        events=heard,
        log_directory=directory,
        settings=settings or quick_settings(),
        devices=devices,
        sleepers=sleepers or SleeperSettings(),
    )
    fleet = ProcessFleet(kinds, environment)
    try:
        yield fleet, heard
    finally:
        await fleet.close()
        clock.stop()
        assert not children(), "the fleet left processes or zombies behind"


async def until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Poll; a failure names ``what`` was waited for."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


def until_sync(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def pid_in(path: Path) -> int:
    """The process id that a stub wrote; 0 until then."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def engines_below(pid: int) -> Iterator[psutil.Process]:
    """The stub processes below a process."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "engine_stub.py" in " ".join(process.cmdline()) and "supervisor.py" not in " ".join(process.cmdline()):
                yield process


def kill(pid: int, number: int = 9) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
