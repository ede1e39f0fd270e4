"""Least-score routing over a lazy heap: the base that most rivals' routers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from chiron.core.types import Instance, Placement, Request
from chiron.policies.policy import Estimates
from chiron.policies.size import placed


class _Note:
    __slots__ = ("open", "version")

    def __init__(self) -> None:
        self.open = True
        self.version = 0


class LeastRouter:
    """Sends each request, whatever its class, to the ready instance with the least score; ties to the older one.

    A score may depend on the instance's own counters only. Each change pushes a new entry; stale ones are dropped
    when they surface, and all together once they are most of the heap: O(log n) a change, amortised.
    """

    def __init__(self, estimates: Estimates, score: Callable[[Instance], float]) -> None:
        self.room_tokens = 0
        self._estimates = estimates
        self._score = score
        self._heap: list[tuple[float, int, int, Instance]] = []
        self._heap_max = 64

    def add(self, instance: Instance) -> None:
        if instance.index is None:
            instance.index = _Note()
        instance.index.open = True
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        instance.index.open = False
        instance.index.version += 1

    def changed(self, instance: Instance) -> None:
        note: _Note = instance.index
        if note.open:
            note.version += 1
            heappush(self._heap, (self._score(instance), instance.id, note.version, instance))
            if len(self._heap) > self._heap_max:
                self._heap = [entry for entry in self._heap if entry[2] == entry[3].index.version]
                heapify(self._heap)
                self._heap_max = 64 + 2 * len(self._heap)

    def place(self, request: Request, waited_s: float) -> Placement | None:
        heap = self._heap
        too_small: list[tuple[float, int, int, Instance]] = []
        chosen: Instance | None = None
        while heap and chosen is None:
            instance = heap[0][3]
            note: _Note = instance.index
            if not note.open or heap[0][2] != note.version:
                heappop(heap)
            elif request.input_tokens >= instance.kv_capacity_tokens:
                too_small.append(heappop(heap))
            else:
                chosen = instance
        for entry in too_small:
            heappush(heap, entry)
        return None if chosen is None else placed(self._estimates, request, chosen)

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()
