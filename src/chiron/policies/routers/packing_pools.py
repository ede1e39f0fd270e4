"""Heaps of the packing router, for each kind of instance by itself.

A prompt that only a larger kind has room for does not look at the instances of a smaller one, however many have room;
nor does one that may go to smaller ones only look at the larger.
"""

from __future__ import annotations

from chiron.core.types import Instance, Request

Passed = tuple[list[int], int]
"""A heap, and an entry that was taken off it and goes back."""


class Pool:
    """The instances of one kind, by their places in the packing order."""

    __slots__ = ("batch", "capacities", "interactive", "kv_tokens", "short", "short_max", "victims")

    def __init__(self) -> None:
        self.capacities: dict[int, int] = {}
        """How many of those that take work have so large a KV cache."""
        self.kv_tokens = 0
        """The largest of these; 0: none takes work."""
        self.interactive: list[int] = []
        """Those that may have room for interactive requests."""
        self.batch: list[int] = []
        """Those that may have room for batch requests. Negative: the last of them comes first."""
        self.short: list[tuple[float, int, Instance]] = []
        """Those that have refused a long batch prompt and may take a shorter one, the longest first; back in ``batch``
        when they change."""
        self.short_max = 64
        self.victims: list[int] = []
        """Those that run batch work."""


class Note:
    """The router's note about an instance (``Instance.index``)."""

    __slots__ = ("in_batch", "in_interactive", "in_victims", "kv_tokens", "last", "open", "pool", "short_s")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.kv_tokens = 0
        """Its KV capacity, as its pool counts it; 0: it takes no work."""
        self.open = True
        self.in_interactive = False
        self.in_batch = False
        self.in_victims = False
        self.last = 0
        """Number of its last change, of those that ``LeastLoaded`` was told of."""
        self.short_s = 0.0
        """Prefill of the longest batch prompt that it would take, once it has refused a longer one."""

    def measured(self, kv_tokens: int) -> None:
        """It has so large a KV cache, as far as is known now; 0: it takes no work any more."""
        counts = self.pool.capacities
        if self.kv_tokens:
            counts[self.kv_tokens] -= 1
            if not counts[self.kv_tokens]:
                del counts[self.kv_tokens]
        if kv_tokens:
            counts[kv_tokens] = counts.get(kv_tokens, 0) + 1
        self.kv_tokens = kv_tokens
        self.pool.kv_tokens = max(counts, default=0)


class Pools:
    """Of some kinds, one for each: their heaps, in the same order everywhere."""

    __slots__ = ("all", "batch", "interactive", "short", "victims")

    def __init__(self) -> None:
        self.all: list[Pool] = []
        self.interactive: list[list[int]] = []
        self.batch: list[list[int]] = []
        self.short: list[list[tuple[float, int, Instance]]] = []
        self.victims: list[list[int]] = []

    def add(self, pool: Pool) -> None:
        self.all.append(pool)
        self.interactive.append(pool.interactive)
        self.batch.append(pool.batch)
        self.short.append(pool.short)
        self.victims.append(pool.victims)

    def for_prompt(self, request: Request, tokens: int) -> Pools:
        """Those that may have an instance with room for so long a prompt, and are not kept for longer ones."""
        most = request.kv_most_tokens
        if len(self.all) == 1 and tokens < self.all[0].kv_tokens <= most:
            return self
        found = Pools()
        for pool in self.all:
            if any(tokens < kv_tokens <= most for kv_tokens in pool.capacities):
                found.add(pool)
        return found


def lowest(heaps: list[list[int]]) -> list[int]:
    """The heap whose first entry is the lowest; an empty one if all are."""
    if len(heaps) == 1:
        return heaps[0]
    found: list[int] = []
    for heap in heaps:
        if heap and (not found or heap[0] < found[0]):
            found = heap
    return found


def lowest_short(heaps: list[list[tuple[float, int, Instance]]]) -> list[tuple[float, int, Instance]]:
    """Likewise, of those that may take a shorter prompt."""
    found: list[tuple[float, int, Instance]] = []
    for heap in heaps:
        if heap and (not found or heap[0] < found[0]):
            found = heap
    return found
