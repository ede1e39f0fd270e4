"""Queues of one model: requests that found no room, and batch requests that are held back. Policies order both; here
they are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from chiron.core.types import Request
from chiron.policies.policy import BatchOrder, Order
from chiron.policies.queues.deadline_groups import batch_due_s
from chiron.policies.views import GroupView


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


class _Sums:
    """What is queued of one request group, added up."""

    __slots__ = ("class_counts", "count", "deadline_s", "done_tokens", "input_square", "input_tokens")

    def __init__(self) -> None:
        self.deadline_s = inf
        self.count = 0
        self.input_tokens = 0
        self.input_square = 0.0
        self.done_tokens = 0
        self.class_counts: dict[str, int] = {}


class BatchQueue:
    """Batch requests that are held back: in the order of the policy's ``BatchOrder``, and as sums by request group, for
    planners. A group is those whose deadlines share a span."""

    def __init__(self, order: BatchOrder, group_span_s: float) -> None:
        self._order = order
        self._span_s = group_span_s
        self._groups: dict[int, _Sums] = {}
        self._announced: dict[int, _Sums] = {}
        self.count = 0
        self.flex = 0
        """Of those counted; the rest are items of jobs."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Request]:
        return iter(self._order)

    def add(self, request: Request, now_s: float) -> None:
        self._order.add(request, now_s)
        self._count(request, 1)

    def announce(self, deadline_s: float, name: str, requests: int, input_tokens: int, input_square: float) -> None:
        """Count work of class ``name`` that waits elsewhere, to be added later; negative figures take it off again.

        A job may have more requests than fit in memory: planners must know of all of them, dispatch only of the next.
        """
        key = int(deadline_s // self._span_s)
        group = self._announced.setdefault(key, _Sums())
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

    def announced_due(self) -> list[tuple[float, int]]:
        """(deadline, requests) of those groups."""
        return [(group.deadline_s, group.count) for group in self._announced.values()]

    def forget(self, request: Request) -> None:
        """It ended while it was queued: counted no more, dropped when it surfaces."""
        self._order.forget(request)
        self._count(request, -1)

    def head(self, now_s: float) -> Request | None:
        """Whose turn it is; stays queued until ``remove_head``."""
        return self._order.head(now_s)

    def shorter(self, now_s: float, tokens: int) -> Request | None:
        """Likewise, among those that may pass one whose prompt is too long: theirs are shorter than ``tokens``."""
        return self._order.shorter(now_s, tokens)

    def remove_head(self, request: Request, now_s: float) -> None:
        """Take out what ``head`` or ``shorter`` returned."""
        self._order.remove_head(request, now_s)
        self._count(request, -1)

    def views(self, expected_output: Mapping[str, float], limit: int = 64) -> tuple[GroupView, ...]:
        """The groups, earliest first; those past ``limit`` are merged into the last one."""
        merged: list[_Sums] = []
        views: list[GroupView] = []
        for key in sorted(self._groups.keys() | self._announced.keys()):
            parts = [group for groups in (self._groups, self._announced) if (group := groups.get(key))]
            if len(views) < limit - 1:
                views.append(_view(parts, expected_output))
            else:
                merged.extend(parts)
        if merged:
            views.append(_view(merged, expected_output))
        return tuple(views)

    def _count(self, request: Request, sign: int) -> None:
        self.count += sign
        self.flex += sign * request.flex
        due_s = batch_due_s(request)
        key = int(due_s // self._span_s)
        group = self._groups.get(key)
        if group is None:
            assert sign > 0, "only what was added can leave"
            group = self._groups[key] = _Sums()
        group.deadline_s = min(group.deadline_s, due_s)
        group.count += sign
        group.input_tokens += sign * request.input_tokens
        group.input_square += sign * float(request.input_tokens) ** 2
        group.done_tokens += sign * request.tokens_done
        name = request.class_name
        group.class_counts[name] = group.class_counts.get(name, 0) + sign
        if not group.count:
            del self._groups[key]


def _view(groups: list[_Sums], expected_output: Mapping[str, float]) -> GroupView:
    output = sum(count * expected_output[name] for g in groups for name, count in g.class_counts.items())
    requests = sum(g.count for g in groups)
    return GroupView(
        deadline_s=min(g.deadline_s for g in groups),
        requests=requests,
        input_tokens=float(sum(g.input_tokens for g in groups)),
        input_square=sum(g.input_square for g in groups),
        output_tokens=max(float(requests), output - sum(g.done_tokens for g in groups)),
    )
