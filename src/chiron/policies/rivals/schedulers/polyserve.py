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

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Annotated, Any, NamedTuple

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.queues.order import KeyOrder, first_token_due_s
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.rivals.schedulers.niyama import Niyama, NiyamaSettings
from chiron.policies.size import fits, kv_tokens, placed, prefill_s, prompt_tokens
from chiron.policies.views import StepTimes

_Entry = tuple[float, int, Instance]


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
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "margin", "max_num_seqs", "victims", "caution")
        at_least(0, self, "instances")
        if self.margin > 1:
            raise ValueError(f"margin is {self.margin}; it must be above 0 and at most 1")


def step_s(times: StepTimes, sequences: int, kv_tokens: float) -> float:
    """A step that decodes all, at their expected ends."""
    return times.fixed_s + times.per_sequence_s * sequences + times.per_context_token_s * kv_tokens


def keeps(
    times: StepTimes, sequences: int, kv_tokens: float, prefill_s: float, itl_s: float, ttft_left_s: float
) -> bool:
    """Whether a server with this load, the new request included, keeps a bin's ITL and the request's TTFT.
    ``prefill_s``: what waits there."""
    step = step_s(times, sequences, kv_tokens)
    if step >= itl_s:
        return False  # Nothing would be left for prefill.
    share = 1.0 - step / itl_s if isfinite(itl_s) else 1.0
    return prefill_s <= ttft_left_s * share


class _Note:
    __slots__ = ("batch_entry", "bin_s", "counted_s", "drains_for_s", "entries", "entry", "open", "without_batch")

    def __init__(self) -> None:
        self.open = True
        self.bin_s = 0.0
        """ITL SLO of its bin; 0: it is idle and has none. One that has batch work only joins a tighter bin when an
        interactive request needs it."""
        self.counted_s = 0.0
        """The bin that counts it among its servers; 0: none."""
        self.drains_for_s = inf
        """Below inf: it takes nothing until it is idle, for a bin without servers."""
        self.entry: _Entry | None = None
        """In ``entries``, those of its bin or the idle ones."""
        self.entries: list[_Entry] = []
        self.batch_entry: _Entry | None = None
        self.without_batch: _WithoutBatch | None = None
        """As of its last change, once it has been asked for."""


class _WithoutBatch(NamedTuple):
    """What a server would have if all batch work left it."""

    sequences: int
    kv_tokens: float
    prefill_s: tuple[float, ...]
    """What it no longer had of that, last come first."""


class _Known(NamedTuple):
    """Where a request would be placed, and of what that is a function while no server changes."""

    request: Request
    found: Placement | None
    times: StepTimes
    asked: tuple[float, ...]
    left_s: float


