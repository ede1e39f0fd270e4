"""Queues of one model: requests that found no room, and batch requests that are held back. Policies order both; here
they are counted.

A model's kinds may differ in how many KV tokens an instance has room for. Then there is an order for each size, of the
requests whose prompts need an instance of that size at the least: what waits for a larger instance is not in the way of
what fits on a smaller one, and those that fit everywhere do not take the larger ones from it. Among the first of each
order whoever is due first has its turn; an order in which nobody can be served in time any more comes after the others,
but for a turn in ``LATE_TURN``. Where all kinds are of one size there is one order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Final

from chiron.core.types import Request
from chiron.policies.policy import BatchOrder, Order
from chiron.policies.queues.deadline_groups import batch_due_s
from chiron.policies.queues.order import first_token_due_s
from chiron.policies.size import prompt_tokens
from chiron.policies.views import GroupView

LATE_TURN: Final = 40
"""Turns of requests that may be in time, before one of another size that is lost has its turn."""


class Sizes:
    """KV capacities in which a model's kinds differ, ascending. A tier is the number of those that are too small."""

    def __init__(self, capacities: Sequence[int]) -> None:
        self._capacities: list[int] = []
        self.count = 0
        """The most that there have been: a queue has so many orders."""
        self.told(capacities)

    def told(self, capacities: Sequence[int]) -> None:
        """They are known better. A request that waits changes its tier when it would be the next of its order."""
        self._capacities = sorted(set(capacities))
        self.count = max(self.count, len(self._capacities))

    def tier(self, request: Request) -> int:
        """Of a prompt that no instance has room for: as if the largest had."""
        if self.count == 1:
            return 0
        return min(bisect_right(self._capacities, prompt_tokens(request)), len(self._capacities) - 1)

    def most(self, below: int) -> int:
        """KV capacity of the largest kind that is too small for a request of tier ``below``."""
        return self._capacities[min(below, len(self._capacities)) - 1]


class WaitingQueue:
    """Requests that found no room: counted here, ordered by the policy's ``Order``."""

    def __init__(self, make: Callable[[], Order], sizes: Sizes) -> None:
        """``make`` is called once for each size."""
        self._make = make
        self._sizes = sizes
        self._orders = [make()]
        self._passed_lost = 0
        """Turns since one of an order in which all are lost."""
        self.count = 0
        self.interactive = 0
        self.flex = 0
        """Of those counted; the rest are items of jobs, under policies that hold no batch work back."""
        self.input_tokens = 0
        self.input_square = 0.0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Request]:
        for order in self._orders:
            yield from order

    def add(self, request: Request, now_s: float) -> None:
        self.order_of(request).add(request, now_s)
        self._count(request, 1)

    def order_of(self, request: Request) -> Order:
        """Where it would wait, from now on."""
        request.tier = self._sizes.tier(request)
        while len(self._orders) <= request.tier:
            self._orders.append(self._make())
        return self._orders[request.tier]

    def forget(self, request: Request) -> None:
        """It ended while it was queued: counted no more, dropped when it surfaces."""
        self._orders[request.tier].forget(request)
        self._count(request, -1)

    def head(self, now_s: float, below: int) -> Request | None:
        """Whose turn it is, of those in tiers under ``below``; stays queued until ``remove_head``."""
        if not self.count:
            return None
        orders = self._orders
        if self._sizes.count == 1:
            return orders[0].head(now_s) if below else None
        heads = self._heads(now_s, below)
        if len(heads) > 1 and self._passed_lost < LATE_TURN:
            heads = [head for head in heads if not orders[head.tier].only_lost()] or heads
        return min(heads, key=_first_due, default=None)

    def _heads(self, now_s: float, below: int) -> list[Request]:
        """Of each order, once each is of its order's size."""
        while True:
            heads = [head for order in self._orders[:below] if (head := order.head(now_s)) is not None]
            moves = next((head for head in heads if self._sizes.tier(head) != head.tier), None)
            if moves is None:
                return heads
            before = self._orders[moves.tier]
            before.remove_head(moves, now_s)
            before.never_ran(moves)
            self.order_of(moves).add(moves, now_s)

    def remove_head(self, request: Request, now_s: float) -> None:
        """Take out what ``head`` returned."""
        order = self._orders[request.tier]
        if len(self._orders) > 1:
            self._passed_lost = 0 if order.only_lost() else self._passed_lost + 1
        order.remove_head(request, now_s)
        self._count(request, -1)

    def never_ran(self, request: Request) -> None:
        """It had its turn, and was refused, lost or taken back before its first token. Batch work that was held has had
        none here."""
        if request.tier < len(self._orders):
            self._orders[request.tier].never_ran(request)

    def only_lost(self, below: int) -> bool:
        """Nobody who waits in tiers under ``below`` can be served in time any more. Called after ``head``."""
        return all(order.only_lost() for order in self._orders[:below])

    def lost(self) -> Request | None:
        """One that cannot be served in time any more; None: there is none, or the order does not care."""
        if not self.count:
            return None
        found = [request for order in self._orders if (request := order.lost()) is not None]
        return min(found, key=_first_due, default=None)

    def oldest_arrival_s(self) -> float:
        """inf when no request waits."""
        return min(order.oldest_arrival_s() for order in self._orders)

    def _count(self, request: Request, sign: int) -> None:
        self.count += sign
        self.interactive += sign * request.interactive
        self.flex += sign * request.flex
        self.input_tokens += sign * request.input_tokens
        self.input_square += sign * float(request.input_tokens) ** 2


