"""``ooco-like``: after OOCO (arXiv 2511.21862): a fixed fleet in two pools, with batch work in either of them.

The latency-strict pool is for interactive requests, the latency-relaxed one for batch work::

    batch       : of both pools the instance whose bottleneck is the least with it. Beside interactive requests only
                  while the step stays within ``margin`` of their tightest ITL SLO and prompts are prefilled in time
    bottleneck  : the most of step time / (margin * ITL SLO), KV / capacity, sequences / places
    step        : fixed + b * B + c * S, for B sequences whose contexts end at S tokens
    interactive : the instance of the strict pool with the shortest step that keeps ITL and TTFT with it; else batch
                  work makes way there, last come first, as much of it as it takes; else likewise in the relaxed pool
    preemption  : besides, at each scrape: where steps have been longer than the tightest ITL SLO, batch work leaves in
                  proportion

Source: its abstract; no constants and no code are public. What is filled in is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf, isfinite, isnan
from typing import Annotated, Final, Literal

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.policy import Estimates, Policy
from chiron.policies.queues.deadline_groups import DeadlineGroups
from chiron.policies.ranges import AnyOf, Between
from chiron.policies.rivals.scalers.static import initial_count
from chiron.policies.rivals.schedulers.polyserve import keeps, step_s
from chiron.policies.routers.stale_entries import Changes, Entry, closed, current, opened
from chiron.policies.size import KV_FILL, fits, kv_tokens, placed, prefill_s, prompt_tokens
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, LocalView, ModelPlan

LOOKS: Final = 8
"""Instances of a pool that are looked at for a request."""
GROUP_SPAN_S: Final = 300.0

Pool = Literal["strict", "relaxed"]
POOLS: Final[tuple[Pool, Pool]] = ("strict", "relaxed")


@dataclass(frozen=True, slots=True, kw_only=True)
class OocoSettings:
    strict_share: Annotated[float, Between(0.2, 1.0)] = 0.5
    """Share of the instances that are of the strict pool, at least one. Ours, as all that follow."""
    offline_in_strict: Annotated[bool, AnyOf((True, False))] = True
    """Batch work may be in either pool (its abstract); False: in the relaxed one, if there is one."""
    margin: Annotated[float, Between(0.5, 1.0)] = 0.9
    """Share of the ITL SLO that a predicted step may take."""
    prefill_share: Annotated[float, Between(0.02, 1.0, log=True)] = 0.1
    """Share of the tightest TTFT SLO within which waiting prompts must be done where batch work is added."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Largest max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "strict_share", "margin", "prefill_share", "max_num_seqs")
        at_least(0, self, "instances")
        for name in ("strict_share", "margin"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")


def strict_of(settings: OocoSettings, count: int) -> int:
    """How many of so many instances are of the strict pool."""
    return min(count, max(1, round(settings.strict_share * count)))


class Pools:
    """The router. O(log n) a change, amortised."""

    def __init__(self, settings: OocoSettings, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._estimates = estimates
        self._by_step: dict[Pool, list[Entry]] = {pool: [] for pool in POOLS}
        """Shortest step first."""
        self._by_use: dict[Pool, list[Entry]] = {pool: [] for pool in POOLS}
        """The least bottleneck first."""
        self._by_batch: dict[Pool, list[Entry]] = {pool: [] for pool in POOLS}
        """The most batch work first; of those that have some."""
        self._size_max = 64
        self._itl_s: dict[str, float] = {}
        """Of each interactive class that came."""
        self._relaxed = 0
        """Instances of that pool that take work."""

    def add(self, instance: Instance) -> None:
        if opened(instance):
            self._relaxed += instance.role == "batch"
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        if closed(instance):
            self._relaxed -= instance.role == "batch"

    def changed(self, instance: Instance) -> None:
        changes: Changes = instance.index
        if not changes.open:
            return
        changes.last += 1
        pool: Pool = "relaxed" if instance.role == "batch" else "strict"
        step = step_s(self._estimates.step_times, instance.sequences, float(instance.kv_reserved_tokens))
        heappush(self._by_step[pool], (step, instance.id, changes.last, instance))
        heappush(self._by_use[pool], (self._use(instance, 0, 0.0), instance.id, changes.last, instance))
        if instance.batch:
            heappush(self._by_batch[pool], (-instance.batch_sequences, instance.id, changes.last, instance))
        families = (self._by_step, self._by_use, self._by_batch)
        if sum(len(heap) for family in families for heap in family.values()) > self._size_max:
            for family in families:
                for name in POOLS:
                    family[name] = current(family[name])
            self._size_max = 64 + 2 * sum(len(heap) for family in families for heap in family.values())

    def _tightest_s(self, instance: Instance) -> float:
        """ITL SLO among those that run there; inf: batch work alone."""
        return min((self._itl_s.get(name, inf) for name, count in instance.class_counts.items() if count), default=inf)

    def _use(self, instance: Instance, sequences: int, need: float) -> float:
        """How much of its bottleneck is used, with so much more."""
        itl_s = self._settings.margin * self._tightest_s(instance)
        times, reserved = self._estimates.step_times, instance.kv_reserved_tokens
        time = step_s(times, instance.sequences + sequences, reserved + need) / itl_s if isfinite(itl_s) else 0.0
        kv = (reserved + need) / (KV_FILL * instance.kv_capacity_tokens)
        places = (instance.sequences + sequences) / instance.max_batch_size
        return max(time, kv, places)

    # -- placement -------------------------------------------------------------------------------------------------

    def place(self, request: Request, waited_s: float) -> Placement | None:
        need, cost_s = kv_tokens(self._estimates, request), prefill_s(self._estimates, prompt_tokens(request))
        if not request.interactive:
            return self._place_batch(request, need, cost_s)
        self._itl_s[request.class_name] = request.itl_slo_s
        left_s = request.ttft_slo_s - waited_s
        if left_s < cost_s:
            left_s = inf  # It is late whatever happens; its ITL is not.
        for pool in POOLS:
            found = self._shortest_step(pool, request, need, cost_s, left_s)
            if found is None:
                found = self._make_way(pool, request, need, cost_s, left_s)
            if found is not None:
                return found
        return None

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()

    def _shortest_step(
        self, pool: Pool, request: Request, need: float, cost_s: float, left_s: float
    ) -> Placement | None:
        for instance in _first(self._by_step[pool]):
            if fits(instance, request, int(need)) and (
                not instance.requests
                or self._keeps(instance, request.itl_slo_s, (request.sequences, need, cost_s), left_s)
            ):
                return placed(self._estimates, request, instance)
        return None

    def _keeps(self, instance: Instance, itl_s: float, more: tuple[int, float, float], left_s: float) -> bool:
        """Whether it keeps the tightest ITL there and this one, and prefills what waits within the time that is left,
        with so many sequences, so much KV and so much prefill more."""
        itl_s = self._settings.margin * min(itl_s, self._tightest_s(instance))
        sequences, need, cost_s = more
        reserved, waits_s = instance.kv_reserved_tokens + need, instance.prefill_backlog_s + cost_s
        return keeps(self._estimates.step_times, instance.sequences + sequences, reserved, waits_s, itl_s, left_s)

    def _make_way(self, pool: Pool, request: Request, need: float, cost_s: float, left_s: float) -> Placement | None:
        for instance in _first(self._by_batch[pool]):
            if prompt_tokens(request) >= instance.kv_capacity_tokens:
                continue
            evict: list[Request] = []
            sequences, kv, prefill = request.sequences, need, cost_s
            for victim in reversed(instance.batch.values()):
                evict.append(victim)
                sequences, kv = sequences - victim.sequences, kv - victim.reserved_tokens
                prefill -= victim.prefill_cost_s
                alone = len(evict) == len(instance.requests)
                if alone or (
                    instance.sequences + sequences <= instance.max_batch_size
                    and instance.kv_reserved_tokens + kv <= KV_FILL * instance.kv_capacity_tokens
                    and self._keeps(instance, request.itl_slo_s, (sequences, kv, prefill), left_s)
                ):
                    made = placed(self._estimates, request, instance)
                    made.evict = tuple(evict)
                    return made
        return None

    def _place_batch(self, request: Request, need: float, cost_s: float) -> Placement | None:
        self.room_tokens = 0
        left_s = self._settings.prefill_share * self._estimates.ttft_min_s
        best: tuple[float, int, Instance] | None = None
        answer = need - prompt_tokens(request)
        pools: tuple[Pool, ...] = ("relaxed", "strict")
        if not self._settings.offline_in_strict and self._relaxed:
            pools = ("relaxed",)
        for place, pool in enumerate(pools):
            for instance in _first(self._by_use[pool]):
                if instance.eviction_pause_until_s >= 0.0 and len(instance.batch) >= instance.eviction_left:
                    continue
                if not fits(instance, request, int(need)):
                    if instance.sequences < instance.max_batch_size:
                        room = KV_FILL * instance.kv_capacity_tokens - instance.kv_reserved_tokens - answer
                        self.room_tokens = max(self.room_tokens, int(room))
                    continue
                if instance.running_interactive and not self._keeps(
                    instance, inf, (request.sequences, need, cost_s), left_s
                ):
                    continue
                use = self._use(instance, request.sequences, need)
                if best is None or (use, place) < best[:2]:
                    best = (use, place, instance)
        return None if best is None else placed(self._estimates, request, best[2])


def _first(heap: list[Entry]) -> Iterator[Instance]:
    """The first few of those whose entry is not stale. They stay in the heap."""
    passed: list[Entry] = []
    try:
        while heap and len(passed) < LOOKS:
            entry = heappop(heap)
            if entry[2] == entry[3].index.last:
                passed.append(entry)
                yield entry[3]
    finally:
        for entry in passed:
            heappush(heap, entry)


# -- preemption ----------------------------------------------------------------------------------------------------


def decide_batch_size(settings: OocoSettings, state: None, view: LocalView) -> tuple[LocalDecision | None, None]:
    """Where steps have been longer than the tightest ITL SLO, places for batch work are taken back in proportion, and
    given back once they are shorter."""
    interactive = sum(count for name, count in view.class_counts.items() if view.mixes[name].cls.interactive)
    batch = sum(view.class_counts.values()) - interactive
    size = min(settings.max_num_seqs, view.max_num_seqs)
    reason = "itl_kept"
    if interactive and isfinite(view.itl_slo_s) and not isnan(view.itl_s) and view.itl_s > view.itl_slo_s:
        if not batch:
            return None, None
        size = max(interactive, 1, int(min(size, view.dispatched) * view.itl_slo_s / view.itl_s))
        reason = "itl_above_slo"
    if size == view.max_batch_size:
        return None, None
    numbers = {"itl_s": view.itl_s, "itl_slo_s": view.itl_slo_s, "batch": float(batch)}
    return LocalDecision(max_batch_size=size, reason=reason, evicts=True, numbers=numbers), None


# -- the fleet -----------------------------------------------------------------------------------------------------


def initial_roles(settings: OocoSettings, count: int) -> dict[str, int]:
    count = initial_count(settings, count)
    strict = strict_of(settings, count)
    return {"interactive": strict, "mixed": 0, "batch": count - strict}


def decide_fleet(settings: OocoSettings, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    """It stays, and so do the pools."""
    plans: dict[str, ModelPlan] = {}
    for model in view.models:
        count = settings.instances or max(sum(model.planned.values()), model.min_instances)
        strict = strict_of(settings, count)
        plans[model.name] = ModelPlan(
            counts={"interactive": strict, "mixed": 0, "batch": count - strict}, reason="static"
        )
    return plans, None


def order_batch(settings: OocoSettings, estimates: Estimates) -> DeadlineGroups:
    return DeadlineGroups(GROUP_SPAN_S)


def make_ooco(settings: OocoSettings) -> Policy:
    return Policy(
        name="ooco-like",
        settings=settings,
        order_batch=order_batch,
        place=Pools,
        batch_size=decide_batch_size,
        fleet=decide_fleet,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
        initial_roles=initial_roles,
        group_span_s=GROUP_SPAN_S,
    )
