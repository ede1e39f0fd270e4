"""Queues of one model: requests that found no room, and batch requests in groups by deadline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from heapq import heappop, heappush
from math import inf
from typing import Final

from chiron.core.types import Request
from chiron.policies.policy import Order
from chiron.policies.views import GroupView

BATCH_PATIENCE_S = 24 * 3600.0
"""A batch request without a deadline is ordered as if it had this one, so that it is never starved for ever."""


class WaitingQueue:
    """Requests that found no room: counted here, ordered by the policy's ``Order``."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.count = 0
        self.interactive = 0
        self.flex = 0
        """Of those counted; the rest are items of jobs, under policies that hold no batch work back."""
        self.input_tokens = 0
        self.input_square = 0.0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Request]:
        return iter(self.order)

    def add(self, request: Request, now_s: float) -> None:
        self.order.add(request, now_s)
        self._count(request, 1)

    def forget(self, request: Request) -> None:
        """It ended while it was queued: counted no more, dropped when it surfaces."""
        self.order.forget(request)
        self._count(request, -1)

    def head(self, now_s: float) -> Request | None:
        """Whose turn it is; stays queued until ``remove_head``."""
        return self.order.head(now_s) if self.count else None

    def remove_head(self, request: Request, now_s: float) -> None:
        """Take out what ``head`` returned."""
        self.order.remove_head(request, now_s)
        self._count(request, -1)

    def _count(self, request: Request, sign: int) -> None:
        self.count += sign
        self.interactive += sign * request.interactive
        self.flex += sign * request.flex
        self.input_tokens += sign * request.input_tokens
        self.input_square += sign * float(request.input_tokens) ** 2


_Bands = dict[int, deque[tuple[int, Request]]]
"""Requests by the bits of their prompt's length, with the number in which they came: the first of each length that
matters is found without a look at those before it."""


class _Group:
    __slots__ = (
        "class_counts",
        "count",
        "deadline_s",
        "done_tokens",
        "fresh",
        "input_square",
        "input_tokens",
        "ordered",
        "resumed",
    )

    def __init__(self) -> None:
        self.fresh: _Bands = {}
        self.resumed: _Bands = {}
        self.ordered = False
        """It is among the groups in order; not while all it has left is late."""
        self.deadline_s = inf
        self.count = 0
        self.input_tokens = 0
        self.input_square = 0.0
        self.done_tokens = 0
        self.class_counts: dict[str, int] = {}

    def __len__(self) -> int:
        return self.count

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


