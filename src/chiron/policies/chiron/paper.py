"""``chiron-paper``: the published design (arXiv 2501.08090), as far as public sources describe it.

Local, per instance (Algorithm 1), on the max batch size B::

    BP = max(ITL / ITL SLO, throughput before / throughput now)
    B <- alpha B/BP + (1 - alpha) B   while BP < 1;   B <- B/2 otherwise

Dispatch: interactive and batch requests prefer instances of their own role, then mixed ones, packed; an interactive
request evicts batch work from a mixed instance, which goes back to the queue with its KV saved.

Global, interactive: IBP = busy / (interactive + mixed), busy: those that run an interactive request. N = busy/Theta.
Global, batch: the waiting time of each request group, W = (n mu + z sigma sqrt(n)) / (N T), against the time to its
deadline; BBP = groups that would be late; batch instances are added until BBP = 0 and all go when no batch request
waits.

No source gives the whole; every gap is a setting here, with its reason in docs/policies/chiron.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, inf, isnan, sqrt
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt

from chiron.core.kept import Kept
from chiron.core.types import Role
from chiron.policies.capacity import capacity
from chiron.policies.checks import above, at_least
from chiron.policies.instances import take_back_fullest
from chiron.policies.policy import LOAD_AGE_MAX_S, PAST_MAX_S, ClassesOf, Estimates, Policy
from chiron.policies.queues.deadline_groups import DeadlineGroups
from chiron.policies.ranges import Between
from chiron.policies.routers.packing import PackingRouter
from chiron.policies.routers.packing_settings import PackingSettings
from chiron.policies.views import (
    ClassMix,
    FleetPlan,
    FleetView,
    InstanceView,
    LocalDecision,
    LocalView,
    ModelPlan,
    ModelView,
)

ROUNDING = 1e-9
"""Forgiven when rounding up: 1/Theta is rarely exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChironPaperSettings:
    # Local loop.
    alpha: Annotated[float, Between(0.1, 1.0)] = 0.5
    """Weight of B/BP (called the paper's by two re-implementations)."""
    initial_max_batch_size: int = 64
    """B at first; unknown. Safe for both model sizes, and growth is fast."""
    local_period_s: float = 5.0
    """Between moves of one B; unknown. An instance refills within a few seconds, so each move is seen before the
    next, and twenty moves fit into the 150 s in which the paper converges."""
    backpressure_min: float = 0.25
    """BP counts as at least this, so that an idle or SLO-less instance does not send B to infinity: B grows at most
    2.5-fold a move."""
    grow_needs_binding: bool = True
    """B grows only while the cap is full: what was measured below it says nothing of it."""
    halve_needs_obeyed: bool = True
    """B is not halved again while more requests run than it allows, until they have left."""
    throughput_term: bool = True
    """Off: BP = ITL / ITL SLO alone."""
    throughput_needs_binding: bool = True
    """The throughput term counts only while the cap is full: load alone moves throughput too."""
    throughput_after_increase: bool = True
    """... and only if the last move was an increase: a halving lowers throughput and would be answered by the next."""
    throughput_needs_loss: bool = True
    """... and only as a loss of more than ``throughput_tolerance``. Near a plateau the ratio is close to 1: as it
    stands it would stop the growth far below the SLO, and at 1 halve B for ever."""
    throughput_tolerance: float = 0.05
    # Dispatch.
    packing: PackingSettings = PackingSettings()
    """What "has no capacity" means besides B and KV: see ``policies.routers.packing``; unknown."""
    # Global loop, interactive.
    tick_s: float = 10.0
    """Period; unknown. Well below the cold start."""
    theta: Annotated[float, Between(0.1, 1.0)] = 1 / 3
    """Target of IBP: busy instances over all. The paper's example, for spikes of three times the load."""
    theta_from_history: bool = False
    """Theta = 1 / the spike of ``spike_quantile`` seen between one cold start's time and the next, once ten of them
    have passed; within ``theta_min`` and ``theta_max``."""
    spike_quantile: float = 0.99
    theta_min: float = 0.1
    theta_max: float = 0.9
    history_s: int = 3600
    grow: Literal["mixed", "interactive"] = "mixed"
    """Pool that follows N; unknown. The other keeps its initial size as far as N allows, and one instance is always
    mixed. Over-provisioned mixed instances do batch work meanwhile, which the paper wants of spare capacity;
    interactive ones idle, and near the bounds of the fleet they take the place of batch instances."""
    interactive_share: Annotated[float, Between(0.0, 1.0)] = 1 / 3
    """Share of the initial fleet of role interactive, the rest is mixed; unknown. Theta's: what is expected busy."""
    shrink_after_s: Annotated[float, Between(30.0, 600.0, log=True)] = 60.0
    """N falls to the most that was wanted over this time; unknown. Packed dispatch makes busy instances flicker."""
    # Global loop, batch.
    quantile_z: float = 2.33
    """z of the waiting time: its 99th percentile."""
    count_cold_start: bool = True
    """Added batch instances work from the measured cold start on."""
    group_span_s: float = 300.0
    """Batch requests whose deadlines share a span of this length form a group; the paper's clustering is unknown."""
    revive: bool = True
    """A scale-up takes back an instance that drains."""

    def __post_init__(self) -> None:
        for name in ("alpha", "backpressure_min", "theta", "theta_min", "theta_max", "spike_quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        above(0, self, "initial_max_batch_size", "tick_s", "history_s", "group_span_s")
        at_least(0, self, "local_period_s", "throughput_tolerance", "shrink_after_s", "quantile_z")
        if not 0 <= self.interactive_share <= 1:
            raise ValueError(f"interactive_share is {self.interactive_share}; it must lie in 0..1")
        if not self.theta_min <= self.theta_max:
            raise ValueError(f"theta_min is {self.theta_min}; it must be at most theta_max ({self.theta_max})")


# -- local ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalState:
    moved_s: float = -inf
    throughput: float = 0.0
    """Tokens per second when B was last moved; 0: unknown."""
    increased: bool = False
    """The last move was an increase."""


def decide_batch_size(
    settings: ChironPaperSettings, state: LocalState | None, view: LocalView
) -> tuple[LocalDecision | None, LocalState]:
    """Algorithm 1, gated."""
    state = state or LocalState()
    if view.now_s - state.moved_s < settings.local_period_s or isnan(view.itl_s):
        return None, state
    before = view.max_batch_size
    latency = view.itl_s / view.itl_slo_s
    throughput = throughput_backpressure(settings, state, view)
    backpressure = max(latency, throughput)
    numbers = {
        "itl_s": view.itl_s,
        "itl_slo_s": view.itl_slo_s,
        "bp": backpressure,
        "lbp": latency,
        "tbp": throughput,
    }
    if backpressure < 1.0:
        if settings.grow_needs_binding and not view.at_cap:
            return None, state
        bounded = max(backpressure, settings.backpressure_min)
        size = round(settings.alpha * before / bounded + (1.0 - settings.alpha) * before)
        reason = "backpressure_below_1"
    else:
        if settings.halve_needs_obeyed and view.dispatched > before:
            return None, state
        size = before // 2
        reason = "throughput_fell" if throughput > latency else "itl_above_slo"
    size = max(1, min(size, view.max_num_seqs))
    if size == before:
        return None, state
    state = LocalState(moved_s=view.now_s, throughput=view.throughput, increased=size > before)
    return LocalDecision(max_batch_size=size, evicts=True, reason=reason, numbers=numbers), state


def throughput_backpressure(settings: ChironPaperSettings, state: LocalState, view: LocalView) -> float:
    """Throughput before over throughput now; 0 where a gate is closed."""
    closed = (
        not settings.throughput_term
        or (settings.throughput_needs_binding and not view.at_cap)
        or (settings.throughput_after_increase and not state.increased)
    )
    if closed or state.throughput <= 0.0 or view.throughput <= 0.0:
        return 0.0
    ratio = state.throughput / view.throughput
    if settings.throughput_needs_loss and ratio <= 1.0 + settings.throughput_tolerance:
        return 0.0
    return ratio


# -- global --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """What the global loop remembers of one model."""

    kept: int | None
    """Instances of the pool that does not grow, as found; None: they have not been counted yet."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, interactive and mixed instances wanted) over ``shrink_after_s``."""
    arrivals: npt.NDArray[np.float64]
    """Interactive requests in each second up to the last tick, the last ``history_s``."""


State = dict[str, Memory]


def decide_fleet(settings: ChironPaperSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: IBP sizes interactive and mixed, BBP sizes batch."""
    state = state or {}
    plans: dict[str, ModelPlan] = {}
    memories: State = {}
    for model in view.models:
        memory = state.get(model.name) or Memory(kept=None, arrivals=np.zeros(0))
        plans[model.name], memories[model.name] = _decide_model(settings, memory, model, view)
    return plans, memories


def _decide_model(
    settings: ChironPaperSettings, memory: Memory, model: ModelView, view: FleetView
) -> tuple[ModelPlan, Memory]:
    now_s = view.now_s
    memory = _remember(settings, memory, model, view)
    kept = _kept(settings, model) if memory.kept is None else memory.kept
    serving = [i for i in model.instances if i.state in ("ready", "starting") and i.role != "batch"]
    busy = sum(1 for i in serving if i.dispatched_interactive > 0)
    theta = _theta(settings, memory, model)
    # An empty fleet has no busy instance; a request that waits needs one.
    least = max(model.min_instances, 1 if model.waiting_interactive else 0)
    wanted = min(max(ceil(busy / theta - ROUNDING), least), model.max_instances)
    current = model.planned.get("interactive", 0) + model.planned.get("mixed", 0)
    history = memory.wanted or ((now_s, current),)
    window = (*(w for w in history if w[0] > now_s - settings.shrink_after_s), (now_s, wanted))
    # Up at once; down to the most that was wanted lately.
    count = max(wanted, min(current, max(n for _, n in window)))
    interactive, mixed = _split(settings, kept, count)
    batch, bbp = _batch_instances(settings, model, now_s)
    counts: dict[Role, int] = {"interactive": interactive, "mixed": mixed, "batch": batch}
    plan = ModelPlan(
        counts=counts,
        reason=_reason(count, current, batch, model.planned.get("batch", 0)),
        numbers={"busy": float(busy), "theta": theta, "wanted": float(wanted)},
        ibp=busy / max(1, len(serving)),
        ibp_target=theta,
        bbp=float(bbp),
    )
    return plan, replace(memory, kept=kept, wanted=window)


def _kept(settings: ChironPaperSettings, model: ModelView) -> int:
    return model.planned["interactive" if settings.grow == "mixed" else "mixed"]


def _split(settings: ChironPaperSettings, kept: int, count: int) -> tuple[int, int]:
    """(interactive, mixed) instances of ``count``."""
    mixed = count - kept if settings.grow == "mixed" else kept
    mixed = min(max(mixed, 1), count)
    return count - mixed, mixed


def _reason(count: int, current: int, batch: int, batch_before: int) -> str:
    if count > current:
        return "ibp_above_theta"
    if batch > batch_before:
        return "bbp_above_0"
    if batch < batch_before:
        return "batch_queue_empty"
    return "ibp_below_theta" if count < current else "steady"


def _remember(settings: ChironPaperSettings, memory: Memory, model: ModelView, view: FleetView) -> Memory:
    """Append the seconds since the last tick, and take back what arrived before and never ran."""
    if not settings.theta_from_history:
        return memory
    seconds = max(0, int(view.now_s) - int(view.now_s - view.since_s))
    counts = np.concatenate((memory.arrivals, np.zeros(seconds)))
    first = int(view.now_s) - len(counts)
    for arrival in model.arrivals:
        if arrival.cls.interactive and 0 <= arrival.second - first < len(counts):
            counts[arrival.second - first] += arrival.requests
    return replace(memory, arrivals=counts[-settings.history_s :])


def _theta(settings: ChironPaperSettings, memory: Memory, model: ModelView) -> float:
    window = max(1, round(model.cold_start_s))
    if not settings.theta_from_history or len(memory.arrivals) < 10 * window:
        return settings.theta
    spike = spike_ratio(memory.arrivals, window, settings.spike_quantile)
    return min(max(1.0 / spike, settings.theta_min), settings.theta_max)


def spike_ratio(arrivals: npt.NDArray[np.float64], window: int, quantile: float) -> float:
    """Quantile of arrivals in ``window`` seconds over those in the ``window`` before; at least 1."""
    sums = np.cumsum(np.concatenate(([0.0], arrivals)))
    counts = sums[window:] - sums[:-window]
    before, after = counts[:-window], counts[window:]
    ratios = after[before > 0] / before[before > 0]
    return max(1.0, float(np.quantile(ratios, quantile))) if len(ratios) else 1.0


def _told(settings: ChironPaperSettings, state: State | None, classes: ClassesOf, now_s: float) -> dict[str, Any]:
    """Arrivals by the second, from which Theta follows; of two weeks at the most."""
    if not settings.theta_from_history:
        return {}
    return {name: {"arrivals": memory.arrivals[-PAST_MAX_S:].tolist()} for name, memory in (state or {}).items()}


def _read(
    settings: ChironPaperSettings, kept: Mapping[str, Kept], classes: ClassesOf, now_s: float, age_s: float
) -> State:
    """They go on as if no time had passed."""
    if not settings.theta_from_history or age_s > LOAD_AGE_MAX_S:
        return {}
    found = {
        name: part.numbers("arrivals", 0.0, 1e9, least=0, most=PAST_MAX_S)
        for name, part in kept.items()
        if "arrivals" in part
    }
    return {
        name: Memory(kept=None, arrivals=np.array(arrivals[-settings.history_s :], dtype=np.float64))
        for name, arrivals in found.items()
        if arrivals is not None
    }


# -- batch ---------------------------------------------------------------------------------------------------------


def _batch_instances(settings: ChironPaperSettings, model: ModelView, now_s: float) -> tuple[int, int]:
    """(batch instances, BBP as things stand). None without a queue; else never fewer than there are."""
    if not model.groups:
        return 0, 0
    present = model.planned.get("batch", 0)
    live = [i for i in model.instances if i.state in ("ready", "starting")]
    spare = sum(spare_share(i) for i in live if i.role == "mixed" and i.state == "ready")
    mean, spread, step_s, rate = _service(model, live)
    own_s = (mean + settings.quantile_z * spread) * step_s
    delay_s = model.cold_start_s if settings.count_cold_start else 0.0
    tokens, requests = 0.5 * model.running_batch * mean, float(model.running_batch)
    late, added = 0, 0
    for group in model.groups:
        tokens += group.output_tokens
        requests += group.requests
        left_s = group.deadline_s - now_s - own_s
        missing = tokens + settings.quantile_z * spread * sqrt(requests) - (spare + present) * rate * max(left_s, 0.0)
        if missing > 0.0:
            late += 1
            # What no instance could save any more is worked off within a cold start's time.
            usable_s = max(left_s - delay_s, delay_s, settings.tick_s)
            added = max(added, ceil(missing / (rate * usable_s) - ROUNDING))
    return min(present + added, model.max_instances), late


def spare_share(instance: InstanceView) -> float:
    """Share of a mixed instance's slots that interactive requests leave."""
    return max(0.0, 1.0 - instance.dispatched_interactive / instance.max_batch_size)


def _service(model: ModelView, live: list[InstanceView]) -> tuple[float, float, float, float]:
    """Batch requests: (mean output, its sd, step time, output tokens per second of one instance at the present B)."""
    mixes = [m for m in model.mixes if not m.cls.interactive]
    seen = [m for m in mixes if m.finished] or mixes
    sizes = [i.max_batch_size for i in live if i.role == "batch"] or [i.max_batch_size for i in live]
    batch_size = max(sizes, default=model.max_num_seqs)
    queued = sum(g.requests for g in model.groups)
    mean_input = sum(g.input_tokens for g in model.groups) / queued
    mean_square = sum(g.input_square for g in model.groups) / queued
    mix = _mean_mix(seen)
    mix = replace(mix, input_tokens=mean_input, input_square=mean_square)
    at = capacity(
        model.step_times,
        [(1.0, mix)],
        itl_target_s=min((m.cls.itl_s for m in mixes), default=inf),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=batch_size,
    )
    return mix.output_tokens, mix.output_sd, at.step_s, at.batch_size / at.step_s


def _mean_mix(mixes: list[ClassMix]) -> ClassMix:
    """Classes together, by requests finished."""
    if len(mixes) == 1:
        return mixes[0]
    weights = [m.finished or 1 for m in mixes]
    total = sum(weights)
    mean = sum(w * m.output_tokens for w, m in zip(weights, mixes, strict=True)) / total
    square = sum(w * (m.output_sd**2 + m.output_tokens**2) for w, m in zip(weights, mixes, strict=True)) / total
    return replace(mixes[0], output_tokens=mean, output_sd=sqrt(max(0.0, square - mean * mean)))


def initial_roles(settings: ChironPaperSettings, count: int) -> dict[str, int]:
    """Interactive and mixed instances of an initial fleet; one instance alone is mixed, to serve both classes."""
    interactive = min(round(settings.interactive_share * count), max(0, count - 1))
    return {"interactive": interactive, "mixed": count - interactive, "batch": 0}


def make_chiron_paper(settings: ChironPaperSettings) -> Policy:
    def router(_: Any, estimates: Estimates) -> PackingRouter:
        # Evicting batch work for want of prefill is ours; the sources know eviction for want of room.
        return PackingRouter(settings.packing, estimates, evicts=True, relieve_after=inf, strict_roles=True)

    return Policy(
        name="chiron-paper",
        settings=settings,
        place=router,
        batch_size=decide_batch_size,
        fleet=decide_fleet,
        learned=_told,
        restore=_read,
        fleet_period_s=settings.tick_s,
        initial_max_batch_size=settings.initial_max_batch_size,
        initial_roles=initial_roles,
        order_batch=lambda settings, _: DeadlineGroups(settings.group_span_s),
        take_back=take_back_fullest if settings.revive else None,
        group_span_s=settings.group_span_s,
    )
