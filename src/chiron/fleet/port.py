"""What the gateway asks of a fleet, whatever its instances come from, and what a fleet says of them.

A fleet is made with its sources by kind of instance and an environment, and is used on the loop's thread. Each kind of
fleet is one file, and one member of the union in ``fleet.union``; tests hold every one of them to the same contract:

- ``create`` answers later, inside a post of the clock: ``instance_ready`` with an address that answers, or
  ``instance_failed`` with the reason. An instance that was ready may fail afterwards. After a failure or a ``remove``
  nothing more is heard of it.
- ``remove`` and ``suspect`` are harmless at any time, also twice, and for instances that are gone.
- A fleet never replaces an instance by itself: the control plane decides how many there are.
- One that is about to be taken away by somebody else is announced (``instance_leaving``), so that it can be drained.
- When ``close`` returns, nothing of it is left on this machine; what runs elsewhere may be left to the next gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from chiron.core.types import Instance
from chiron.fleet.settings import FleetSettings, SleeperSettings
from chiron.fleet.starts import StartStatus
from chiron.net.clock import LiveClock


class LiveFleetEvents(Protocol):
    """The listener of instances. Called inside a post of the clock."""

    def instance_ready(self, instance: Instance, url: str) -> None:
        """It answers at this address (without a path)."""

    def instance_failed(self, instance: Instance, reason: str) -> None:
        """It could not be started, or is dead."""

    def instance_leaving(self, instance: Instance, reason: str) -> None:
        """One that is ready will be taken away soon by somebody else: nothing new should begin there. It may be told
        twice; ``instance_failed`` follows unless it is removed before."""

    def instance_asleep(self, instance: Instance) -> None:
        """One that was to sleep has left its GPUs, whether it sleeps or was stopped."""

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        """How many sleepers of each kind there are now, by name; none of a kind that is not named."""


@runtime_checkable
class LiveSleepers(Protocol):
    """A fleet with instances that can sleep, besides."""

    sleeping_kinds: frozenset[str]
    """Names of the kinds whose instances can."""

    def sleep(self, instance: Instance) -> None:
        """Put a drained instance to sleep, or stop it where that cannot be. Answered later by ``instance_asleep``, or
        by ``instance_failed``; nothing more is heard of it then. A later ``create`` of its kind may wake it."""

    def keep_asleep(self, kind: str, most: int) -> None:
        """Stop sleepers of a kind, by its name, beyond so many."""


class Memory(Protocol):
    """What gateways that replace each other share, wherever they run: named bytes."""

    async def load(self, name: str) -> bytes | None:
        """Once it can be read. None: nothing, or nothing that is whole."""

    async def save(self, name: str, data: bytes) -> None:
        """In place of what was there, once that is possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEnvironment:
    """What a fleet works with."""

    clock: LiveClock
    events: LiveFleetEvents
    log_directory: Path
    """For what engines print."""
    directory: Path | None = None
    """For what a fleet has to know at the next start; None: it forgets."""
    memory: Memory | None = None
    """For the same, where the next start may be another gateway's; None: it cannot be."""
    settings: FleetSettings = field(default_factory=FleetSettings)
    sleepers: SleeperSettings = field(default_factory=SleeperSettings)
    owner: Callable[[], str] = lambda: ""
    """Whose instances these are, the same for a gateway and for those that replace it: what one of them has left behind
    is the next one's. Empty: not known."""
    settle_s: float = 0.0
    """For so long at most a brain that follows another one waits to be told what runs."""
    grace_s: float = 0.0
    """For so long requests may go on that still run on what the config does not name any more."""
    advise: bool = False
    """Nothing is started, stopped or scaled; what runs is used."""
    noted: Callable[[str, str], None] = lambda kind, text: None
    """Hears what an operator should know of a kind of instance, by its name, when it begins."""
    why: Callable[[str], str] = lambda kind: ""
    """Why there should be as many of a kind as there should be, in words; empty: nobody knows yet."""
    devices: tuple[str, ...] = ()
    """GPUs of this machine to hand out, each to one instance at a time; empty: none are handed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why no instance of a kind comes now."""

    reason: str
    """For clients: without addresses, and without what engines print."""
    retry_s: float
    """Until there may be news; 0: the next start is a try."""
    outside: bool
    """What is wrong is not in Chiron's hands and may end by itself, such as an endpoint that restarts."""


EndpointState = Literal["free", "checking", "bound", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStatus:
    state: EndpointState
    """``checking``: an instance is about to be bound to it; ``failed``: it has yet to recover."""
    reason: str
    """Why the last check failed; empty if it passed or there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepStatus:
    """How one kind of instance sleeps and wakes. Totals are since the fleet was made."""

    asleep: int
    """Now."""
    memory_gb: float
    """Host memory that those take, as configured."""
    wakes: int
    """Starts that woke a sleeper."""
    failed_sleeps: int
    """Engines that were to sleep and did not: they were stopped."""
    failed_wakes: int
    """Sleepers that were to wake and did not: they were stopped, and another engine was started."""
    lost: int
    """Sleepers that died, or woke unasked."""
    reason: str
    """Of the last that went wrong; empty if none did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """How one kind of instance is doing."""

    trouble: Trouble | None = None
    """None: an instance of it may come."""
    instances_max: int | None = None
    """How many there can be now, where it is less than usual."""
    found: int = 0
    """Instances that run although nobody has asked for them, to be taken over: the next ``create`` gets one."""
    fewest: int = 0
    """Where somebody else sets the number: with fewer now, instances could be lost that are in use."""
    known: bool = True
    """What runs of it is known, and has been for long enough to be taken over."""
    notes: tuple[str, ...] = ()
    """What an operator should know now."""
    starts: StartStatus | None = None
    """Of kinds whose instances are started."""
    sleep: SleepStatus | None = None
    """Of kinds whose instances can sleep."""
    endpoints: Mapping[str, EndpointStatus] = field(default_factory=dict)
    """By URL, of kinds whose instances run already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceUsage:
    """What the machine says of one instance's processes."""

    cpu_share: float
    """Cores in use, averaged since the sample before: 1.0 is one core kept busy."""
    rss_bytes: int
    """Resident memory of its processes; pages that they share count in each."""
    pid: int
    restarts: int
    """Instances of its kind that have failed so far; each is replaced by a new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """A fleet as it is now."""

    kinds: Mapping[str, KindReport] = field(default_factory=dict)
    """By name of the kind of instance."""
    usage: Mapping[int, InstanceUsage] = field(default_factory=dict)
    """By instance id, as last sampled; of instances that run on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """To an instance that runs already."""

    begin: Callable[[Instance], None]
    """To be called, at once, with the record of an instance that is then watched as if it had been created here."""
    found: bool
    """It is known to be there: ``instance_ready`` is not told of it. False: nothing should begin there before
    ``instance_ready``, or ``instance_leaving`` comes, if it is not found."""


class LiveFleet(Protocol):
    """Creates, watches and removes instances."""

    def create(self, instance: Instance) -> None:
        """Answered by ``instance_ready`` or ``instance_failed``, later."""

    def remove(self, instance: Instance) -> None:
        """At any time, also while it starts."""

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it: check now, and fail it if it does not answer."""

    def adopt(self, kind: str, url: str) -> Claim | None:
        """An instance of this kind is said to answer at this address, from a gateway before this one. None: that cannot
        be, or it is in use."""

    def report(self) -> FleetReport: ...

    async def close(self, *, hands_over: bool = False) -> None:
        """Remove everything, side by side. ``hands_over``: another brain goes on with what runs, so what can outlive
        this process stays, whatever is configured for its end."""
