"""Waiting requests by a fixed key: earliest TTFT deadline first, unless a policy brings another key or order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from math import inf

from chiron.core.types import Request


def first_token_due_s(request: Request) -> float:
    return request.arrival_s + request.ttft_slo_s


class KeyOrder:
    """Least key first, then by number; implements ``policies.policy.Order`` and ``BatchOrder``. A key must not change
    while its request waits. Ended requests are dropped when they surface."""

    def __init__(self, key: Callable[[Request], float] = first_token_due_s) -> None:
        self._key = key
        self._heap: list[tuple[float, int, Request]] = []

    def __iter__(self) -> Iterator[Request]:
        yield from (entry[2] for entry in self._heap if entry[2].outcome is None)

    def add(self, request: Request, now_s: float) -> None:
        heappush(self._heap, (self._key(request), request.id, request))

    def forget(self, request: Request) -> None:
        """Nothing to do: it is seen to have ended."""

    def head(self, now_s: float) -> Request | None:
        heap = self._heap
        while heap and heap[0][2].outcome is not None:
            heappop(heap)
        return heap[0][2] if heap else None

    def shorter(self, now_s: float, tokens: int) -> Request | None:
        """Nobody passes the head."""
        return None

    def remove_head(self, request: Request, now_s: float) -> None:
        assert self._heap[0][2] is request
        heappop(self._heap)

    def never_ran(self, request: Request) -> None:
        """Nothing to do: nobody is charged."""

    def only_lost(self) -> bool:
        """It does not know."""
        return False

    def lost(self) -> Request | None:
        return None

    def oldest_arrival_s(self) -> float:
        if self._key is first_token_due_s:  # Of one class the head is the oldest; of several, near enough.
            head = self.head(0.0)
            return inf if head is None else head.arrival_s
        return min((request.arrival_s for request in self), default=inf)
