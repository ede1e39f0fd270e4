"""``polyserve``: PolyServe's scheduling of several SLOs (arXiv 2507.17769) on a fixed fleet.

Requests are binned by their ITL SLO, and each bin has servers of its own. A request goes to the *most* loaded server of
its bin that still keeps the SLOs with it, by prediction; if there is none, to the most loaded one of a tighter bin, the
next tighter first, that keeps that bin's SLO; then to an idle server, which joins its bin until it is idle again. So
load has a gradient, and the emptiest servers become free. A bin without any server gets the emptiest of a looser one,
once that is idle. Each bin has a queue of its own, earliest TTFT deadline first, and none waits for another. With B
sequences whose contexts end at S tokens::

    step     = fixed + b * B + c * S                          less than ``margin`` times the bin's ITL SLO
    TTFT     = (prefill that waits there + its own) / (1 - step / ITL SLO)         at most what is left of it

because a step has room for prefill as far as the ITL SLO leaves some (dynamic chunking, as each engine does it here by
the slack of what it decodes). Batch work is best effort: it fills what is left, and makes way for others.

Source: the paper's abstract and public notes; no code is published. What is filled in is in
docs/policies/schedulers.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf, isfinite
from typing import Annotated, Any

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.queues.order import KeyOrder, first_token_due_s
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.static import decide_fleet
from chiron.policies.rivals.schedulers.niyama import Niyama, NiyamaSettings
from chiron.policies.size import fits, kv_tokens, placed, prefill_s, prompt_tokens

_Entry = tuple[float, int, int, Instance]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolyServeSettings:
    margin: Annotated[float, Between(0.5, 1.0)] = 0.9
    """Share of the ITL SLO that a predicted step may take. Ours, as all that follow but ``chunks``."""
    chunks: bool = True
    """Steps take as much of a prompt as the slack of what they decode allows (its abstract)."""
    evicts: bool = True
    """Batch work makes way for an interactive request that no server could take."""
    victims: int = 8
    """Servers that are looked at for it, those with the most batch work first."""
    relegates: bool = True
    """With ``chunks``, prompts that would be late wait behind the others in an engine, as Niyama's."""
    caution: Annotated[float, Between(1.0, 1.5)] = 1.0
    """With ``chunks``, predicted times of steps count as so many times as long."""
    instances: Annotated[int, Between(1, 256, log=True)] = 0
    """Instances of each model; 0: the initial fleet stays."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "margin", "max_num_seqs", "victims", "caution")
        at_least(0, self, "instances")
        if self.margin > 1:
            raise ValueError(f"margin is {self.margin}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Of a server: what decides whether a request may join."""

    sequences: int
    kv_tokens: float
    prefill_s: float
    """That waits."""


def step_s(estimates: Estimates, load: Load) -> float:
    """A step that decodes all, at their expected ends."""
    times = estimates.step_times
    return times.fixed_s + times.per_sequence_s * load.sequences + times.per_context_token_s * load.kv_tokens


def keeps(estimates: Estimates, load: Load, itl_s: float, ttft_left_s: float) -> bool:
    """Whether a server with this load, the new request included, keeps a bin's ITL and the request's TTFT."""
    step = step_s(estimates, load)
    if step >= itl_s:
        return False  # Nothing would be left for prefill.
    share = 1.0 - step / itl_s if isfinite(itl_s) else 1.0
    return load.prefill_s <= ttft_left_s * share


class _Note:
    __slots__ = ("bin_s", "counted_s", "drains_for_s", "open", "version")

    def __init__(self) -> None:
        self.open = True
        self.version = 0
        self.bin_s = 0.0
        """ITL SLO of its bin; 0: it is idle and has none. One that has batch work only joins a tighter bin when an
        interactive request needs it."""
        self.counted_s = 0.0
        """The bin that counts it among its servers; 0: none."""
        self.drains_for_s = inf
        """Below inf: it takes nothing until it is idle, for a bin without servers."""