class MostLoaded:
    """The router. A bin is a sorted list, O(log n) a change but for moving pointers; a server that could not even take
    the smallest request is not asked again before its load changes, nor is anybody for a request that found no room."""

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
        self._known: dict[int, _Known] = {}
        """By request, since the last change."""

    def add(self, instance: Instance) -> None:
        if instance.index is None:
            instance.index = _Note()
        instance.index.open = True
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        note: _Note = instance.index
        note.open = False
        note.drains_for_s = inf
        self._take_out(note)
        self._count(note, 0.0)

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
        self._take_out(note)
        if not instance.requests:
            note.bin_s, note.drains_for_s = 0.0, inf
            self._put(note, self._idle, (0.0, instance.id, instance))
        else:
            if note.bin_s == 0.0:
                note.bin_s = min(request.itl_slo_s for request in instance.requests.values())
            if note.drains_for_s == inf:
                load_s = step_s(self._estimates.step_times, instance.sequences, float(instance.kv_reserved_tokens))
                self._put(note, self._bins.setdefault(note.bin_s, []), (-load_s, instance.id, instance))
            if instance.batch:
                note.batch_entry = (-instance.batch_sequences, instance.id, instance)
                insort(self._batch, note.batch_entry)
        self._count(note, note.bin_s)

    def _put(self, note: _Note, entries: list[_Entry], entry: _Entry) -> None:
        note.entry, note.entries = entry, entries
        insort(entries, entry)

    def _take_out(self, note: _Note) -> None:
        self._known.clear()
        note.without_batch = None
        if note.entry is not None:
            del note.entries[bisect_left(note.entries, note.entry)]
            note.entry = None
        if note.batch_entry is not None:
            del self._batch[bisect_left(self._batch, note.batch_entry)]
            note.batch_entry = None

    # -- placement ---------------------------------------------------------------------------------------------------

    def place(self, request: Request, waited_s: float) -> Placement | None:
        found = self.find(request, waited_s)
        if found is not None:
            note: _Note = found.instance.index
            note.bin_s = min(note.bin_s, request.itl_slo_s)  # Of one that was idle it is 0 until the request is there.
            note.drains_for_s = inf
            self._known.clear()
        else:
            self.refused(request)
        return found

    def find(self, request: Request, waited_s: float) -> Placement | None:
        """Where it would be placed; nothing is changed."""
        estimates = self._estimates
        tokens = prompt_tokens(request)
        need, cost_s = kv_tokens(estimates, request), prefill_s(estimates, tokens)
        left_s = request.ttft_slo_s - waited_s
        if left_s < cost_s:
            left_s = inf  # It is late whatever happens; its ITL is not.
        times, asked = estimates.step_times, (tokens, need, cost_s, request.kv_most_tokens)
        known = self._known.get(request.id)
        if (
            known is not None
            and known.request is request
            and known.times is times
            and known.asked == asked
            and (left_s == known.left_s or (known.found is None and left_s < known.left_s))
        ):
            return known.found  # What found no room finds none with less time.
        found = self._found(request, need, cost_s, left_s)
        self._known[request.id] = _Known(request, found, times, asked, left_s)
        return found

    def _found(self, request: Request, need: float, cost_s: float, left_s: float) -> Placement | None:
        own_s = request.itl_slo_s
        tighter = sorted((bin_s for bin_s in self._bins if bin_s < own_s), reverse=True)
        for bin_s in (own_s, *tighter):
            found = self._most_loaded(bin_s, request, need, cost_s, left_s)
            if found is not None:
                return placed(self._estimates, request, found)
        for _, _, instance in self._idle:  # An idle server takes any request that its KV can hold.
            if fits(instance, request, int(need)):
                return placed(self._estimates, request, instance)
        if request.interactive:
            return self._make_way(request, need, cost_s, left_s)
        return None

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()

    def _most_loaded(
        self, bin_s: float, request: Request, need: float, cost_s: float, left_s: float
    ) -> Instance | None:
        times, itl_s, entries = self._estimates.step_times, bin_s * self._settings.margin, self._bins.get(bin_s, ())
        full: list[Instance] = []
        found: Instance | None = None
        for _, _, instance in entries:
            sequences, reserved, waits_s = instance.sequences, instance.kv_reserved_tokens, instance.prefill_backlog_s
            if fits(instance, request, int(need)) and keeps(
                times, sequences + request.sequences, reserved + need, waits_s + cost_s, itl_s, left_s
            ):
                found = instance
                break
            if sequences >= instance.max_batch_size or not keeps(
                times, sequences + 1, reserved + 1.0, waits_s, itl_s, inf
            ):
                full.append(instance)
        for instance in full:
            note: _Note = instance.index
            assert note.entry is not None
            del note.entries[bisect_left(note.entries, note.entry)]
            note.entry = None
        return found

    def _make_way(self, request: Request, need: float, cost_s: float, left_s: float) -> Placement | None:
        for _, _, instance in self._batch[: self._settings.victims]:
            evict = self._leaving(instance, request, need, cost_s, left_s)
            if evict is not None:
                made = placed(self._estimates, request, instance)
                made.evict = evict
                return made
        return None

    def _leaving(
        self, instance: Instance, request: Request, need: float, cost_s: float, left_s: float
    ) -> tuple[Request, ...] | None:
        """Batch work, last come first, until the request may join; it may be none. None: that is not enough."""
        note: _Note = instance.index
        bin_s = note.bin_s
        if prompt_tokens(request) >= instance.kv_capacity_tokens or note.drains_for_s < request.itl_slo_s:
            return None
        if bin_s > request.itl_slo_s:
            if instance.running_interactive:
                return None  # Of a looser bin: never the reverse.
            bin_s = request.itl_slo_s
        sequences, reserved = instance.sequences + request.sequences, float(instance.kv_reserved_tokens)
        waits_s, itl_s = instance.prefill_backlog_s + cost_s, bin_s * self._settings.margin
        fits_beside = bin_s < note.bin_s and fits(instance, request, int(need))
        if fits_beside and self._may_join(instance, sequences, reserved + need, waits_s, itl_s, left_s):
            return ()
        if not self._settings.evicts or not self._enough(instance, request, need, waits_s, itl_s, left_s):
            return None
        evict: list[Request] = []
        for victim in reversed(instance.batch.values()):
            sequences -= victim.sequences
            reserved -= victim.reserved_tokens
            waits_s -= victim.prefill_cost_s
            evict.append(victim)
            if self._may_join(instance, sequences, reserved + need, waits_s, itl_s, left_s):
                return tuple(evict)
        return None

    def _enough(
        self, instance: Instance, request: Request, need: float, waits_s: float, itl_s: float, left_s: float
    ) -> bool:
        """Whether the request may join once all batch work has left. The less there is the better for it, so if not,
        there is no need to look at who leaves."""
        note: _Note = instance.index
        without = note.without_batch
        if without is None:
            batch = instance.batch.values()
            without = note.without_batch = _WithoutBatch(
                instance.sequences - sum(victim.sequences for victim in batch),
                float(instance.kv_reserved_tokens - sum(victim.reserved_tokens for victim in batch)),
                tuple(victim.prefill_cost_s for victim in reversed(batch) if victim.prefill_cost_s),
            )
        for cost_s in without.prefill_s:  # In the order of ``_leaving``, for the same sum.
            waits_s -= cost_s
        sequences = without.sequences + request.sequences
        return self._may_join(instance, sequences, without.kv_tokens + need, waits_s, itl_s, left_s)

    def refused(self, request: Request) -> None:
        """If no bin that may serve an interactive request has a server: the emptiest of a looser bin takes nothing more
        until it is idle, and whoever is the next then has it."""
        itl_s = request.itl_slo_s
        if not request.interactive or any(count and bin_s <= itl_s for bin_s, count in self._servers.items()):
            return
        before = self._draining.get(itl_s)
        if before is not None and before.index.open and before.index.drains_for_s == itl_s:
            return
        emptiest = [entries[-1] for entries in self._bins.values() if entries]
        if emptiest:
            instance = max(emptiest)[2]  # Keys are negative loads.
            instance.index.drains_for_s = itl_s
            self._draining[itl_s] = instance
            self.changed(instance)

    def _may_join(
        self, instance: Instance, sequences: int, kv_tokens: float, waits_s: float, itl_s: float, left_s: float
    ) -> bool:
        return (
            sequences <= instance.max_batch_size
            and kv_tokens <= instance.kv_capacity_tokens
            and keeps(self._estimates.step_times, sequences, kv_tokens, waits_s, itl_s, left_s)
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
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
