"""``chiron``: our default. Both loops of the paper, with learned capacities in place of step-by-step search.

Local (every scrape): the learned step-time model gives the batch size whose mean step meets the tightest ITL SLO on
the instance, corrected by what was measured; a cap that holds nothing back is never raised.

Global, interactive (every tick): load is arriving work over one instance's capacity, so the paper's busy instances
become a fraction; IBP = load / instances. The fleet is ``forecast * headroom``: the forecast looks ahead by the
measured cold start, and the headroom 1/Theta is a quantile of how much load has exceeded its own forecast over one
cold start (the paper takes Theta from the spike ratio over one model load).

Global, batch: queued work in order of deadline, less what the spare capacity of the interactive fleet will do by
then, over the time left. Instances are added when that demand nears what one instance can still do in time: late
enough that valleys do most of it for nothing, early enough to be safe.

Changes in opposite directions are at least ``hold_s`` apart, and the fleet shrinks only to the largest size wanted
over ``settle_s``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf, isfinite, isnan, sqrt
from typing import Any

from chiron.core.types import Role
from chiron.policies.capacity import Capacity, capacity, decode_s, prefill_s, work_s
from chiron.policies.packing import PackingRouter, PackingSettings
from chiron.policies.policy import Estimates, Policy
from chiron.policies.views import (
    FleetPlan,
    FleetView,
    LocalDecision,
    LocalView,
    ModelPlan,
    ModelView,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChironSettings:
    """Settings of ``chiron``. One set serves every workload that we publish figures for."""

    # Local loop.
    initial_max_batch_size: int = 128
    """Until step times are learned (a few seconds of traffic)."""
    itl_margin: float = 0.9
    """Share of the ITL SLO that batch sizes aim at: the mean over an instance hides some spread over requests."""
    # Dispatch.
    packing: PackingSettings = PackingSettings()
    evict: bool = True
    """Interactive requests may evict batch work."""
    demote_late: bool = True
    """A queued request that has missed its TTFT waits behind those that can still meet it."""
    group_span_s: float = 300.0
    """Batch requests whose deadlines share a span of this length form a request group."""
    # Global loop.
    tick_s: float = 5.0
    utilisation: float = 0.9
    """Share of an instance's capacity that the interactive fleet is planned with."""
    spike_quantile: float = 0.97
    """Headroom covers this quantile of load over forecast, within one cold start."""
    headroom_prior: float = 1.3
    """Load over forecast before it has been observed; weighs ``headroom_prior_weight`` observations."""
    headroom_prior_weight: int = 10
    headroom_memory: int = 720
    """Observations (ticks) remembered: one hour at 5 s."""
    smoothing_s: float = 15.0
    """Window of the load that must be served; queueing within TTFT absorbs what is shorter."""
    trend_window_s: float = 180.0
    """Window of the trend that the forecast extends."""
    look_ahead: bool = True
    """Forecast at the cold start's distance; off: size for the present load."""
    hold_s: float = 60.0
    """Least time between changes in opposite directions."""
    settle_s: float = 120.0
    """The fleet shrinks to the largest size wanted over this long."""
    # Batch.
    spare_trust: float = 0.8
    """Share of the forecast spare capacity that deadlines may rely on."""
    start_share: float = 0.6
    """A batch instance is added when overdue work would fill this share of its time to the deadline."""
    fill: float = 0.85
    """Share of an added instance's time that the plan counts on."""
    deadline_margin: float = 0.1
    """Share of the time to each deadline that is kept in hand, besides one request's own duration."""
    plan_batch: bool = True
    """Off: batch instances are added as soon as batch work queues (what the paper argues against)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalState:
    correction: float = 1.0
    """Measured over predicted step time."""


def decide_batch_size(
    settings: ChironSettings, state: LocalState | None, view: LocalView
) -> tuple[LocalDecision | None, LocalState]:
    """Jump to the batch size whose mean step meets the tightest SLO."""
    state = state or LocalState()
    slo_s = view.itl_slo_s
    if not isfinite(slo_s):
        if view.binding and view.max_batch_size < view.max_num_seqs:
            return LocalDecision(max_batch_size=view.max_num_seqs, reason="no_itl_slo"), state
        return None, state
    counts = view.class_counts
    running = sum(counts.values())
    if not view.learned or running == 0:
        return None, state
    times = view.step_times
    slope = (
        sum(
            count * work_s(times, view.mixes[name]) / max(view.mixes[name].output_tokens, 1.0)
            for name, count in counts.items()
        )
        / running
    )
    if not isnan(view.itl_s) and view.decode_batch >= 1.0:
        predicted = times.fixed_s + slope * view.decode_batch
        ratio = min(2.0, max(0.5, view.itl_s / predicted))
        state = replace(state, correction=state.correction + 0.2 * (ratio - state.correction))
    target_s = settings.itl_margin * slo_s / state.correction
    size = int((target_s - times.fixed_s) / slope)
    size = max(1, min(size, view.max_num_seqs))
    before = view.max_batch_size
    numbers = {"itl_s": view.itl_s, "itl_slo_s": slo_s, "slope_s": slope, "correction": state.correction}
    if abs(size - before) <= 0.05 * before:
        return None, state
    if size > before and not view.binding and view.dispatched < 0.8 * before:
        return None, state
    reason = "itl_below_slo" if size > before else "itl_above_slo"
    return LocalDecision(max_batch_size=size, reason=reason, numbers=numbers), state


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A forecast that waits to be compared with what came."""

    made_s: float
    until_s: float
    forecast: float
    peak: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """What the global loop remembers of one model."""

    loads: tuple[tuple[float, float], ...] = ()
    """(time, load in instances) per tick."""
    pending: tuple[Pending, ...] = ()
    ratios: tuple[float, ...] = ()
    """Peak load over forecast, latest last."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, instances wanted) over the settling window."""
    last_change_s: float = -inf
    last_direction: int = 0
    extra: int = 0
    """Instances added for batch deadlines."""
    pressure: float = 1.0
    """Grows while promises are missed, and decays after."""