class MostLoaded:
    """The router. O(log n) a change, amortised; a server that could not even take the smallest request is not asked
    again before its load changes."""

    def __init__(self, settings: PolyServeSettings, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._estimates = estimates
        self._bins: dict[float, list[_Entry]] = {}
        """By ITL SLO, most loaded first."""
        self._idle: list[_Entry] = []
        self._batch: list[_Entry] = []
        self._servers: dict[float, int] = {}
        """By ITL SLO: how many the bin has."""
        self._draining: dict[float, Instance] = {}
        """By ITL SLO of the bin that it is for."""
        self._size_max = 64

    def add(self, instance: Instance) -> None:
        if instance.index is None:
            instance.index = _Note()
        instance.index.open = True
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        instance.index.open = False
        instance.index.version += 1
        instance.index.drains_for_s = inf
        self._count(instance.index, 0.0)

    def _count(self, note: _Note, bin_s: float) -> None:
        if note.counted_s != bin_s:
            for each_s, sign in ((note.counted_s, -1), (bin_s, 1)):
                if each_s:
                    self._servers[each_s] = self._servers.get(each_s, 0) + sign
            note.counted_s = bin_s

    def changed(self, instance: Instance) -> None:
        note: _Note = instance.index
        if not note.open:
            return
        note.version += 1
        if not instance.requests:
            note.bin_s, note.drains_for_s = 0.0, inf
            heappush(self._idle, (0.0, instance.id, note.version, instance))
        else:
            if note.bin_s == 0.0:
                note.bin_s = min(request.itl_slo_s for request in instance.requests.values())
            if note.drains_for_s == inf:
                key = -step_s(self._estimates, _load(instance, 0, 0.0, 0.0))
                heappush(self._bins.setdefault(note.bin_s, []), (key, instance.id, note.version, instance))
            if instance.batch:
                heappush(self._batch, (-instance.batch_sequences, instance.id, note.version, instance))
        self._count(note, note.bin_s)
        self._shrink()

    def _shrink(self) -> None:
        """Entries that are over are dropped when they are most of all."""
        heaps = [self._idle, self._batch, *self._bins.values()]
        if sum(map(len, heaps)) > self._size_max:
            for heap in heaps:
                heap[:] = [entry for entry in heap if _is_current(entry)]
                heapify(heap)
            self._size_max = 64 + 2 * sum(map(len, heaps))

    # -- placement ---------------------------------------------------------------------------------------------------

    def place(self, request: Request, waited_s: float) -> Placement | None:
        found = self.find(request, waited_s)
        if found is not None:
            note: _Note = found.instance.index
            note.bin_s = min(note.bin_s, request.itl_slo_s)  # Of one that was idle it is 0 until the request is there.
            note.drains_for_s = inf
        else:
            self.refused(request)
        return found

    def find(self, request: Request, waited_s: float) -> Placement | None:
        """Where it would be placed; nothing is changed."""
        estimates = self._estimates
        need, cost_s = kv_tokens(estimates, request), prefill_s(estimates, prompt_tokens(request))
        left_s = request.ttft_slo_s - waited_s
        if left_s < cost_s:
            left_s = inf  # It is late whatever happens; its ITL is not.
        own_s = request.itl_slo_s
        tighter = sorted((bin_s for bin_s in self._bins if bin_s < own_s), reverse=True)
        for bin_s in (own_s, *tighter):
            found = self._most_loaded(bin_s, request, need, cost_s, left_s)
            if found is not None:
                return placed(estimates, request, found)
        found = self._idle_one(request, need)
        if found is not None:
            return placed(estimates, request, found)
        if request.interactive:
            return self._make_way(request, need, cost_s, left_s)
        return None

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()

    def _most_loaded(
        self, bin_s: float, request: Request, need: float, cost_s: float, left_s: float
    ) -> Instance | None:
        heap = self._bins.get(bin_s)
        if not heap:
            return None
        itl_s = bin_s * self._settings.margin
        passed: list[_Entry] = []
        found: Instance | None = None
        while heap and found is None:
            entry = heap[0]
            instance = entry[3]
            if not _is_current(entry):
                heappop(heap)
            elif fits(instance, request, int(need)) and keeps(
                self._estimates, _load(instance, request.sequences, need, cost_s), itl_s, left_s
            ):
                found = instance
            else:
                heappop(heap)
                if instance.sequences < instance.max_batch_size and keeps(
                    self._estimates, _load(instance, 1, 1.0, 0.0), itl_s, inf
                ):
                    passed.append(entry)
        for entry in passed:
            heappush(heap, entry)
        return found

    def _idle_one(self, request: Request, need: float) -> Instance | None:
        """An idle server takes any request that its KV can hold."""
        small: list[_Entry] = []
        found: Instance | None = None
        while self._idle and found is None:
            entry = self._idle[0]
            if not _is_current(entry):
                heappop(self._idle)
            elif fits(entry[3], request, int(need)):
                found = entry[3]
            else:
                small.append(heappop(self._idle))
        for entry in small:
            heappush(self._idle, entry)
        return found

    def _make_way(self, request: Request, need: float, cost_s: float, left_s: float) -> Placement | None:
        passed: list[_Entry] = []
        made: Placement | None = None
        while self._batch and made is None and len(passed) < self._settings.victims:
            entry = heappop(self._batch)
            if _is_current(entry):
                passed.append(entry)
                evict = self._leaving(entry[3], request, need, cost_s, left_s)
                if evict is not None:
                    made = placed(self._estimates, request, entry[3])
                    made.evict = evict
        for entry in passed:
            heappush(self._batch, entry)
        return made

    def _leaving(
        self, instance: Instance, request: Request, need: float, cost_s: float, left_s: float
    ) -> tuple[Request, ...] | None:
        """Batch work, last come first, until the request may join; it may be none. None: that is not enough."""
        bin_s: float = instance.index.bin_s
        if prompt_tokens(request) >= instance.kv_capacity_tokens or instance.index.drains_for_s < request.itl_slo_s:
            return None
        if bin_s > request.itl_slo_s:
            if instance.running_interactive:
                return None  # Of a looser bin: never the reverse.
            bin_s = request.itl_slo_s
        sequences, reserved = instance.sequences, float(instance.kv_reserved_tokens)
        prefill = instance.prefill_backlog_s + cost_s
        load = Load(sequences=sequences + request.sequences, kv_tokens=reserved + need, prefill_s=prefill)
        fits_beside = bin_s < instance.index.bin_s and fits(instance, request, int(need))
        if fits_beside and self._may_join(instance, load, bin_s, left_s):
            return ()
        evict: list[Request] = []
        for victim in reversed(instance.batch.values()) if self._settings.evicts else ():
            sequences -= victim.sequences
            reserved -= victim.reserved_tokens
            prefill -= victim.prefill_cost_s
            evict.append(victim)
            load = Load(sequences=sequences + request.sequences, kv_tokens=reserved + need, prefill_s=prefill)
            if self._may_join(instance, load, bin_s, left_s):
                return tuple(evict)
        return None

    def refused(self, request: Request) -> None:
        """If no bin that may serve an interactive request has a server: the emptiest of a looser bin takes nothing more
        until it is idle, and whoever is the next then has it."""
        itl_s = request.itl_slo_s
        if not request.interactive or any(count and bin_s <= itl_s for bin_s, count in self._servers.items()):
            return
        before = self._draining.get(itl_s)
        if before is not None and before.index.open and before.index.drains_for_s == itl_s:
            return
        looser = [entry for heap in self._bins.values() for entry in heap if _is_current(entry)]
        if looser:
            instance = max(looser)[3]  # Keys are negative loads.
            instance.index.drains_for_s = itl_s
            self._draining[itl_s] = instance
            self.changed(instance)

    def _may_join(self, instance: Instance, load: Load, bin_s: float, left_s: float) -> bool:
        return (
            load.sequences <= instance.max_batch_size
            and load.kv_tokens <= instance.kv_capacity_tokens
            and keeps(self._estimates, load, bin_s * self._settings.margin, left_s)
        )


def _is_current(entry: _Entry) -> bool:
    note: _Note = entry[3].index
    return note.open and entry[2] == note.version


def _load(instance: Instance, sequences: int, need: float, cost_s: float) -> Load:
    """With another of so many sequences, so much KV and so much prefill."""
    return Load(
        sequences=instance.sequences + sequences,
        kv_tokens=instance.kv_reserved_tokens + need,
        prefill_s=instance.prefill_backlog_s + cost_s,
    )


class BinOrder:
    """A queue for each ITL SLO, earliest TTFT deadline first. The head is the first of those that the router has a
    place for now; one that passes another takes no room that the other waits for."""

    def __init__(self, router: MostLoaded) -> None:
        self._router = router
        self._lanes: dict[float, KeyOrder] = {}

    def __iter__(self) -> Iterator[Request]:
        for lane in self._lanes.values():
            yield from lane

    def add(self, request: Request, now_s: float) -> None:
        self._lanes.setdefault(request.itl_slo_s, KeyOrder()).add(request, now_s)

    def forget(self, request: Request) -> None:
        """Nothing to do: it is seen to have ended."""

    def head(self, now_s: float) -> Request | None:
        heads = [head for lane in self._lanes.values() if (head := lane.head(now_s)) is not None]
        if len(heads) > 1:
            heads.sort(key=lambda head: (first_token_due_s(head), head.id))
            refused_s = 0.0
            for head in heads:
                found = self._router.find(head, now_s - head.arrival_s)
                if found is None:
                    self._router.refused(head)
                elif found.instance.index.bin_s == 0.0 or found.instance.index.bin_s > refused_s:
                    return head
                refused_s = max(refused_s, head.itl_slo_s)
        return heads[0] if heads else None

    def remove_head(self, request: Request, now_s: float) -> None:
        self._lanes[request.itl_slo_s].remove_head(request, now_s)

    def never_ran(self, request: Request) -> None:
        """Nobody is charged."""

    def only_lost(self) -> bool:
        """It does not know."""
        return False

    def lost(self) -> Request | None:
        return None

    def oldest_arrival_s(self) -> float:
        return min((lane.oldest_arrival_s() for lane in self._lanes.values()), default=inf)


def compose(settings: PolyServeSettings, estimates: Estimates) -> Niyama:
    """Prompts by the deadline of their first token, in chunks that fit the slack."""
    return Niyama(NiyamaSettings(weight_s=0.0, relegates=settings.relegates, caution=settings.caution))


def make_polyserve(settings: PolyServeSettings) -> Policy:
    routers: dict[int, tuple[Estimates, MostLoaded]] = {}

    def place(_: Any, estimates: Estimates) -> MostLoaded:
        """One router for each model, which its order asks."""
        return routers.setdefault(id(estimates), (estimates, MostLoaded(settings, estimates)))[1]

    def order(_: Any, estimates: Estimates) -> BinOrder:
        return BinOrder(place(None, estimates))

    return Policy(
        name="polyserve",
        settings=settings,
        order=order,
        place=place,
        compose=compose if settings.chunks else None,
        fleet=decide_fleet,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
