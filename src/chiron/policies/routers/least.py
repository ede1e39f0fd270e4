"""Least-score routing over a lazy heap: the base that most rivals' routers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from chiron.core.types import Instance, Placement, Request
from chiron.policies.policy import Estimates
from chiron.policies.routers.stale_entries import Changes, Entry, closed, current, opened
from chiron.policies.size import placed


class LeastRouter:
    """Sends each request, whatever its class, to the ready instance with the least score; ties to the older one.

    A score may depend on the instance's own counters only.
    """

    def __init__(self, estimates: Estimates, score: Callable[[Instance], float]) -> None:
        self.room_tokens = 0
        self._estimates = estimates
        self._score = score
        self._heap: list[Entry] = []
        self._heap_max = 64

    def add(self, instance: Instance) -> None:
        opened(instance)
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        closed(instance)

    def changed(self, instance: Instance) -> None:
        changes: Changes = instance.index
        if changes.open:
            changes.last += 1
            heappush(self._heap, (self._score(instance), instance.id, changes.last, instance))
            if len(self._heap) > self._heap_max:
                self._heap = current(self._heap)
                self._heap_max = 64 + 2 * len(self._heap)

    def place(self, request: Request, waited_s: float) -> Placement | None:
        heap = self._heap
        too_small: list[Entry] = []
        chosen: Instance | None = None
        while heap and chosen is None:
            instance = heap[0][3]
            changes: Changes = instance.index
            if heap[0][2] != changes.last:
                heappop(heap)
            elif not request.input_tokens < instance.kv_capacity_tokens <= request.kv_most_tokens:
                too_small.append(heappop(heap))
            else:
                chosen = instance
        for entry in too_small:
            heappush(heap, entry)
        return None if chosen is None else placed(self._estimates, request, chosen)

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()
