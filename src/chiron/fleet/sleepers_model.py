"""Sleepers of a modelled fleet: instances that left their GPUs and kept process and weights in host memory.

One pool of host memory stands for that of all nodes, and a sleeper wakes on any free GPUs of its type. Engines of today
are bound to the GPUs on which they fell asleep, which the model leaves out: what it shows needs a copy of each model
wherever it may have to wake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, InstanceKind
from chiron.fleet.bill import Bill


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """Whether instances can sleep, and what that takes."""

    host_memory_gb: float = 0.0
    """Host memory for sleepers, of all nodes together, in GB (1e9 bytes). 0: no instance sleeps."""
    sleeper_gb: float | None = None
    """What one sleeper takes of it; None: its weights."""
    fall_asleep_s: float = 5.0
    """From drained to its GPUs being free. Billed."""
    wake_s: float = 5.0
    """From free GPUs to ready, besides what the weights take at ``wake_gb_per_s``. Billed. vLLM's users
    report 1.45 to 5.09 s, for which 61 to 75 GiB of host memory stay taken."""
    wake_gb_per_s: float = inf
    """How fast weights come back from host memory, in GB/s; ``inf``: ``wake_s`` is all of it."""
    price_per_gb_hour: float = 0.0
    """Of the host memory that sleepers take."""

    def __post_init__(self) -> None:
        for name in ("host_memory_gb", "fall_asleep_s", "wake_s", "price_per_gb_hour"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more, and finite")
        if not self.wake_gb_per_s > 0:
            raise ValueError(f"wake_gb_per_s is {self.wake_gb_per_s}; it must be above 0")
        if self.sleeper_gb is not None and not 0 < self.sleeper_gb < inf:
            raise ValueError(f"sleeper_gb is {self.sleeper_gb}; it must be above 0, and finite")

    def gb(self, kind: InstanceKind) -> float:
        """What a sleeper of this kind takes. 0: not known."""
        return self.sleeper_gb if self.sleeper_gb is not None else kind.weight_bytes / 1e9

    def holds(self, kind: InstanceKind) -> bool:
        """Whether an instance of this kind can sleep at all."""
        return kind.pipeline is None and self.gb(kind) <= self.host_memory_gb

    def waking_s(self, kind: InstanceKind) -> float:
        return self.wake_s + kind.weight_bytes / (self.wake_gb_per_s * 1e9)


@dataclass(frozen=True, slots=True)
class _Sleeper:
    kind: InstanceKind
    model: str
    since_s: float


class SleepersModel:
    """What sleeps, and the bill for its memory."""

    def __init__(self, clock: VirtualClock, sleep: Sleep, bill: Bill) -> None:
        self._clock = clock
        self._sleep = sleep
        self._bill = bill
        self._asleep: list[_Sleeper] = []
        """Earliest first."""

    @property
    def gb(self) -> float:
        """In use."""
        return sum(self._sleep.gb(each.kind) for each in self._asleep)

    def counts(self) -> Mapping[str, int]:
        """By name of the kind."""
        counts: dict[str, int] = {}
        for each in self._asleep:
            counts[each.kind.name] = counts.get(each.kind.name, 0) + 1
        return counts

    def add(self, instance: Instance) -> bool:
        """This instance sleeps from now on. False: there is no memory for it. Kinds that have more asleep than its own
        give way."""
        kind = instance.kind
        needed_gb = self._sleep.gb(kind)
        if not self._sleep.holds(kind):
            return False
        counts, used_gb, gone = dict(self.counts()), self.gb, []
        sizes_gb = {each.kind.name: self._sleep.gb(each.kind) for each in self._asleep}
        while used_gb + needed_gb > self._sleep.host_memory_gb * (1.0 + 1e-9):
            most = max(counts, key=lambda name: (counts[name], name))
            if counts[most] <= counts.get(kind.name, 0) + 1:
                return False
            gone.append(most)
            counts[most] -= 1
            used_gb -= sizes_gb[most]
        for name in gone:
            self.take(name)
        self._asleep.append(_Sleeper(kind, instance.model, self._clock.now_s))
        return True

    def take(self, kind: str) -> bool:
        """The latest of a kind sleeps no longer: it wakes, or is stopped. False: there is none."""
        for number in range(len(self._asleep) - 1, -1, -1):
            each = self._asleep[number]
            if each.kind.name == kind:
                del self._asleep[number]
                gb, seconds = self._sleep.gb(each.kind), self._clock.now_s - each.since_s
                self._bill.count_memory(each.model, gb, self._sleep.price_per_gb_hour, seconds)
                return True
        return False

    def keep(self, kind: str, most: int) -> None:
        while self.counts().get(kind, 0) > most:
            self.take(kind)

    def close(self) -> None:
        """End every bill that is still open, at now."""
        for kind in self.counts():
            self.keep(kind, 0)