def _first_due(request: Request) -> tuple[float, int]:
    return first_token_due_s(request), request.id


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

    def __init__(self, make: Callable[[], BatchOrder], group_span_s: float, sizes: Sizes) -> None:
        """``make`` is called once for each size."""
        self._make = make
        self._sizes = sizes
        self._orders = [make()]
        self._span_s = group_span_s
        self._groups: dict[int, _Sums] = {}
        self._announced: dict[int, _Sums] = {}
        self._passed_lost = 0
        """Turns since one of an order in which all are lost."""
        self.count = 0
        self.flex = 0
        """Of those counted; the rest are items of jobs."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Request]:
        for order in self._orders:
            yield from order

    def add(self, request: Request, now_s: float) -> None:
        self._order_of(request).add(request, now_s)
        self._count(request, 1)

    def _order_of(self, request: Request) -> BatchOrder:
        request.tier = self._sizes.tier(request)
        while len(self._orders) <= request.tier:
            self._orders.append(self._make())
        return self._orders[request.tier]

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
        self._orders[request.tier].forget(request)
        self._count(request, -1)

    def head(self, now_s: float, below: int) -> Request | None:
        """Whose turn it is, of those in tiers under ``below``; stays queued until ``remove_head``."""
        if self._sizes.count == 1:
            return self._orders[0].head(now_s) if below else None
        while True:
            heads = [head for order in self._orders[:below] if (head := order.head(now_s)) is not None]
            moves = next((head for head in heads if self._sizes.tier(head) != head.tier), None)
            if moves is None:
                break
            self._orders[moves.tier].remove_head(moves, now_s)
            self._order_of(moves).add(moves, now_s)
        if len(heads) > 1 and self._passed_lost < LATE_TURN:
            heads = [head for head in heads if not self._orders[head.tier].only_lost()] or heads
        return min(heads, key=_batch_due, default=None)

    def shorter(self, now_s: float, tokens: int, below: int) -> Request | None:
        """Likewise, among those that may pass one whose prompt is too long: theirs are shorter than ``tokens``."""
        orders = self._orders
        if len(orders) == 1:
            return orders[0].shorter(now_s, tokens) if below else None
        heads = [head for order in orders[:below] if (head := order.shorter(now_s, tokens)) is not None]
        return min(heads, key=_batch_due, default=None)

    def remove_head(self, request: Request, now_s: float) -> None:
        """Take out what ``head`` or ``shorter`` returned."""
        order = self._orders[request.tier]
        if len(self._orders) > 1:
            self._passed_lost = 0 if order.only_lost() else self._passed_lost + 1
        order.remove_head(request, now_s)
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


def _batch_due(request: Request) -> tuple[float, int]:
    return batch_due_s(request), request.id


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
