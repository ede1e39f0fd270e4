"""Sleepers of a modelled fleet: instances that left their GPUs and kept process and weights in host memory.

Where nodes have a size, each has host memory of its own, and a sleeper wakes on the node where it fell asleep, if GPUs
are free there. Engines of today are bound even to the very GPUs, which the model leaves out. Without, one pool of host
memory stands for that of all nodes, and a sleeper wakes on any free GPUs of its type: what that shows needs a copy of
each model wherever it may have to wake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, InstanceKind
from chiron.fleet.bill import Bill
from chiron.fleet.host_memory import giving_way
from chiron.fleet.places_model import Node, Places


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """Whether instances can sleep, and what that takes."""

    host_memory_gb: float = 0.0
    """Host memory for sleepers, of all nodes together, in GB (1e9 bytes); of each node where they have a size. 0: no
    instance sleeps."""
    gpus_per_node: int = 0
    """Size of a node: a sleeper takes memory of the node where it fell asleep, and wakes only there. 0: all nodes are
    one."""
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
        if self.gpus_per_node < 0:
            raise ValueError(f"gpus_per_node is {self.gpus_per_node}; it must be 0 or more")
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
        on_a_node = not self.gpus_per_node or kind.gpus <= self.gpus_per_node
        return kind.pipeline is None and on_a_node and self.gb(kind) <= self.host_memory_gb

    def waking_s(self, kind: InstanceKind) -> float:
        return self.wake_s + kind.weight_bytes / (self.wake_gb_per_s * 1e9)


@dataclass(frozen=True, slots=True)
class Sleeper:
    kind: InstanceKind
    model: str
    since_s: float
    node: Node | None
    """None: all nodes are one."""


class SleepersModel:
    """What sleeps, and the bill for its memory."""

    def __init__(self, clock: VirtualClock, sleep: Sleep, bill: Bill) -> None:
        self._clock = clock
        self._sleep = sleep
        self._bill = bill
        self._asleep: list[Sleeper] = []
        """Earliest first."""

    def gb(self) -> Mapping[Node | None, float]:
        """In use, by node."""
        used: dict[Node | None, float] = {}
        for each in self._asleep:
            used[each.node] = used.get(each.node, 0.0) + self._sleep.gb(each.kind)
        return used

    def counts(self) -> Mapping[str, int]:
        """By name of the kind."""
        return _counts(self._asleep)

    def add(self, instance: Instance, node: Node | None = None) -> bool:
        """This instance sleeps from now on. False: there is no memory for it on its node. Kinds that have more asleep
        there than its own give way."""
        kind = instance.kind
        needed_gb = self._sleep.gb(kind)
        if not self._sleep.holds(kind):
            return False
        there = [each for each in self._asleep if each.node == node]
        gone = giving_way(
            kind.name,
            needed_gb,
            counts=_counts(there),
            sizes_gb={each.kind.name: self._sleep.gb(each.kind) for each in there},
            used_gb=sum(self._sleep.gb(each.kind) for each in there),
            memory_gb=self._sleep.host_memory_gb,
        )
        if gone is None:
            return False
        for name in gone:
            self._take(name, lambda each: each.node == node)
        self._asleep.append(Sleeper(kind, instance.model, self._clock.now_s, node))
        return True

    def wake(self, kind: InstanceKind, places: Places | None) -> Sleeper | None:
        """The latest of a kind that can wake now sleeps no longer. None: none can."""
        return self._take(
            kind.name, lambda each: places is None or each.node is None or places.free(each.node) >= kind.gpus
        )

    def _take(self, kind: str, able: Callable[[Sleeper], bool]) -> Sleeper | None:
        for number in range(len(self._asleep) - 1, -1, -1):
            each = self._asleep[number]
            if each.kind.name == kind and able(each):
                del self._asleep[number]
                gb, seconds = self._sleep.gb(each.kind), self._clock.now_s - each.since_s
                self._bill.count_memory(each.model, gb, self._sleep.price_per_gb_hour, seconds)
                return each
        return None

    def keep(self, kind: str, most: int) -> None:
        """The latest are stopped beyond so many."""
        while self.counts().get(kind, 0) > most:
            self._take(kind, lambda each: True)

    def close(self) -> None:
        """End every bill that is still open, at now."""
        for kind in self.counts():
            self.keep(kind, 0)


def _counts(asleep: Sequence[Sleeper]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in asleep:
        counts[each.kind.name] = counts.get(each.kind.name, 0) + 1
    return counts