State = dict[str, ModelMemory]


def decide_fleet(settings: ChironSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Size every model's fleet."""
    state = state or {}
    plans: dict[str, ModelPlan] = {}
    memories: State = {}
    for model in view.models:
        plans[model.name], memories[model.name] = _decide_model(
            settings, state.get(model.name, ModelMemory()), model, view.now_s, view.since_s
        )
    return plans, memories


def _decide_model(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float, since_s: float
) -> tuple[ModelPlan, ModelMemory]:
    serving = interactive_capacity(settings, model)
    rate = serving.work_rate * settings.utilisation
    load = arriving_work_s(model) / max(since_s, 1e-9) / rate
    memory = _remember_load(settings, memory, now_s, load, model.cold_start_s)
    level, ahead = _forecast(settings, memory, now_s, model.cold_start_s)
    headroom = _headroom(settings, memory)
    memory = replace(memory, pressure=_pressure(memory.pressure, model))
    backlog = _backlog(model, serving, settings)
    recent = _mean_load(memory, now_s, settings.smoothing_s)
    needed = max(ahead * headroom * memory.pressure, recent) + backlog
    interactive = _whole(needed)
    interactive = max(interactive, model.min_instances)
    extra, bbp, batch_numbers = _batch_extra(settings, memory, model, serving, now_s, interactive, level)
    memory = replace(memory, extra=extra)
    wanted = min(max(interactive + extra, model.min_instances), model.max_instances)
    total, reason, memory = _settle(settings, memory, model, now_s, wanted, extra)
    batch = min(extra, max(0, total - min(interactive, total)))
    counts: dict[Role, int] = {"interactive": 0, "mixed": total - batch, "batch": batch}
    live = max(1, model.count("ready", "starting"))
    numbers = {
        "load": load,
        "forecast": ahead,
        "headroom": headroom,
        "pressure": memory.pressure,
        "backlog": backlog,
        "capacity_batch": serving.batch_size,
        "work_rate": rate,
        "cold_start_s": model.cold_start_s,
        "wanted": float(wanted),
        **batch_numbers,
    }
    plan = ModelPlan(
        counts=counts,
        reason=reason,
        numbers=numbers,
        ibp=recent / live,
        ibp_target=1.0 / (headroom * memory.pressure),
        bbp=float(bbp),
    )
    return plan, memory


# -- load and capacity -------------------------------------------------------------------------------------------


def _interactive_rates(model: ModelView) -> list[tuple[float, Any]]:
    by_name = {a.cls.name: a.requests for a in model.arrivals}
    return [(by_name.get(m.cls.name, 0) + 1e-6, m) for m in model.mixes if m.cls.interactive]


def interactive_capacity(settings: ChironSettings, model: ModelView) -> Capacity:
    """One instance's capacity for the interactive mix that arrives now."""
    weighted = _interactive_rates(model)
    slo_s = min((m.cls.itl_s for weight, m in weighted if weight > 0.5), default=inf)
    return capacity(
        model.step_times,
        weighted,
        itl_target_s=settings.itl_margin * slo_s,
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=model.max_num_seqs,
    )


def arriving_work_s(model: ModelView) -> float:
    """Marginal work, seconds, of the interactive requests that arrived since the last tick."""
    times = model.step_times
    outputs = {m.cls.name: m.output_tokens for m in model.mixes}
    total = 0.0
    for arrival in model.arrivals:
        if arrival.cls.interactive and arrival.requests:
            context = arrival.input_tokens / arrival.requests
            total += prefill_s(times, arrival.input_tokens, arrival.input_square)
            total += arrival.requests * decode_s(times, context, outputs[arrival.cls.name])
    return total


def _backlog(model: ModelView, serving: Capacity, settings: ChironSettings) -> float:
    """Instances that would clear the interactive queue within one tick and a cold start."""
    if model.waiting_interactive == 0:
        return 0.0
    outputs = [m.output_tokens for m in model.mixes if m.cls.interactive]
    context = model.waiting_input_tokens / model.waiting_interactive
    work = prefill_s(model.step_times, model.waiting_input_tokens, model.waiting_input_square)
    work += model.waiting_interactive * decode_s(model.step_times, context, sum(outputs) / len(outputs))
    return work / serving.work_rate / (settings.tick_s + model.cold_start_s)


def _remember_load(
    settings: ChironSettings, memory: ModelMemory, now_s: float, load: float, cold_start_s: float
) -> ModelMemory:
    keep_s = max(settings.trend_window_s, 60.0, settings.smoothing_s)
    loads = (*(p for p in memory.loads if p[0] > now_s - keep_s), (now_s, load))
    memory = replace(memory, loads=loads)
    smooth = _mean_load(memory, now_s, settings.smoothing_s)
    ratios = list(memory.ratios)
    pending: list[Pending] = []
    for item in memory.pending:
        seen = replace(item, peak=max(item.peak, smooth)) if now_s - item.made_s >= settings.smoothing_s else item
        if now_s >= item.until_s:
            ratios.append(seen.peak / item.forecast if item.forecast > 0 else 1.0)
        else:
            pending.append(seen)
    _, ahead = _forecast(settings, memory, now_s, cold_start_s)
    reach_s = max(cold_start_s, settings.smoothing_s) + settings.tick_s
    pending.append(Pending(made_s=now_s, until_s=now_s + reach_s, forecast=ahead, peak=0.0))
    return replace(memory, pending=tuple(pending), ratios=tuple(ratios[-settings.headroom_memory :]))


def _mean_load(memory: ModelMemory, now_s: float, window_s: float) -> float:
    recent = [load for t, load in memory.loads if t > now_s - window_s]
    return sum(recent) / len(recent) if recent else 0.0


def _forecast(settings: ChironSettings, memory: ModelMemory, now_s: float, cold_start_s: float) -> tuple[float, float]:
    """(level now, load expected one cold start from now). A trend counts only as far as it stands out of noise."""
    level = _mean_load(memory, now_s, 60.0)
    points = [(t - now_s, load) for t, load in memory.loads if t > now_s - settings.trend_window_s]
    count = len(points)
    if not settings.look_ahead or count < 6:
        return level, level
    mean_t = sum(t for t, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    slope = sum((t - mean_t) * (y - mean_y) for t, y in points) / spread
    residual = sum((y - mean_y - slope * (t - mean_t)) ** 2 for t, y in points) / (count - 2)
    error = sqrt(residual / spread)
    certain = max(0.0, abs(slope) - error)
    trend = certain if slope > 0 else -certain
    # From the middle of the level's own window to one cold start ahead.
    reach_s = cold_start_s + settings.tick_s + min(30.0, settings.trend_window_s / 2)
    ahead = level + trend * reach_s
    return level, max(ahead, 0.5 * level, 0.0) if trend < 0 else ahead


def _headroom(settings: ChironSettings, memory: ModelMemory) -> float:
    """1/Theta: the quantile of load over forecast, with the prior's observations mixed in."""
    ratios = sorted(memory.ratios)
    weight = settings.headroom_prior_weight
    if len(ratios) < 4:
        return settings.headroom_prior
    observed = ratios[min(len(ratios) - 1, int(settings.spike_quantile * len(ratios)))]
    share = weight / (weight + len(ratios))
    return max(1.0, share * settings.headroom_prior + (1.0 - share) * observed)


def _pressure(pressure: float, model: ModelView) -> float:
    """Missed promises raise the headroom; kept ones let it decay."""
    ended = model.attained + model.missed
    if ended == 0:
        return pressure
    if model.missed > 0.01 * ended:
        return min(1.5, pressure + 0.02)
    return max(1.0, pressure - 0.002)


def _whole(instances: float) -> int:
    """Whole instances, forgiving a twentieth of one."""
    return max(0, ceil(instances - 0.05))


# -- batch -------------------------------------------------------------------------------------------------------


def _batch_extra(
    settings: ChironSettings,
    memory: ModelMemory,
    model: ModelView,
    serving: Capacity,
    now_s: float,
    interactive: int,
    level: float,
) -> tuple[int, int, dict[str, float]]:
    """(instances to add for batch deadlines, BBP, numbers)."""
    if not model.groups:
        return 0, 0, {}
    batch_mixes = [(1.0, m) for m in model.mixes if not m.cls.interactive and m.finished + model.running_batch > 0]
    batch_mixes = batch_mixes or [(1.0, m) for m in model.mixes if not m.cls.interactive]
    slo_s = min((m.cls.itl_s for _, m in batch_mixes), default=inf)
    own = capacity(
        model.step_times,
        batch_mixes,
        itl_target_s=settings.itl_margin * slo_s,
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=model.max_num_seqs,
    )
    duration_s = max((m.output_tokens + 2.0 * m.output_sd) * own.step_s for _, m in batch_mixes)
    # Load is in units of an instance at the planned utilisation; batch work may use it all.
    spare = max(0.0, interactive - level * settings.utilisation) * serving.work_rate
    present = max(0.0, model.count("ready") - level * settings.utilisation) * serving.work_rate
    ahead = 0.0
    demand = -inf
    bbp = 0
    for group in model.groups:
        context = group.input_tokens / group.requests
        output = group.output_tokens / group.requests
        ahead += prefill_s(model.step_times, group.input_tokens, group.input_square)
        ahead += group.requests * decode_s(model.step_times, context, output)
        left_s = group.deadline_s - now_s
        usable_s = max(settings.tick_s, left_s * (1.0 - settings.deadline_margin) - duration_s)
        if ahead > present * usable_s:
            bbp += 1
        overdue = ahead - settings.spare_trust * spare * usable_s
        demand = max(demand, overdue / own.work_rate / max(settings.tick_s, usable_s - model.cold_start_s))
    numbers = {"batch_demand": demand, "batch_spare": spare, "batch_work_s": ahead}
    if not settings.plan_batch:
        return max(1, ceil(ahead / own.work_rate / 300.0)), bbp, numbers
    if demand <= 0.05:
        return 0, bbp, numbers
    if memory.extra == 0 and demand < settings.start_share:
        return 0, bbp, numbers
    return max(1, ceil(demand / settings.fill)), bbp, numbers


# -- holding -----------------------------------------------------------------------------------------------------


def _settle(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float, wanted: int, extra: int
) -> tuple[int, str, ModelMemory]:
    """Turn what is wanted now into the plan: up at once, down when it stayed down, and never back within the hold."""
    current = sum(model.planned.values())
    window = (*(w for w in memory.wanted if w[0] > now_s - settings.settle_s), (now_s, wanted))
    memory = replace(memory, wanted=window)
    held_s = now_s - memory.last_change_s
    if wanted > current:
        if memory.last_direction < 0 and held_s < settings.hold_s:
            return current, "hold_after_down", memory
        reason = "batch_deadlines" if extra and wanted - extra <= current else "interactive_load"
        return wanted, reason, replace(memory, last_change_s=now_s, last_direction=1)
    peak = max(count for _, count in window)
    if peak < current:
        settled = now_s - window[0][0] >= 0.9 * settings.settle_s - settings.tick_s
        if not settled or (memory.last_direction > 0 and held_s < settings.hold_s):
            return current, "hold_before_down", memory
        return peak, "load_fell", replace(memory, last_change_s=now_s, last_direction=-1)
    return current, "steady", memory


def make_chiron(settings: ChironSettings) -> Policy:
    def router(_: Any, estimates: Estimates) -> PackingRouter:
        return PackingRouter(settings.packing, estimates)

    return Policy(
        name="chiron",
        settings=settings,
        router=router,
        local=decide_batch_size,
        fleet=decide_fleet,
        fleet_period_s=settings.tick_s,
        initial_max_batch_size=settings.initial_max_batch_size,
        holds_batch=True,
        evicts=settings.evict,
        revives=True,
        relabels=True,
        demotes_late=settings.demote_late,
        group_span_s=settings.group_span_s,
    )