class BatchQueue:
    """Request groups, earliest deadline first; inside a group first come first served, interrupted work first.

    With ``defers_late``, a request that cannot be done by its deadline any more (it is due within ``shortest_s`` of its
    class) waits behind all that can, but for every twentieth turn: what is lost takes nothing from what is not.
    """

    LATE_TURN: Final = 20
    BITS_MAX: Final = 64
    GROUPS_SEARCHED: Final = 8
    """Groups that are looked through for a shorter prompt than the head's."""

    def __init__(
        self,
        group_span_s: float,
        *,
        defers_late: bool = False,
        shortest_s: Callable[[str], float] = lambda name: 0.0,
    ) -> None:
        self._span_s = group_span_s
        self._defers_late = defers_late
        self._shortest_s = shortest_s
        self._groups: dict[int, _Group] = {}
        self._order: list[int] = []
        self._late: deque[Request] = deque()
        self._turn = 0
        self._sequence = 0
        self._announced: dict[int, _Group] = {}
        self.count = 0
        self.flex = 0
        """Of those counted; the rest are items of jobs."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Request]:
        for key in sorted(self._groups):
            group = self._groups[key]
            for bands in (group.resumed, group.fresh):
                entries = sorted((entry for band in bands.values() for entry in band), key=lambda entry: entry[0])
                yield from (request for _, request in entries if request.outcome is None)
        yield from (request for request in self._late if request.outcome is None)

    def add(self, request: Request) -> None:
        deadline_s = _order_s(request)
        key = self._key(request)
        group = self._groups.setdefault(key, _Group())
        if not group.ordered:
            group.ordered = True
            heappush(self._order, key)
        group.deadline_s = min(group.deadline_s, deadline_s)
        bands = group.resumed if request.evictions or request.tokens_done else group.fresh
        self._sequence += 1
        bands.setdefault(request.input_tokens.bit_length(), deque()).append((self._sequence, request))
        self._count(group, request, 1)

    def _key(self, request: Request) -> int:
        return int(_order_s(request) // self._span_s)

    def announce(self, deadline_s: float, name: str, requests: int, input_tokens: int, input_square: float) -> None:
        """Count work of class ``name`` that waits elsewhere, to be added later; negative figures take it off again.

        A job may have more requests than fit in memory: planners must know of all of them, dispatch only of the next.
        """
        key = int(deadline_s // self._span_s)
        group = self._announced.setdefault(key, _Group())
        group.deadline_s = min(group.deadline_s, deadline_s)
        group.count += requests
        group.input_tokens += input_tokens
        group.input_square += input_square
        group.class_counts[name] = group.class_counts.get(name, 0) + requests
        if group.count <= 0:
            del self._announced[key]

    @property
    def announced(self) -> int:
        """Requests that wait elsewhere."""
        return sum(group.count for group in self._announced.values())

    def forget(self, request: Request) -> None:
        """It ended while it was queued: counted no more, dropped when it surfaces."""
        self._count(self._groups[self._key(request)], request, -1)

    def head(self, now_s: float, below: int = BITS_MAX) -> Request | None:
        """Whose turn it is among prompts of fewer bits than ``below``; it stays queued until ``remove_head``."""
        if self._turn >= self.LATE_TURN and (late := self._late_head(below)) is not None:
            return late
        while self._order:
            group = self._groups[self._order[0]]
            request = self._punctual(group, now_s, below)
            if request is not None:
                return request
            if below < self.BITS_MAX and group.head(self.BITS_MAX) is not None:
                return self._search(now_s, below) or self._late_head(below)
            group.ordered = False
            self._drop(heappop(self._order))
        return self._late_head(below)

    def _late_head(self, below: int) -> Request | None:
        while self._late and self._late[0].outcome is not None:
            self._late.popleft()
        return self._late[0] if self._late and self._late[0].input_tokens.bit_length() < below else None

    def _search(self, now_s: float, below: int) -> Request | None:
        for key in sorted(self._order)[1 : self.GROUPS_SEARCHED]:
            request = self._punctual(self._groups[key], now_s, below)
            if request is not None:
                return request
        return None

    def _punctual(self, group: _Group, now_s: float, below: int) -> Request | None:
        """The group's head, once those that are late have been put aside."""
        while (request := group.head(below)) is not None:
            if not self._defers_late or request.deadline_s >= now_s + self._shortest_s(request.cls.name):
                return request
            group.pop(request)
            self._late.append(request)
        return None

    def remove_head(self, request: Request) -> None:
        """Take out what ``head`` returned."""
        key = self._key(request)
        group = self._groups[key]
        self._count(group, request, -1)
        if group.pop(request):
            self._turn += 1
        else:
            assert self._late[0] is request
            self._late.popleft()
            self._turn = 0
            self._drop(key)

    def _drop(self, key: int) -> None:
        """Forget a group that has nothing left."""
        group = self._groups.get(key)
        if group is not None and not group.ordered and group.count <= 0:
            del self._groups[key]

    def views(self, expected_output: Mapping[str, float], limit: int = 64) -> tuple[GroupView, ...]:
        """The groups, earliest first; those past ``limit`` are merged into the last one."""
        merged: list[_Group] = []
        views: list[GroupView] = []
        for key in sorted(self._groups.keys() | self._announced.keys()):
            parts = [
                group for groups in (self._groups, self._announced) if (group := groups.get(key)) and group.count > 0
            ]
            if not parts:
                continue
            if len(views) < limit - 1:
                views.append(_view(parts, expected_output))
            else:
                merged.extend(parts)
        if merged:
            views.append(_view(merged, expected_output))
        return tuple(views)

    def _count(self, group: _Group, request: Request, sign: int) -> None:
        self.count += sign
        self.flex += sign * request.flex
        group.count += sign
        group.input_tokens += sign * request.input_tokens
        group.input_square += sign * float(request.input_tokens) ** 2
        group.done_tokens += sign * request.tokens_done
        name = request.cls.name
        group.class_counts[name] = group.class_counts.get(name, 0) + sign


def _order_s(request: Request) -> float:
    """The deadline that orders it."""
    return min(request.deadline_s, request.arrival_s + BATCH_PATIENCE_S)


def _view(groups: list[_Group], expected_output: Mapping[str, float]) -> GroupView:
    output = sum(count * expected_output[name] for g in groups for name, count in g.class_counts.items())
    requests = sum(len(g) for g in groups)
    return GroupView(
        deadline_s=min(g.deadline_s for g in groups),
        requests=requests,
        input_tokens=float(sum(g.input_tokens for g in groups)),
        input_square=sum(g.input_square for g in groups),
        output_tokens=max(float(requests), output - sum(g.done_tokens for g in groups)),
    )
