"""The order of waiting requests under ``chiron`` when not all of them can be served in time.

While all can be on time the earliest TTFT deadline goes first. Once some cannot, that order is the worst there is:
each request waits until its prefill takes it past its deadline, and all of them miss. Three rules end that.

*Lost requests make way.* A request is lost when its first token, if it were dispatched now, would come too late::

    now + lead(class) + prefill(request)  >  arrival + TTFT

``lead`` is learned: an upper quantile of the time from dispatch to first token beyond a request's own prefill. Lost
ones wait behind the others and get every ``late_turn``-th turn, so that nobody waits for ever. (Niyama, arXiv
2503.22562, relegates likewise.)

*Overload is shared out.* From the first loss until ``hold_s`` after the last, classes take turns by weight, and
within a class its tenants (API keys) equally: start-time fair queueing (Goyal, Vin and Cheng, 1996) over the seconds
of engine time that their requests take. Who asks for less than its share is served at once, as if the others were
not there; what it leaves goes to the others. Within a tenant the earliest deadline goes first.

*Refusal, if wanted.* A request that would be lost by the time its turn comes can be refused as it arrives, with the
time after which it is worth asking again.

A turn costs O(classes + log tenants + log requests of the tenant).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heappop, heappush
from math import exp, inf, nan

from chiron.core.types import Request, RequestClass
from chiron.policies.capacity import decode_s
from chiron.policies.policy import Estimates, Refusal
from chiron.policies.queues.overload_settings import OverloadSettings as OverloadSettings
from chiron.policies.size import prefill_s, prompt_tokens

RATE_WINDOW_S = 10.0
"""Over which it is measured how fast a class is served: time constant of an exponential mean."""


class _Tenant:
    """Waiting requests of one class and API key that may be on time."""

    __slots__ = ("count", "heap", "number", "ranked", "tag", "work_s")

    def __init__(self, number: int) -> None:
        self.number = number
        self.heap: list[tuple[float, int, Request]] = []
        self.count = 0
        """Of those in the heap that have not ended."""
        self.ranked = nan
        """Key of its entry in the ranking; nan: it has none."""
        self.tag = 0.0
        """Virtual time at which its next turn begins."""
        self.work_s = 0.0
        """Engine seconds that those in the heap will take."""


class _Class:
    """Waiting requests of one class."""

    __slots__ = ("cls", "count", "late", "now_tag", "ranking", "rate", "rate_s", "since_s", "tag", "tenants", "work_s")

    def __init__(self, cls: RequestClass) -> None:
        self.cls = cls
        self.tenants: dict[str, _Tenant] = {}
        self.ranking: list[tuple[float, int, _Tenant]] = []
        """Tenants by the key of the order in force: deadline of the first request, or tag. An entry whose tenant has
        been ranked anew is dropped when it surfaces."""
        self.late: deque[Request] = deque()
        self.count = 0
        self.tag = 0.0
        self.now_tag = 0.0
        """Virtual time among its tenants."""
        self.work_s = 0.0
        self.rate = 0.0
        """Engine seconds served per second, not yet corrected for a start within the window; as of ``rate_s``."""
        self.rate_s = 0.0
        self.since_s = inf
        """When that measurement began."""


_Turn = tuple[_Class, _Tenant | None, float, float]
"""Who was charged for a turn, how many seconds of engine time, and when."""


class OverloadOrder:
    """Implements ``policies.policy.Order`` for one model, and answers the ``admit`` hook."""

    def __init__(self, settings: OverloadSettings, estimates: Estimates) -> None:
        self._settings = settings
        self._estimates = estimates
        self._classes: dict[str, _Class] = {}
        self._costs: dict[int, tuple[float, _Class, _Tenant]] = {}
        """Of each request that waits and may be on time: its engine seconds, and where it counts."""
        self._now_tag = 0.0
        """Virtual time among the classes."""
        self._lost_s = -inf
        """When the last request was lost."""
        self._sharing = False
        self._turn = 0

    def __iter__(self) -> Iterator[Request]:
        for group in self._classes.values():
            for tenant in group.tenants.values():
                yield from (entry[2] for entry in tenant.heap if entry[2].outcome is None)
            yield from (request for request in group.late if request.outcome is None)

    # -- the Order port ----------------------------------------------------------------------------------------

    def add(self, request: Request, now_s: float) -> None:
        group = self._classes.get(request.class_name)
        if group is None:
            group = self._classes[request.class_name] = _Class(request.cls)
        if self._settings.relegate and self._is_lost(request, now_s):
            self._relegate(group, request, now_s)
            return
        tenant = group.tenants.get(request.tenant)
        if tenant is None:
            tenant = group.tenants[request.tenant] = _Tenant(len(group.tenants))
        cost_s = self._work_s(request)
        self._costs[request.id] = (cost_s, group, tenant)
        if not group.count:
            group.tag = max(group.tag, self._now_tag)
        if not tenant.count:
            tenant.heap.clear()
            tenant.tag = max(tenant.tag, group.now_tag)
        group.count += 1
        tenant.count += 1
        group.work_s += cost_s
        tenant.work_s += cost_s
        heappush(tenant.heap, (request.arrival_s + request.ttft_slo_s, request.id, request))
        self._rank(group, tenant)

    def forget(self, request: Request) -> None:
        self._uncount(request)

    def head(self, now_s: float) -> Request | None:
        self._set_sharing(now_s)
        late = self._late_class()
        if late is not None and self._turn >= self._settings.late_turn:
            return late.late[0]
        while (found := self._first()) is not None:
            group, tenant = found
            request = tenant.heap[0][2]
            if not (self._settings.relegate and self._is_lost(request, now_s)):
                return request
            self._take(group, tenant)
            self._relegate(group, request, now_s)
        late = self._late_class()
        return late.late[0] if late is not None else None

    def remove_head(self, request: Request, now_s: float) -> None:
        counted = self._costs.get(request.id)
        if counted is None:
            group = self._classes[request.class_name]
            assert group.late[0] is request
            group.late.popleft()
            self._turn = 0
            self._served(request, group, None, self._work_s(request), now_s)
            return
        cost_s, group, tenant = counted
        assert tenant.heap[0][2] is request
        self._served(request, group, tenant, cost_s, now_s)
        self._take(group, tenant)
        self._turn += 1

    def never_ran(self, request: Request) -> None:
        turn: _Turn | None = request.turn
        if turn is None:
            return
        request.turn = None
        group, tenant, cost_s, when_s = turn
        group.tag -= cost_s / group.cls.weight
        group.rate = max(0.0, group.rate - cost_s / RATE_WINDOW_S * exp(-(group.rate_s - when_s) / RATE_WINDOW_S))
        if tenant is not None:
            tenant.tag -= cost_s
            if self._drop_ended(tenant):
                self._rank(group, tenant)

    def only_lost(self) -> bool:
        return all(not group.count for group in self._classes.values())

    def lost(self) -> Request | None:
        """Of the class that has most of them."""
        able = [group for group in self._classes.values() if self._drop_ended_late(group)]
        return max(able, key=lambda group: len(group.late)).late[0] if able else None

    def oldest_arrival_s(self) -> float:
        """Exact over everybody who waits; O(tenants)."""
        firsts = [group.late[0] for group in self._classes.values() if self._drop_ended_late(group)]
        for group in self._classes.values():
            firsts += [t.heap[0][2] for t in group.tenants.values() if self._drop_ended(t)]
        return min((request.arrival_s for request in firsts), default=inf)

    # -- the admit hook ----------------------------------------------------------------------------------------

    def admit(self, request: Request, now_s: float) -> Refusal | None:
        """Refuse who would be lost before its turn comes, while an overload lasts."""
        if not (self._settings.refuse and request.interactive and now_s - self._lost_s < self._settings.hold_s):
            return None
        wait_s = self._wait_s(request, now_s)
        slack_s = request.ttft_slo_s - self._lead_s(request)
        if slack_s <= 0.0 or wait_s <= slack_s:
            return None
        return Refusal(reason="overload", retry_after_s=max(1.0, wait_s - slack_s), numbers={"wait_s": wait_s})

    def _wait_s(self, request: Request, now_s: float) -> float:
        """How long it would wait: its tenant's queue at its share of the rate at which its class has been served."""
        group = self._classes.get(request.class_name)
        if group is None or now_s - group.since_s < 1.0:
            return 0.0
        fade = exp(-(now_s - group.rate_s) / RATE_WINDOW_S)
        rate = group.rate * fade / (1.0 - exp(-(now_s - group.since_s) / RATE_WINDOW_S))
        tenant = group.tenants.get(request.tenant)
        ahead_s = tenant.work_s if tenant is not None else 0.0
        active = sum(1 for t in group.tenants.values() if t.count)
        return min(ahead_s * max(1, active), group.work_s) / max(rate, 1e-6)

    # -- parts -------------------------------------------------------------------------------------------------

    def _is_lost(self, request: Request, now_s: float) -> bool:
        """Too late for its first token; one that has had it, and lost its instance, is not."""
        return request.first_token_s < 0.0 and now_s + self._lead_s(request) > request.arrival_s + request.ttft_slo_s

    def _lead_s(self, request: Request) -> float:
        """From dispatch to first token."""
        own_s = prefill_s(self._estimates, prompt_tokens(request))
        return own_s + self._estimates.first_token_lead_s[request.class_name]

    def _work_s(self, request: Request) -> float:
        estimates = self._estimates
        tokens = prompt_tokens(request)
        return prefill_s(estimates, tokens) + decode_s(
            estimates.step_times, tokens, estimates.expected_output[request.class_name]
        )

    def _relegate(self, group: _Class, request: Request, now_s: float) -> None:
        group.late.append(request)
        # One whose prompt alone takes too long says nothing about the fleet.
        if self._lead_s(request) < request.ttft_slo_s:
            self._lost_s = now_s

    def _set_sharing(self, now_s: float) -> None:
        """Change the order when an overload begins or ends."""
        sharing = self._settings.fair and now_s - self._lost_s < self._settings.hold_s
        if sharing == self._sharing:
            return
        self._sharing = sharing
        for group in self._classes.values():
            group.ranking.clear()
            for tenant in group.tenants.values():
                tenant.ranked = nan
                if tenant.heap:
                    self._rank(group, tenant)

    def _rank(self, group: _Class, tenant: _Tenant) -> None:
        key = self._key(tenant)
        if key != tenant.ranked:
            tenant.ranked = key
            heappush(group.ranking, (key, tenant.number, tenant))

    def _key(self, tenant: _Tenant) -> float:
        return tenant.tag if self._sharing else tenant.heap[0][0]

    def _first(self) -> tuple[_Class, _Tenant] | None:
        """Of those that may be on time; whose turn it is."""
        best: tuple[_Class, _Tenant] | None = None
        best_key = inf
        for group in self._classes.values():
            tenant = self._first_tenant(group)
            if tenant is None:
                continue
            key = group.tag if self._sharing else tenant.heap[0][0]
            if best is None or key < best_key:
                best, best_key = (group, tenant), key
        return best

    def _first_tenant(self, group: _Class) -> _Tenant | None:
        ranking = group.ranking
        while ranking:
            key, _, tenant = ranking[0]
            if key == tenant.ranked:
                if not self._drop_ended(tenant):
                    tenant.ranked = nan
                elif key == self._key(tenant):
                    return tenant
                else:  # Its first request has ended; the next has a later deadline.
                    self._rank(group, tenant)
            heappop(ranking)
        return None

    def _drop_ended(self, tenant: _Tenant) -> bool:
        """Whether anybody is left."""
        heap = tenant.heap
        while heap and heap[0][2].outcome is not None:
            heappop(heap)
        return bool(heap)

    def _drop_ended_late(self, group: _Class) -> bool:
        while group.late and group.late[0].outcome is not None:
            group.late.popleft()
        return bool(group.late)

    def _late_class(self) -> _Class | None:
        """Of those that have lost requests, the one that was served least for its weight."""
        able = [group for group in self._classes.values() if self._drop_ended_late(group)]
        return min(able, key=lambda group: group.tag, default=None)

    def _take(self, group: _Class, tenant: _Tenant) -> None:
        """Remove the tenant's first request, and rank the tenant anew."""
        request = heappop(tenant.heap)[2]
        self._uncount(request)
        if self._drop_ended(tenant):
            self._rank(group, tenant)

    def _uncount(self, request: Request) -> None:
        counted = self._costs.pop(request.id, None)
        if counted is None:
            return
        cost_s, group, tenant = counted
        tenant.count -= 1
        group.count -= 1
        tenant.work_s = tenant.work_s - cost_s if tenant.count else 0.0
        group.work_s = group.work_s - cost_s if group.count else 0.0

    def _served(self, request: Request, group: _Class, tenant: _Tenant | None, cost_s: float, now_s: float) -> None:
        """Charge a turn: virtual time moves to where it began, and who had it waits for its next."""
        request.turn = (group, tenant, cost_s, now_s)
        self._now_tag = max(self._now_tag, group.tag)
        group.tag += cost_s / group.cls.weight
        if tenant is not None:
            group.now_tag = max(group.now_tag, tenant.tag)
            tenant.tag += cost_s
        if group.since_s == inf:
            group.since_s = group.rate_s = now_s
        group.rate = group.rate * exp(-(now_s - group.rate_s) / RATE_WINDOW_S) + cost_s / RATE_WINDOW_S
        group.rate_s = now_s
