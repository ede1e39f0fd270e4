"""Preferential, packed dispatch: fill one instance before the next (paper, sections 4 and 5).

Interactive requests go to the first instance, in order of rank, that has room: those of role interactive, then
mixed, then batch. Batch requests fill instances in the opposite order, so that the two meet as late as possible and
the instances between them stay empty and can be scaled down. A heap per direction holds the instances that may have
room; an entry is checked when it surfaces. One that has no room for a request of common size leaves the heap until
its load changes, so a dispatch costs O(log instances), amortised over load changes. Each kind of instance has heaps of
its own, of which those with the lowest first entry come first: a long prompt does not look at instances of a kind that
is too small for it.

While the last plan says that instances stay anyway, requests are spread over those first (``packing_spread``).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final

from chiron.core.types import Instance, Placement, Request
from chiron.policies.policy import Estimates
from chiron.policies.routers.packing_pools import Note, Passed, Pool, Pools, lowest, lowest_short
from chiron.policies.routers.packing_settings import PackingSettings as PackingSettings
from chiron.policies.routers.packing_spread import LeastLoaded
from chiron.policies.size import fits, kv_limit, kv_tokens, may_hold, prefill_left_s, prefill_s, prompt_tokens, within

_PROBES_MAX = 8
"""Instances with room in general that an unusually large request may pass over."""
_USUAL = 2.0
"""A request within this multiple of the mean is of common size."""

_YOUNG_S = 2.0
"""A request is young until so long after its first token. How long its answer will be is not known, but that of an old
one has tokens enough to average a long step out."""
_YOUNG_MAX = 64
"""Requests of one instance that are looked at."""
_SPREAD_MAX = 64
"""Instances that are looked at for one long prompt."""
_SPREAD_OFF = 1.0 / 3.0
"""Long prompts are spread until the share of missed ITL SLOs has come down to this part of where that began."""

RELIEVE_AFTER = 0.1
"""Share of its TTFT that an interactive request is queued for before batch work makes way on one instance after
another, so that prefill has the steps to itself."""

_AHEAD: Final = 1.25
"""A prompt is sent behind one that is at most so many times as long."""
_AHEAD_SHARE: Final = 0.75
"""Share of its TTFT that both together may take: steps that are under way need the rest."""
_AHEAD_MAX: Final = 16
"""Instances that are looked at for it."""

_ROLE_ORDER: Final = {"interactive": 0, "mixed": 1, "batch": 2}
_RANK_BITS: Final = 28
_RANK: Final = (1 << _RANK_BITS) - 1
"""An entry of a heap is one number, an instance's place by role and rank. Numbers are compared more quickly than
tuples, and to look at one touches less memory."""


class PackingRouter:
    """Router of one model. ``strict_roles``: the paper's preference (own type, then mixed, no other).
    ``keeps_apart``: ours (where ITL SLOs leave little room for prefill, instances of role batch are left alone until a
    request has waited, and batch work that has not begun to decode makes way). ``evicts``: batch work makes way for
    interactive requests that find no room; for those queued for longer than ``relieve_after`` of their TTFT also where
    that gives them none at once. ``passes_long``: shorter batch requests pass one whose prompt is too long.
    ``spreads_long``: share of missed ITL SLOs from which on an interactive prompt that takes longer than its ITL SLO
    goes where the fewest requests are young, instead of where packing would have it. ``sends_ahead``: an interactive
    prompt goes behind another one of its length where the end of that is heard of late; with that share of missed ITL
    SLOs only if those that decode can bear both."""

    def __init__(
        self,
        settings: PackingSettings,
        estimates: Estimates,
        *,
        evicts: bool = False,
        relieve_after: float = RELIEVE_AFTER,
        strict_roles: bool = False,
        keeps_apart: bool = False,
        passes_long: bool = False,
        spreads_long: float = inf,
        sends_ahead: bool = False,
    ) -> None:
        self._prefill_share = settings.prefill_share_of_ttft
        self._prefill_share_batch = settings.batch_prefill_share_of_ttft
        self._prefill_batch_s = settings.batch_prefill_s
        self._share_batch = 1.0 - settings.batch_reserve
        self._estimates = estimates
        self._evicts = evicts
        self._relieve_after = relieve_after
        self._strict = strict_roles
        self._passes_long = passes_long
        self.room_tokens = 0
        self._keeps_apart = keeps_apart
        self._spreads_long = spreads_long
        self._spreading = False
        self._sends_ahead = sends_ahead
        self._by_rank: list[Instance] = []
        """All that take work."""
        self._tight = False
        """ITL SLOs bound the prefill in flight on instances that serve interactive requests."""
        self._at: dict[int, Instance] = {}
        """Likewise, by rank."""
        self._pools = Pools()
        self._least = LeastLoaded(estimates)
        self._by_kind: dict[str, Pool] = {}

    # -- the Router port ---------------------------------------------------------------------------------------

    def add(self, instance: Instance) -> None:
        pool = self._by_kind.get(instance.kind.name)
        if pool is None:
            pool = self._by_kind[instance.kind.name] = Pool()
            self._pools.add(pool)
        instance.index = Note(pool)
        assert instance.rank <= _RANK
        insort(self._by_rank, instance, key=lambda other: other.rank)
        self._at[instance.rank] = instance
        self._least.count = -1
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        note: Note = instance.index
        if note.open:
            self._by_rank.remove(instance)
            del self._at[instance.rank]
            self._least.count = -1
        note.open = False
        note.measured(0)

    def changed(self, instance: Instance) -> None:
        note: Note = instance.index
        if not note.open:
            return
        if note.kv_tokens != instance.kv_capacity_tokens:
            note.measured(instance.kv_capacity_tokens)
        note.short_s = 0.0
        if instance.role != "batch":
            self._tight = self._keeps_apart and instance.prefill_step_s < inf
        if not note.in_interactive and self._room_interactive(instance):
            note.in_interactive = True
            heappush(note.pool.interactive, _entry(instance))
        if not note.in_batch and self._room_batch(instance):
            note.in_batch = True
            heappush(note.pool.batch, -_entry(instance))
        if instance.batch and not note.in_victims:
            note.in_victims = True
            heappush(note.pool.victims, _entry(instance))
        if self._least.count:
            self._least.changed(instance)

    def place(self, request: Request, waited_s: float) -> Placement | None:
        estimates = self._estimates
        tokens = request.input_tokens + request.tokens_done
        cost_s = prefill_s(estimates, tokens)
        need = kv_tokens(estimates, request)
        pools = self._pools.for_prompt(request, tokens)
        if not request.interactive:
            instance = self._choose_batch(pools, request, tokens, need, cost_s)
            if instance is None:
                return None
            saved = request.kv_saved_tokens and request.kv_saved_on == instance.id
            return Placement(instance, 0.0 if saved else cost_s, int(need))
        if self._spreads_long < inf and cost_s > request.itl_slo_s and self._spreads():
            instance = self._choose_spread(request, need, cost_s, request.arrival_s + waited_s)
            if instance is not None:
                return Placement(instance, cost_s, int(need))
        if estimates.spread_over or self._least.count:
            instance = self._choose_least(request, need, cost_s)
            if instance is not None:
                return Placement(instance, cost_s, int(need))
        waited = waited_s > self._relieve_after * request.ttft_slo_s
        instance = self._choose_interactive(pools, request, tokens, need, cost_s, everywhere=waited or not self._tight)
        if instance is not None:
            return Placement(instance, cost_s, int(need))
        if self._evicts:
            instance = self._choose_victim(pools, request, need, cost_s, waited=waited)
            if instance is not None:
                return Placement(instance, cost_s, int(need), self._victims_for(instance, request, cost_s, int(need)))
        instance = None
        if self._sends_ahead and cost_s > self._relieve_after * request.ttft_slo_s:
            instance = self._choose_ahead(request, need, cost_s)
        return None if instance is None else Placement(instance, cost_s, int(need))

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        """Interactive work queues for want of prefill, not of slots: batch work beside it slows every step, so it makes
        way on one instance after another. What was wanted was a few steps, not its places: it may come back once nobody
        waits and its prefill is worth it again (``Evictor.relieve``). Where ITL SLOs keep it small it slows steps by
        little, so there what decodes, its prefill paid for, stays until that was not enough."""
        after_s = self._relieve_after * request.ttft_slo_s
        if not (self._evicts and waited_s > after_s):
            return ()
        instance = self._first_with_batch(self._pools.for_prompt(request, prompt_tokens(request)), request)
        if instance is None:
            return ()
        decoding = instance.prefill_step_s == inf or waited_s > 3.0 * self._relieve_after * request.ttft_slo_s
        return [victim for victim in reversed(instance.batch.values()) if decoding or victim.prefill_cost_s]

    # -- eviction ----------------------------------------------------------------------------------------------

    def _choose_victim(
        self, pools: Pools, request: Request, need: float, cost_s: float, *, waited: bool
    ) -> Instance | None:
        """An instance where evicting batch work makes room for this interactive request."""
        passed: list[Passed] = []
        chosen: Instance | None = None
        heaps = pools.victims
        while (heap := lowest(heaps)) and len(passed) < _PROBES_MAX:
            instance = self._at.get(heap[0] & _RANK)
            if instance is None or not instance.batch:
                heappop(heap)
                if instance is not None:
                    instance.index.in_victims = False
                continue
            stays_s = instance.prefill_backlog_s - (instance.prefill_batch_s if self._keeps_apart and waited else 0.0)
            if (
                not (instance.role == "batch" and (self._strict or (self._tight and not waited)))
                and instance.sequences - instance.batch_sequences + request.sequences <= instance.max_batch_size
                and self._prefill_fits(instance, request, cost_s, stays_s)
                and _kv_without_batch(instance) + need <= kv_limit(instance)
                and instance.kv_capacity_tokens <= request.kv_most_tokens
            ):
                chosen = instance
                break
            passed.append((heap, heappop(heap)))
        for heap, entry in passed:
            heappush(heap, entry)
        return chosen

    def _victims_for(self, instance: Instance, request: Request, cost_s: float, need: int) -> tuple[Request, ...]:
        """Batch work, last come first, until the request fits by count and by KV; then what still waits for its
        prefill, until the request need not wait too long behind it."""
        sequences, reserved = instance.sequences, instance.kv_reserved_tokens
        backlog_s, batch_s = instance.prefill_backlog_s, instance.prefill_batch_s
        evict: list[Request] = []
        for victim in reversed(instance.batch.values()):
            if not within(instance, sequences + request.sequences, reserved + need):
                sequences -= victim.sequences
                reserved -= victim.reserved_tokens
            elif not (self._keeps_apart and batch_s and not self._prefill_fits(instance, request, cost_s, backlog_s)):
                break
            elif not victim.prefill_cost_s:
                continue
            evict.append(victim)
            if victim.prefill_cost_s:
                backlog_s = prefill_left_s(backlog_s, victim.prefill_cost_s)
                batch_s = prefill_left_s(batch_s, victim.prefill_cost_s)
        return tuple(evict)

    def _first_with_batch(self, pools: Pools, request: Request) -> Instance | None:
        """The first instance, in order of rank, that runs batch work and may hold the request."""
        passed: list[Passed] = []
        chosen: Instance | None = None
        heaps = pools.victims
        while (heap := lowest(heaps)) and len(passed) < _PROBES_MAX:
            instance = self._at.get(heap[0] & _RANK)
            if instance is None or not instance.batch:
                heappop(heap)
                if instance is not None:
                    instance.index.in_victims = False
            elif may_hold(instance, request):
                chosen = instance
                break
            else:
                passed.append((heap, heappop(heap)))
        for heap, entry in passed:
            heappush(heap, entry)
        return chosen

    # -- interactive -------------------------------------------------------------------------------------------

    def _choose_interactive(
        self, pools: Pools, request: Request, tokens: int, need: float, cost_s: float, *, everywhere: bool
    ) -> Instance | None:
        usual = request.sequences == 1 and self._is_usual(cost_s, need)
        heaps = pools.interactive
        passed: list[Passed] | None = None
        chosen: Instance | None = None
        while heap := lowest(heaps):
            order = heap[0] >> _RANK_BITS
            instance = self._at.get(heap[0] & _RANK)
            if instance is None:
                heappop(heap)
                continue
            if order != _ROLE_ORDER[instance.role] or not self._room_interactive(instance):
                heappop(heap)
                instance.index.in_interactive = False
                if order != _ROLE_ORDER[instance.role]:
                    self.changed(instance)
                continue
            if order == _ROLE_ORDER["batch"] and not everywhere and instance.requests:
                passed = [] if passed is None else passed
                passed.append((heap, heappop(heap)))
                if len(passed) >= _PROBES_MAX:
                    break
                continue
            if fits(instance, request, need) and self._prefill_fits(
                instance, request, cost_s, instance.prefill_backlog_s
            ):
                chosen = instance
                break
            entry = heappop(heap)
            if usual and tokens < instance.kv_capacity_tokens <= request.kv_most_tokens:
                instance.index.in_interactive = False
                continue
            if passed is None:
                passed = []
            passed.append((heap, entry))
            if len(passed) >= _PROBES_MAX:
                break
        if passed is not None:
            for heap, entry in passed:
                heappush(heap, entry)
        return chosen

    def _choose_least(self, request: Request, need: float, cost_s: float) -> Instance | None:
        """The least loaded of those that requests are spread over. If that has no room for it, packing finds one."""
        least = self._least
        if least.count != self._estimates.spread_over or least.stale():
            least.begin(self._by_rank, self._estimates.spread_over)
        instance = least.first()
        if (
            instance is not None
            and self._room_interactive(instance)
            and fits(instance, request, need)
            and self._prefill_fits(instance, request, cost_s, instance.prefill_backlog_s)
        ):
            return instance
        return None

    def _choose_ahead(self, request: Request, need: float, cost_s: float) -> Instance | None:
        """For a prompt that only a prompt in prefill keeps waiting. That its prefill is over is heard of after the
        step's end, when the next step has begun, and what is sent then waits for that to end too, beside batch work as
        long as for a prefill. Where that is enough of its TTFT for batch work to make way for it, one goes ahead of the
        news, behind the shortest, and is there for the next step; elsewhere it would cost ITL for nothing. While
        requests miss their ITL SLO, both together are no more prefill than those that decode can bear."""
        chosen: Instance | None = None
        least_s = min(_AHEAD * cost_s, _AHEAD_SHARE * request.ttft_slo_s - cost_s)
        for instance in self._by_rank[:_AHEAD_MAX]:
            backlog_s = instance.prefill_backlog_s
            if (
                backlog_s <= least_s
                and instance.heard_late
                and not (backlog_s + cost_s > instance.prefill_limit_s and self._spreads())
                and instance.role != "batch"
                and (chosen is None or backlog_s < least_s)
                and fits(instance, request, need)
            ):
                chosen, least_s = instance, backlog_s
        return chosen

    def _spreads(self) -> bool:
        missed = self._estimates.itl_missed
        self._spreading = missed > self._spreads_long * (_SPREAD_OFF if self._spreading else 1.0)
        return self._spreading

    def _choose_spread(self, request: Request, need: float, cost_s: float, now_s: float) -> Instance | None:
        """For a long prompt: each of its chunks is a step longer than the SLO, which an answer of a few tokens has
        nothing to average with. Of the instances that bound their prefill, those that packing fills last have the most
        room; among the first of them with room, the one with the fewest requests whose answer may still be short. If
        the last of them are full, the rest will be: it is not worth a walk through the fleet."""
        chosen: Instance | None = None
        fewest = probes = 0
        # Those of role batch have the highest ranks.
        end = bisect_left(self._by_rank, True, key=lambda other: other.role == "batch")
        for instance in reversed(self._by_rank[max(0, end - _SPREAD_MAX) : end]):
            if instance.role == "batch" or instance.prefill_limit_s == inf or not self._room_interactive(instance):
                continue
            if not (
                fits(instance, request, need)
                and self._prefill_fits(instance, request, cost_s, instance.prefill_backlog_s)
            ):
                continue
            young = _young(instance, now_s)
            if chosen is None or young < fewest:
                chosen, fewest = instance, young
            probes += 1
            if young == 0 or probes >= _PROBES_MAX:
                break
        return chosen

    def _is_usual(self, cost_s: float, need: float) -> bool:
        estimates = self._estimates
        usual = estimates.usual
        mean_s = usual.input_tokens * estimates.prefill_token_s + usual.input_square * estimates.prefill_square_s
        return cost_s <= _USUAL * mean_s and need <= _USUAL * usual.need_tokens

    def _prefill_fits(self, instance: Instance, request: Request, cost_s: float, backlog_s: float) -> bool:
        """The limit bounds what waits before the request; one too long for it alone needs most of it free."""
        limit_s = self._prefill_share * request.ttft_slo_s
        if instance.prefill_limit_s < limit_s:
            limit_s = instance.prefill_limit_s
        return backlog_s <= 1e-9 or backlog_s <= max(limit_s - cost_s, 0.3 * limit_s)

    def _room_interactive(self, instance: Instance) -> bool:
        note: Note = instance.index
        if (
            not note.open
            or instance.sequences >= instance.max_batch_size
            or instance.kv_reserved_tokens >= kv_limit(instance)
            or (self._strict and instance.role == "batch")
        ):
            return False
        backlog_s = instance.prefill_backlog_s
        return backlog_s == 0.0 or (
            backlog_s < instance.prefill_limit_s and backlog_s < self._prefill_share * self._estimates.ttft_max_s
        )

    # -- batch -------------------------------------------------------------------------------------------------

    def _choose_batch(self, pools: Pools, request: Request, tokens: int, need: float, cost_s: float) -> Instance | None:
        if request.kv_saved_tokens:
            home = self._home(request)
            if home is not None:
                return home
        usual = request.sequences == 1 and need <= _USUAL * self._estimates.usual_batch.need_tokens
        self.room_tokens = 0
        heaps = pools.batch
        passed: list[Passed] = []
        chosen: Instance | None = None
        while (heap := lowest(heaps)) and len(passed) < _PROBES_MAX:
            order = -heap[0] >> _RANK_BITS
            instance = self._at.get(-heap[0] & _RANK)
            if instance is None:
                heappop(heap)
                continue
            if order != _ROLE_ORDER[instance.role] or not self._room_batch(instance):
                heappop(heap)
                instance.index.in_batch = False
                if order != _ROLE_ORDER[instance.role]:
                    self.changed(instance)
                continue
            if fits(instance, request, need):
                if cost_s <= self._batch_prefill_room_s(instance):
                    chosen = instance
                    break
                heappop(heap)
                instance.index.in_batch = False
                self._refuse(instance)
                continue
            entry = heappop(heap)
            if usual and tokens < instance.kv_capacity_tokens <= request.kv_most_tokens:
                instance.index.in_batch = False
            else:
                passed.append((heap, entry))
        for heap, entry in passed:
            heappush(heap, entry)
        return chosen or self._choose_short(pools, request, need, cost_s)

    def _refuse(self, instance: Instance) -> None:
        """Remember, until the instance changes, how long a prompt it would take."""
        room_s = self._batch_prefill_room_s(instance)
        if room_s <= 0.0:
            return
        note: Note = instance.index
        note.short_s = room_s
        pool = note.pool
        heap = pool.short
        heappush(heap, (-room_s, -instance.rank, instance))
        if len(heap) > pool.short_max:
            heap[:] = [entry for entry in heap if -entry[0] == entry[2].index.short_s]
            heapify(heap)
            pool.short_max = 64 + 2 * len(heap)

    def _choose_short(self, pools: Pools, request: Request, need: float, cost_s: float) -> Instance | None:
        """Among those that have refused a longer prompt; the one that takes the longest comes first."""
        while heap := lowest_short(pools.short):
            room_s, _, instance = heap[0]
            note: Note = instance.index
            if not note.open or -room_s != note.short_s or not self._room_batch(instance):
                heappop(heap)
                continue
            if -room_s < cost_s:
                if self._passes_long:
                    self.room_tokens = int(-room_s / self._estimates.prefill_token_s)
                return None
            if fits(instance, request, need):
                return instance
            heappop(heap)
            note.short_s = 0.0
        return None

    def _home(self, request: Request) -> Instance | None:
        """The instance that holds the request's saved KV, if it has room."""
        home = request.instance_saved
        if home is None or home.id != request.kv_saved_on or home.kv_capacity_tokens > request.kv_most_tokens:
            return None
        return home if home.state == "ready" and self._room_batch(home) else None

    def _room_batch(self, instance: Instance) -> bool:
        note: Note = instance.index
        if not note.open or instance.role == "interactive":
            return False
        if instance.eviction_pause_until_s >= 0.0 and len(instance.batch) >= instance.eviction_left:
            return False
        running = instance.sequences
        own = instance.role == "batch" and not instance.running_interactive
        size = instance.max_batch_size
        if instance.batch_limit is not None and instance.batch_limit < size:
            size = instance.batch_limit
        if running >= (size if own else self._share_batch * size):
            return False
        if instance.kv_reserved_tokens >= kv_limit(instance):
            return False
        backlog_s = instance.prefill_backlog_s
        if backlog_s == 0.0:
            return True
        if own:
            return backlog_s < self._prefill_batch_s
        if self._keeps_apart and self._estimates.ttft_min_s == inf:
            # No interactive request has run yet: the first one waits for the step that is under way when it comes.
            return backlog_s < min(self._prefill_batch_s, self._prefill_share * self._estimates.ttft_told_s)
        return backlog_s < min(
            self._prefill_batch_s,
            self._prefill_share_batch * self._estimates.ttft_min_s,
            instance.prefill_limit_s,
        )

    def _batch_prefill_room_s(self, instance: Instance) -> float:
        """Prefill of the longest batch prompt that may go in now. Beside interactive requests it stays within what a
        step of theirs has left. A longer one goes in alone, within what their mean and the first tokens of those to
        come have left."""
        if not instance.running_interactive:
            return inf
        room_s = instance.prefill_step_s - instance.prefill_backlog_s
        if instance.prefill_backlog_s == 0.0 and not instance.batch_paced:
            alone_s = min(instance.prefill_limit_s, self._prefill_share * self._estimates.ttft_min_s)
            return max(room_s, alone_s)
        return room_s


def _entry(instance: Instance) -> int:
    return _ROLE_ORDER[instance.role] << _RANK_BITS | instance.rank


def _young(instance: Instance, now_s: float) -> int:
    """Interactive requests there without a first token, or with one of late; the last dispatched are the youngest."""
    young = seen = 0
    for request in reversed(instance.requests.values()):
        seen += 1
        if seen > _YOUNG_MAX:
            break
        if not request.interactive:
            continue
        if 0.0 <= request.first_token_s < now_s - _YOUNG_S:
            break
        young += 1
    return young


def _kv_without_batch(instance: Instance) -> float:
    """KV tokens reserved for interactive requests, about: their share by count."""
    return instance.kv_reserved_tokens * instance.running_interactive / max(1, len(instance.requests))
