"""Queues of one model: requests that found no room, and batch requests in groups by deadline."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from math import inf

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


class _Group:
    __slots__ = (
        "class_counts",
        "count",
        "deadline_s",
        "done_tokens",
        "fresh",
        "input_square",
        "input_tokens",
        "resumed",
    )

    def __init__(self) -> None:
        self.fresh: deque[Request] = deque()
        self.resumed: deque[Request] = deque()
        self.deadline_s = inf
        self.count = 0
        self.input_tokens = 0
        self.input_square = 0.0
        self.done_tokens = 0
        self.class_counts: dict[str, int] = {}

    def __len__(self) -> int:
        return self.count


class BatchQueue:
    """Request groups, earliest deadline first; inside a group first come first served, interrupted work first."""

    def __init__(self, group_span_s: float) -> None:
        self._span_s = group_span_s
        self._groups: dict[int, _Group] = {}
        self._order: list[int] = []
        self._held: dict[int, _Group] = {}
        self.count = 0
        self.flex = 0
        """Of those counted; the rest are items of jobs."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Request]:
        for key in sorted(self._groups):
            group = self._groups[key]
            yield from (r for queue in (group.resumed, group.fresh) for r in queue if r.outcome is None)

    def add(self, request: Request) -> None:
        deadline_s = _order_s(request)
        key = int(deadline_s // self._span_s)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
            heappush(self._order, key)
        group.deadline_s = min(group.deadline_s, deadline_s)
        if request.evictions or request.tokens_done:
            group.resumed.append(request)
        else:
            group.fresh.append(request)
        self._count(group, request, 1)

    def hold(self, deadline_s: float, name: str, requests: int, input_tokens: int, input_square: float) -> None:
        """Count work of class ``name`` that waits elsewhere, to be added later; negative figures take it off again.

        A job may have more requests than fit in memory: planners must know of all of them, dispatch only of the next.
        """
        key = int(deadline_s // self._span_s)
        group = self._held.setdefault(key, _Group())
        group.deadline_s = min(group.deadline_s, deadline_s)
        group.count += requests
        group.input_tokens += input_tokens
        group.input_square += input_square
        group.class_counts[name] = group.class_counts.get(name, 0) + requests
        if group.count <= 0:
            del self._held[key]

    @property
    def held(self) -> int:
        """Requests that wait elsewhere."""
        return sum(group.count for group in self._held.values())

    def forget(self, request: Request) -> None:
        """It ended while it was queued: counted no more, dropped when it surfaces."""
        self._count(self._groups[int(_order_s(request) // self._span_s)], request, -1)

    def head(self) -> Request | None:
        while self._order:
            group = self._groups[self._order[0]]
            for queue in (group.resumed, group.fresh):
                while queue:
                    if queue[0].outcome is None:
                        return queue[0]
                    queue.popleft()
            del self._groups[heappop(self._order)]
        return None

    def remove_head(self, request: Request) -> None:
        """Take out what ``head`` returned."""
        group = self._groups[self._order[0]]
        queue = group.resumed or group.fresh
        assert queue[0] is request
        self._count(group, queue.popleft(), -1)

    def views(self, expected_output: Mapping[str, float], limit: int = 64) -> tuple[GroupView, ...]:
        """The groups, earliest first; those past ``limit`` are merged into the last one."""
        merged: list[_Group] = []
        views: list[GroupView] = []
        for key in sorted(self._groups.keys() | self._held.keys()):
            parts = [group for groups in (self._groups, self._held) if (group := groups.get(key)) and group.count > 0]
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
