"""``qlm``: QLM's queue management (SoCC '24) in front of a fixed fleet.

Requests wait in front of the engines, in request groups: those of one class whose deadlines share a span (TTFT of an
interactive request, the deadline of a batch one). An engine pulls while it runs fewer than its max batch size. Groups
go earliest deadline first, first come, first served inside. The wait of a group is estimated from its length::

    W = n * mu / Theta        n requests of the group, mu their mean output, Theta tokens a second

and that of the groups that hold the places before it counts, too: batch work that runs or waits. If its first request
would then be late, batch work that runs is evicted for it, its KV kept in host memory.

Sources: arXiv 2407.00047 by public notes, and QLM-project/QLM: qlm/queue, qlm/scheduler and qlm/config.yaml. What is
filled in, and what one model with equal engines leaves out, is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.queues.deadline_groups import batch_due_s
from chiron.policies.queues.order import KeyOrder, first_token_due_s
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.routers.gated import GatedRouter
from chiron.policies.size import KV_FILL, prefill_s, prompt_tokens

DUE_LAST_S = 1e15
"""Of a request without any deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QlmSettings:
    group_span_s: Annotated[float, Between(1.0, 300.0, log=True)] = 100.0
    """Deadlines within as long are one group's (QLM's config.yaml: slo_granularity)."""
    evicts: bool = True
    """Batch work makes way for a group that would be late (its paper)."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default. QLM's config.yaml has 10, for a demonstration."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "group_span_s", "max_num_seqs")
        at_least(0, self, "instances")


def waiting_s(requests: int, output_tokens: float, tokens_per_s: float) -> float:
    """Of a group of so many requests with so long answers (RWT, its mean)."""
    return requests * output_tokens / tokens_per_s


def tokens_per_s(estimates: Estimates, instances: int, max_num_seqs: int, kv_capacity_tokens: int) -> float:
    """What so many engines make of common interactive requests, all places taken as far as KV allows."""
    usual, times = estimates.usual, estimates.step_times
    output = max(1.0, usual.need_tokens - usual.input_tokens)
    batch = max(1.0, min(max_num_seqs, KV_FILL * kv_capacity_tokens / max(1.0, usual.input_tokens + 0.5 * output)))
    context = usual.input_tokens + 0.5 * output
    prefill_s = usual.input_tokens * times.per_prefill_token_s + usual.input_square * times.per_prefill_square_s
    step_s = times.fixed_s + batch * (times.per_sequence_s + times.per_context_token_s * context + prefill_s / output)
    return instances * batch / step_s


def due_s(request: Request) -> float:
    due = first_token_due_s(request) if request.interactive else batch_due_s(request)
    return due if isfinite(due) else DUE_LAST_S


class Groups:
    """How many requests of one model wait in each group."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._waiting: dict[tuple[str, float], int] = {}
        self.batch: dict[str, int] = {}
        """Batch requests that wait, by class."""

    def key(self, request: Request) -> float:
        return due_s(request) // self._span_s

    def _group(self, request: Request) -> tuple[str, float]:
        return request.class_name, self.key(request)

    def size(self, request: Request) -> int:
        """Requests that wait in its group."""
        return self._waiting.get(self._group(request), 0)

    def join(self, request: Request) -> None:
        group = self._group(request)
        self._waiting[group] = self._waiting.get(group, 0) + 1
        if not request.interactive:
            self.batch[request.class_name] = self.batch.get(request.class_name, 0) + 1

    def leave(self, request: Request) -> None:
        group = self._group(request)
        self._waiting[group] -= 1
        if not request.interactive:
            self.batch[request.class_name] -= 1
        if not self._waiting[group]:
            del self._waiting[group]


class GroupOrder:
    """Groups by deadline, counted."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._order = KeyOrder(groups.key)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._order)

    def add(self, request: Request, now_s: float) -> None:
        self._groups.join(request)
        self._order.add(request, now_s)

    def forget(self, request: Request) -> None:
        self._groups.leave(request)
        self._order.forget(request)

    def remove_head(self, request: Request, now_s: float) -> None:
        self._groups.leave(request)
        self._order.remove_head(request, now_s)

    def head(self, now_s: float) -> Request | None:
        return self._order.head(now_s)

    def never_ran(self, request: Request) -> None:
        """Nobody is charged."""

    def only_lost(self) -> bool:
        """It does not know."""
        return False

    def lost(self) -> Request | None:
        return None

    def oldest_arrival_s(self) -> float:
        return self._order.oldest_arrival_s()


class PullRouter:
    """Engines pull from the groups; batch work makes way for a group that would be late."""

    def __init__(self, settings: QlmSettings, estimates: Estimates, groups: Groups) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._estimates = estimates
        self._groups = groups
        self._engines = GatedRouter(estimates)
        self._batch = 0
        self._counted: dict[int, int] = {}
        """Batch sequences that are counted of each engine that takes work, and all of them above."""

    def add(self, instance: Instance) -> None:
        self._counted.setdefault(instance.id, 0)
        self._engines.add(instance)
        self._count(instance)

    def remove(self, instance: Instance) -> None:
        self._batch -= self._counted.pop(instance.id, 0)
        self._engines.remove(instance)

    def changed(self, instance: Instance) -> None:
        self._engines.changed(instance)
        self._count(instance)

    def _count(self, instance: Instance) -> None:
        if instance.id in self._counted:
            self._batch += instance.batch_sequences - self._counted[instance.id]
            self._counted[instance.id] = instance.batch_sequences

    def place(self, request: Request, waited_s: float) -> Placement | None:
        placement = self._engines.place(request, waited_s)
        if placement is None and request.interactive and self._settings.evicts:
            made = self._engines.make_way(request)
            if made is not None and self._late(request, waited_s, made):
                return made
        return placement

    def _late(self, request: Request, waited_s: float, made: Placement) -> bool:
        """By the estimate, with the batch work that holds the engines and the rest of its queue ahead. What runs is
        taken to be as long as what would leave."""
        expected, instance = self._estimates.expected_output, made.instance
        speed = tokens_per_s(
            self._estimates,
            self._engines.count,
            min(self._settings.max_num_seqs, instance.max_batch_size),
            instance.kv_capacity_tokens,
        )
        requests = max(1, self._groups.size(request))
        wait_s = waiting_s(requests, expected[request.class_name], speed)
        running = sum(expected[victim.class_name] for victim in made.evict) / max(1, len(made.evict))
        wait_s += waiting_s(self._batch, running, speed)
        wait_s += sum(waiting_s(count, expected[name], speed) for name, count in self._groups.batch.items())
        own_s = prefill_s(self._estimates, prompt_tokens(request))
        return waited_s + wait_s + own_s > request.ttft_slo_s

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def make_qlm(settings: QlmSettings) -> Policy:
    groups: dict[int, tuple[Estimates, Groups]] = {}

    def of(estimates: Estimates) -> Groups:
        """Of each model: its orders and its router share them."""
        return groups.setdefault(id(estimates), (estimates, Groups(settings.group_span_s)))[1]

    def order(_: Any, estimates: Estimates) -> GroupOrder:
        return GroupOrder(of(estimates))

    def place(_: Any, estimates: Estimates) -> PullRouter:
        return PullRouter(settings, estimates, of(estimates))

    return Policy(
        name="qlm",
        settings=settings,
        order=order,
        place=place,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
