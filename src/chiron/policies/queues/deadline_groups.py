"""The order of batch requests in the global queue: by request group, earliest deadline first.

A group is the batch requests whose deadlines share a span. Inside one, interrupted work goes first, then first come,
first served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Final

from chiron.core.types import Request

BATCH_PATIENCE_S: Final = 24 * 3600.0
"""A batch request without a deadline is ordered as if it had this one, so that it is never starved for ever."""


def batch_due_s(request: Request) -> float:
    """The deadline that orders a batch request."""
    return min(request.deadline_s, request.arrival_s + BATCH_PATIENCE_S)


_Bands = dict[int, deque[tuple[int, Request]]]
"""Requests by the bits of their prompt's length, with the number in which they came: the first of each length that
matters is found without a look at those before it."""


class _Group:
    __slots__ = ("fresh", "resumed")

    def __init__(self) -> None:
        self.fresh: _Bands = {}
        self.resumed: _Bands = {}

    def head(self, below: int) -> Request | None:
        """The first among prompts of fewer bits than ``below``; interrupted work before fresh."""
        return (_first(self.resumed, below) if self.resumed else None) or _first(self.fresh, below)

    def pop(self, request: Request) -> bool:
        """Take it out if it is the first of its length."""
        bits = request.input_tokens.bit_length()
        for bands in (self.resumed, self.fresh):
            band = bands.get(bits)
            if band and band[0][1] is request:
                band.popleft()
                return True
        return False


def _first(bands: _Bands, below: int) -> Request | None:
    best: tuple[int, Request] | None = None
    for bits in [bits for bits in bands if bits < below]:
        band = bands[bits]
        while band and band[0][1].outcome is not None:
            band.popleft()
        if not band:
            del bands[bits]
        elif best is None or band[0][0] < best[0]:
            best = band[0]
    return None if best is None else best[1]


class DeadlineGroups:
    """Implements ``policies.policy.BatchOrder``.

    With ``shortest_s`` (by class name: the least time that a request takes), one that cannot be done by its deadline
    any more waits behind all that can, but for every twentieth turn: what is lost takes nothing from what is not.
    """

    LATE_TURN: Final = 20
    BITS_MAX: Final = 64
    GROUPS_SEARCHED: Final = 8
    """Groups that are looked through for a shorter prompt than the head's."""

    def __init__(self, span_s: float, shortest_s: Callable[[str], float] | None = None) -> None:
        self._span_s = span_s
        self._shortest_s = shortest_s
        self._groups: dict[int, _Group] = {}
        """Those that may have requests that are not late."""
        self._keys: list[int] = []
        """The heap of their keys."""
        self._late: deque[Request] = deque()
        self._turn = 0
        self._sequence = 0

    def __iter__(self) -> Iterator[Request]:
        for key in sorted(self._groups):
            group = self._groups[key]
            for bands in (group.resumed, group.fresh):
                entries = sorted((entry for band in bands.values() for entry in band), key=lambda entry: entry[0])
                yield from (request for _, request in entries if request.outcome is None)
        yield from (request for request in self._late if request.outcome is None)

    def add(self, request: Request, now_s: float) -> None:
        key = self._key(request)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
            heappush(self._keys, key)
        bands = group.resumed if request.evictions or request.tokens_done else group.fresh
        self._sequence += 1
        bands.setdefault(request.input_tokens.bit_length(), deque()).append((self._sequence, request))

    def forget(self, request: Request) -> None:
        """Nothing to do: it is seen to have ended."""

    def head(self, now_s: float) -> Request | None:
        return self._head(now_s, self.BITS_MAX)

    def shorter(self, now_s: float, tokens: int) -> Request | None:
        """Prompts count as shorter when their lengths have fewer bits."""
        return self._head(now_s, tokens.bit_length())

    def remove_head(self, request: Request, now_s: float) -> None:
        group = self._groups.get(self._key(request))
        if group is not None and group.pop(request):
            self._turn += 1
        else:
            assert self._late[0] is request
            self._late.popleft()
            self._turn = 0

    def only_lost(self) -> bool:
        return not self._groups

    def _key(self, request: Request) -> int:
        return int(batch_due_s(request) // self._span_s)

    def _head(self, now_s: float, below: int) -> Request | None:
        """Whose turn it is among prompts of fewer bits than ``below``."""
        if self._turn >= self.LATE_TURN and (late := self._late_head(below)) is not None:
            return late
        while self._keys:
            group = self._groups[self._keys[0]]
            request = self._punctual(group, now_s, below)
            if request is not None:
                return request
            if below < self.BITS_MAX and group.head(self.BITS_MAX) is not None:
                return self._search(now_s, below) or self._late_head(below)
            del self._groups[heappop(self._keys)]
        return self._late_head(below)

    def _late_head(self, below: int) -> Request | None:
        while self._late and self._late[0].outcome is not None:
            self._late.popleft()
        return self._late[0] if self._late and self._late[0].input_tokens.bit_length() < below else None

    def _search(self, now_s: float, below: int) -> Request | None:
        for key in sorted(self._keys)[1 : self.GROUPS_SEARCHED]:
            request = self._punctual(self._groups[key], now_s, below)
            if request is not None:
                return request
        return None

    def _punctual(self, group: _Group, now_s: float, below: int) -> Request | None:
        """The group's head, once those that are late have been put aside."""
        shortest_s = self._shortest_s
        while (request := group.head(below)) is not None:
            if shortest_s is None or request.deadline_s >= now_s + shortest_s(request.class_name):
                return request
            group.pop(request)
            self._late.append(request)
        return None
