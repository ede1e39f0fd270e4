"""``chiron``: our default. Both loops of the paper, with learned capacities in place of step-by-step search.

Local (every scrape): the learned step-time model gives the batch size whose mean step meets the tightest ITL SLO on
the instance, corrected by what was measured; a cap that holds nothing back is never raised.

Global, interactive (every tick): load is arriving work over one instance's capacity, so the paper's busy instances
become a fraction; IBP = load / instances, and its target Theta = 1/headroom. How far back to average, how long to
wait before shrinking, and the headroom over that average are chosen by a backtest over the last hour
(``policies.headroom``): what would have kept the promises, given the measured cold start, with the fewest
instances.

Global, batch: queued work in order of deadline, less what the spare capacity of the interactive fleet will do by
then, over the time left. Instances are added when that demand nears what one instance can still do in time: late
enough that valleys do most of it for nothing, early enough to be safe.

Changes in opposite directions are at least ``hold_s`` apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, inf, isfinite, isnan
from typing import Any

import numpy as np

from chiron.core.types import Role
from chiron.policies.capacity import Capacity, capacity, decode_s, prefill_s, work_s
from chiron.policies.headroom import CONSTANT, Floats, Headroom, Rule, choose_headroom, followed, window_mean
from chiron.policies.packing import PackingRouter, PackingSettings
from chiron.policies.policy import Estimates, Policy
from chiron.policies.views import (
    ClassMix,
    FleetPlan,
    FleetView,
    GroupView,
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
    tune_batch_size: bool = True
    """Off: ``initial_max_batch_size`` for ever, as a static engine flag."""
    limit_prefill: bool = True
    """Bound the longest step by the prefill in flight where the ITL SLO is tighter than the engine's token budget."""
    itl_missed_max: float = 0.003
    """Share of requests that may miss the ITL SLO before the aim is lowered."""
    itl_gain: float = 10.0
    """How much: 1 % of requests more lowers it by a tenth; at most by half."""
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
    utilisation: float = 0.95
    """Share of an instance's capacity that the interactive fleet is planned with."""
    miss_max: float = 0.006
    """Share of each class's requests that the backtest may let miss: half of what 99 % attainment allows."""
    slack_share: float = 0.8
    """Share of TTFT, less the prompt's own prefill, that waiting may take; the rest is the instance's own queue."""
    windows_s: tuple[int, ...] = (15, 60, 180, 600, 1800)
    """Averages of the load that the backtest chooses from."""
    settles_s: tuple[int, ...] = (60, 300, 1800)
    """Times to stay small before shrinking, likewise."""
    memory_s: int = 3600
    """History that the backtest runs over."""
    backtest_s: float = 60.0
    """Time between backtests."""
    prior_load: float = 0.6
    """Load per instance of the fleet found at the start: believed for ``prior_s`` before it, until seen otherwise."""
    prior_s: int = 600
    headroom_prior: float = 1.5
    """Headroom until ``learning_s`` of traffic has been seen."""
    learning_s: float = 600.0
    margin: float = 0.0
    """Added to the headroom that the past would have needed."""
    margin_unseen: float = 0.15
    """More of it while less than ``memory_s`` has been seen."""
    floor_over_load: float = 1.05
    """The fleet is never planned below this many times the last minute's load."""
    look_ahead: bool = True
    """The backtest's fleet follows the load one cold start late, as the real one does; off: at once."""
    adapt_headroom: bool = True
    """Off: ``headroom_prior`` over the 60 s mean, for ever."""
    keep_last_s: float = 300.0
    """The last instance stays this long after the last interactive request (with ``min_instances = 0``)."""
    stale_s: float = 30.0
    """The fleet does not shrink while no engine has been scraped for this long."""
    hold_s: float = 60.0
    """Least time between changes in opposite directions."""
    # Batch.
    spare_trust: float = 0.6
    """Share of the spare capacity that deadlines may rely on before it has been measured."""
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
    before = view.max_batch_size
    if not isfinite(slo_s):
        if (view.binding and before < view.max_num_seqs) or isfinite(view.prefill_limit_s):
            return LocalDecision(max_batch_size=view.max_num_seqs, reason="no_itl_slo"), state
        return None, state
    counts = view.class_counts or {name: 1 for name, mix in view.mixes.items() if mix.cls.interactive}
    running = sum(counts.values())
    if not view.learned or running == 0:
        return None, state
    times = view.step_times
    slope = context = 0.0
    for name, count in counts.items():
        mix = view.mixes[name]
        slope += count / running * work_s(times, mix) / max(mix.output_tokens, 1.0)
        context += count / running * (mix.input_tokens + mix.output_tokens)
    if not isnan(view.itl_s) and view.decode_batch >= 1.0:
        predicted = times.fixed_s + slope * view.decode_batch
        ratio = min(2.0, max(0.5, view.itl_s / predicted))
        state = replace(state, correction=state.correction + 0.2 * (ratio - state.correction))
    target_s = itl_target_s(settings, slo_s, view.itl_missed)
    limit_s = _prefill_limit_s(view, target_s, context) if settings.limit_prefill else inf
    size = int((target_s / state.correction - times.fixed_s) / slope)
    size = max(1, min(size, view.max_num_seqs))
    reason = "itl_below_slo" if size > before else "itl_above_slo"
    if abs(size - before) <= 0.05 * before or (size > before and not view.binding and view.dispatched < 0.8 * before):
        size, reason = before, "steady"
        if limit_s == view.prefill_limit_s or abs(limit_s - view.prefill_limit_s) <= 0.1 * limit_s:
            return None, state
    numbers = {
        "itl_s": view.itl_s,
        "itl_slo_s": slo_s,
        "itl_target_s": target_s,
        "slope_s": slope,
        "correction": state.correction,
        "prefill_limit_s": limit_s,
    }
    return LocalDecision(max_batch_size=size, prefill_limit_s=limit_s, reason=reason, numbers=numbers), state


def itl_target_s(settings: ChironSettings, slo_s: float, missed: float) -> float:
    """The mean step to aim at: below the SLO by a margin that grows while requests miss it."""
    tight = 1.0 - settings.itl_gain * max(0.0, missed - settings.itl_missed_max)
    return settings.itl_margin * max(0.5, tight) * slo_s


def _prefill_limit_s(view: LocalView, target_s: float, context: float) -> float:
    """Prefill in flight that keeps the longest step within the target; inf where the engine's own token budget does.

    Requests of a few tokens have no long steps to average with: for them each step counts.
    """
    times = view.step_times
    decoding_s = view.decode_batch * (times.per_sequence_s + times.per_context_token_s * context)
    full_s = times.fixed_s + decoding_s + times.per_prefill_token_s * view.max_num_batched_tokens
    if full_s <= target_s:
        return inf
    return max(target_s - times.fixed_s - decoding_s, 0.1 * target_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelMemory:
    """What the global loop remembers of one model."""

    began_s: float
    """Time of the first second remembered; the prior lies before the first tick."""
    load: Floats
    """Instances' worth of interactive work that arrived in each second since."""
    counts: Floats
    """Interactive requests by class and second, shape (classes, seconds)."""
    headroom: Headroom
    backtest_s: float
    """Time of the last backtest."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, instances wanted) over the hold time."""
    last_change_s: float = -inf
    last_direction: int = 0
    extra: int = 0
    """Instances added for batch deadlines."""
    pressure: float = 1.0
    """Grows while promises are missed, and decays after."""
    spare_trust: float = 0.0
    """Batch work released to spare capacity over that capacity, as measured; 0: not yet."""
    batch_work_s: float = 0.0
    """Queued batch work at the last tick, and the spare capacity and batch instances that then stood against it."""
    batch_spare: float = 0.0
    batch_own: float = 0.0


State = dict[str, ModelMemory]


def decide_fleet(settings: ChironSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Size every model's fleet."""
    state = state or {}
    plans: dict[str, ModelPlan] = {}
    memories: State = {}
    for model in view.models:
        memory = state.get(model.name) or _first_memory(settings, model, view.now_s - view.since_s)
        plans[model.name], memories[model.name] = _decide_model(settings, memory, model, view.now_s)
    return share_gpus(plans, view), memories


def share_gpus(plans: dict[str, ModelPlan], view: FleetView) -> dict[str, ModelPlan]:
    """Where models together want more GPUs than exist: batch instances give way first, then every model's fleet
    shrinks in proportion, never below its minimum."""
    shared = dict(plans)
    for gpu, limit in view.gpus_max.items():
        models = [m for m in view.models if m.gpu == gpu]
        excess = sum(sum(shared[m.name].counts.values()) * m.gpus_per_instance for m in models) - limit
        roles: tuple[Role, ...] = ("batch", "mixed")
        for role in roles:
            while excess > 0:
                able = [m for m in models if shared[m.name].counts.get(role, 0) > 0]
                able = [m for m in able if sum(shared[m.name].counts.values()) > m.min_instances]
                if not able:
                    break
                # The one that keeps the largest share of what it wanted gives next.
                model = max(able, key=lambda m: _kept(shared[m.name], plans[m.name]))
                plan = shared[model.name]
                counts = {**plan.counts, role: plan.counts[role] - 1}
                shared[model.name] = replace(plan, counts=counts, reason="gpu_limit")
                excess -= model.gpus_per_instance
    return shared


def _kept(now: ModelPlan, wanted: ModelPlan) -> float:
    return sum(now.counts.values()) / max(1, sum(wanted.counts.values()))


def _decide_model(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float
) -> tuple[ModelPlan, ModelMemory]:
    serving = interactive_capacity(settings, model, memory)
    rate = serving.work_rate * settings.utilisation
    memory = _remember(settings, memory, model, now_s, rate)
    memory = _backtested(settings, memory, model, now_s)
    memory = replace(memory, pressure=_pressure(memory.pressure, model))
    level = followed(memory.load, memory.headroom.rule, settings.tick_s)
    recent = window_mean(memory.load, 60)
    headroom = memory.headroom.h * memory.pressure
    backlog = _backlog(model, serving, settings, recent)
    needed = max(level * headroom, settings.floor_over_load * recent) + backlog
    # However small the load, somebody has to serve it.
    present = model.waiting_interactive > 0 or window_mean(memory.load, int(settings.keep_last_s)) > 0.0
    interactive = max(_whole(needed), model.min_instances, 1 if present else 0)
    extra, bbp, batch_numbers, memory = _batch_extra(settings, memory, model, serving, now_s, interactive)
    wanted = min(max(interactive + extra, model.min_instances), model.max_instances)
    total, reason, memory = _settle(settings, memory, model, now_s, wanted, extra)
    batch = min(extra, max(0, total - min(interactive, total)))
    counts: dict[Role, int] = {"interactive": 0, "mixed": total - batch, "batch": batch}
    live = max(1, model.count("ready", "starting"))
    numbers = {
        "load": recent,
        "level": level,
        "headroom": memory.headroom.h,
        "pressure": memory.pressure,
        "window_s": float(memory.headroom.rule.window_s),
        "settle_s": float(memory.headroom.rule.settle_s),
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
        ibp_target=1.0 / headroom,
        bbp=float(bbp),
    )
    return plan, memory


# -- load and capacity -------------------------------------------------------------------------------------------


def _interactive(model: ModelView) -> list[ClassMix]:
    return [m for m in model.mixes if m.cls.interactive]


def interactive_capacity(settings: ChironSettings, model: ModelView, memory: ModelMemory) -> Capacity:
    """One instance's capacity for the interactive mix of the last two minutes."""
    mixes = _interactive(model)
    rates = memory.counts[:, -120:].sum(axis=1).tolist() if memory.counts.shape[1] else [0.0] * len(mixes)
    weighted = [(rate + 1e-6, mix) for rate, mix in zip(rates, mixes, strict=True)]
    slo_s = min(
        (m.cls.itl_s for rate, m in weighted if rate >= 1.0), default=min((m.cls.itl_s for m in mixes), default=inf)
    )
    return capacity(
        model.step_times,
        weighted,
        itl_target_s=itl_target_s(settings, slo_s, model.itl_missed),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=model.max_num_seqs,
    )


def _first_memory(settings: ChironSettings, model: ModelView, now_s: float) -> ModelMemory:
    """Before anything is known, the fleet that was found is taken as right for its load."""
    seconds = settings.prior_s
    instances = max(1, model.count("ready", "starting"))
    rule = Rule(window_s=60, settle_s=600)
    return ModelMemory(
        began_s=floor(now_s) - seconds,
        load=np.full(seconds, settings.prior_load * instances),
        counts=np.zeros((len(_interactive(model)), seconds)),
        headroom=Headroom(rule=rule, h=settings.headroom_prior, instances=float(instances)),
        backtest_s=now_s,
    )


def _remember(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float, rate: float
) -> ModelMemory:
    """Append the seconds since the last tick."""
    have = memory.load.shape[0]
    seconds = max(0, floor(now_s) - round(memory.began_s) - have)
    mixes = _interactive(model)
    rows = {m.cls.name: row for row, m in enumerate(mixes)}
    times = model.step_times
    load = np.zeros(seconds)
    counts = np.zeros((len(mixes), seconds))
    for arrival in model.arrivals:
        row = rows.get(arrival.cls.name)
        if row is None or seconds == 0:
            continue
        # What arrived in the second under way at the last tick is counted with the first one after.
        place = min(max(arrival.second - round(memory.began_s) - have, 0), seconds - 1)
        context = arrival.input_tokens / arrival.requests
        work = prefill_s(times, arrival.input_tokens, arrival.input_square)
        work += arrival.requests * decode_s(times, context, mixes[row].output_tokens)
        load[place] += work / rate
        counts[row, place] += arrival.requests
    keep = settings.memory_s
    loads = np.concatenate((memory.load, load))
    drop = max(0, len(loads) - keep)
    return replace(
        memory,
        began_s=memory.began_s + drop,
        load=loads[drop:],
        counts=np.concatenate((memory.counts, counts), axis=1)[:, drop:],
    )


def _backtested(settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float) -> ModelMemory:
    """Choose the rule anew, once there is something to learn from."""
    seconds = memory.load.shape[0]
    seen_s = seconds - settings.prior_s if seconds < settings.memory_s else inf
    due = now_s - memory.backtest_s >= settings.backtest_s
    if not settings.adapt_headroom or seen_s < settings.learning_s or not due or not memory.counts.any():
        return memory
    times = model.step_times
    slacks = [
        max(0.5, settings.slack_share * (m.cls.ttft_s - prefill_s(times, m.input_tokens, m.input_square)))
        for m in _interactive(model)
    ]
    headroom = choose_headroom(
        memory.load,
        memory.counts,
        slacks,
        [CONSTANT, *(Rule(window_s=w, settle_s=s) for w in settings.windows_s for s in settings.settles_s)],
        cold_start_s=model.cold_start_s if settings.look_ahead else 0.0,
        tick_s=settings.tick_s,
        miss_max=settings.miss_max,
        floor=model.min_instances,
        ceiling=model.max_instances,
        current=memory.headroom.rule,
    )
    # An hour shows rare bursts that ten minutes do not.
    unseen = 1.0 - min(1.0, seen_s / settings.memory_s)
    margin = 1.0 + settings.margin + settings.margin_unseen * unseen
    h = headroom.h * margin
    if headroom.rule == CONSTANT:
        h = float(round(h))  # Whole instances already: rounding a small margin up would double a fleet of one.
    return replace(memory, headroom=replace(headroom, h=h), backtest_s=now_s)


def _backlog(model: ModelView, serving: Capacity, settings: ChironSettings, load: float) -> float:
    """Instances that would clear the part of the interactive queue that the present fleet cannot clear by the time
    a new one is up."""
    if model.waiting_interactive == 0:
        return 0.0
    outputs = [m.output_tokens for m in model.mixes if m.cls.interactive]
    context = model.waiting_input_tokens / model.waiting_interactive
    work = prefill_s(model.step_times, model.waiting_input_tokens, model.waiting_input_square)
    work += model.waiting_interactive * decode_s(model.step_times, context, sum(outputs) / len(outputs))
    reach_s = settings.tick_s + model.cold_start_s
    spare = max(0.0, model.count("ready") - load)
    return max(0.0, work / serving.work_rate / reach_s - spare)


def _pressure(pressure: float, model: ModelView) -> float:
    """Missed promises raise the headroom; kept ones let it decay."""
    ended = model.attained + model.missed
    if ended == 0:
        return pressure
    if model.missed > 0.01 * ended:
        return min(1.25, pressure + 0.01)
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
) -> tuple[int, int, dict[str, float], ModelMemory]:
    """(instances to add for batch deadlines, BBP, numbers, memory)."""
    if not model.groups:
        return 0, 0, {}, replace(memory, extra=0, batch_work_s=0.0)
    mixes = [m for m in model.mixes if not m.cls.interactive]
    seen = [m for m in mixes if m.finished] or mixes
    own = capacity(
        model.step_times,
        [(1.0, m) for m in seen],
        itl_target_s=settings.itl_margin * min(m.cls.itl_s for m in seen),
        kv_capacity_tokens=model.kv_capacity_tokens,
        max_num_seqs=model.max_num_seqs,
    )
    work = [_group_work_s(model, group) for group in model.groups]
    memory = _measure_spare(settings, memory, model, sum(work))
    trust = memory.spare_trust or settings.spare_trust
    # Load is in units of an instance at the planned utilisation; batch work may use it all.
    average = window_mean(memory.load, 600) * settings.utilisation
    spare = max(0.0, interactive - average) * serving.work_rate
    ready = model.count("ready")
    present = trust * max(0.0, min(ready, interactive) - average) * serving.work_rate
    present += max(0, ready - interactive) * own.work_rate
    duration_s = max((m.output_tokens + 2.0 * m.output_sd) * own.step_s for m in seen)
    ahead, demand, bbp = 0.0, -inf, 0
    for group, group_work in zip(model.groups, work, strict=True):
        ahead += group_work
        left_s = group.deadline_s - now_s
        usable_s = max(settings.tick_s, left_s * (1.0 - settings.deadline_margin) - duration_s)
        bbp += ahead > present * usable_s
        overdue = ahead - trust * spare * usable_s
        demand = max(demand, overdue / own.work_rate / max(settings.tick_s, usable_s - model.cold_start_s))
    numbers = {"batch_demand": demand, "batch_spare": spare, "batch_work_s": ahead, "spare_trust": trust}
    extra = _batch_instances(settings, memory.extra, demand, ahead / own.work_rate)
    memory = replace(
        memory,
        extra=extra,
        batch_work_s=ahead,
        batch_spare=max(0.0, min(ready, interactive) - average) * serving.work_rate,
        batch_own=max(0, ready - interactive) * own.work_rate,
    )
    return extra, bbp, numbers, memory


def _batch_instances(settings: ChironSettings, running: int, demand: float, work: float) -> int:
    """Whole instances for a demand: none until one would be well used, then until it is done."""
    if not settings.plan_batch:
        return max(1, ceil(work / 300.0))
    if demand <= 0.05 or (running == 0 and demand < settings.start_share):
        return 0
    return max(1, ceil(demand / settings.fill))


def _group_work_s(model: ModelView, group: GroupView) -> float:
    context = group.input_tokens / group.requests
    output = group.output_tokens / group.requests
    work = prefill_s(model.step_times, group.input_tokens, group.input_square)
    return work + group.requests * decode_s(model.step_times, context, output)


def _measure_spare(settings: ChironSettings, memory: ModelMemory, model: ModelView, work: float) -> ModelMemory:
    """Compare what left the batch queue since the last tick with the capacity that stood against it."""
    if memory.batch_work_s <= 0.0 or memory.batch_spare < 0.1:
        return memory
    arrived = 0.0
    outputs = {m.cls.name: m.output_tokens for m in model.mixes}
    for arrival in model.arrivals:
        if not arrival.cls.interactive:
            context = arrival.input_tokens / arrival.requests
            arrived += prefill_s(model.step_times, arrival.input_tokens, arrival.input_square)
            arrived += arrival.requests * decode_s(model.step_times, context, outputs[arrival.cls.name])
    released = (memory.batch_work_s + arrived - work) / settings.tick_s
    ratio = min(1.2, max(0.05, (released - memory.batch_own) / memory.batch_spare))
    before = memory.spare_trust or settings.spare_trust
    return replace(memory, spare_trust=before + 0.05 * (ratio - before))


# -- holding -----------------------------------------------------------------------------------------------------


def _settle(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float, wanted: int, extra: int
) -> tuple[int, str, ModelMemory]:
    """Turn what is wanted now into the plan, never back within the hold. A shrinking fleet goes no lower than the
    most that was wanted meanwhile."""
    current = sum(model.planned.values())
    window = (*(w for w in memory.wanted if w[0] > now_s - settings.hold_s), (now_s, wanted))
    memory = replace(memory, wanted=window)
    held = now_s - memory.last_change_s < settings.hold_s
    if wanted > current:
        if memory.last_direction < 0 and held:
            return current, "hold_after_down", memory
        reason = "batch_deadlines" if extra and wanted - extra <= current else "interactive_load"
        return wanted, reason, replace(memory, last_change_s=now_s, last_direction=1)
    peak = max(count for _, count in window)
    if peak < current:
        settled = now_s - window[0][0] >= settings.hold_s - 1.5 * settings.tick_s
        if not settled or (memory.last_direction > 0 and held):
            return current, "hold_before_down", memory
        if _stale(settings, model):
            return current, "stale_metrics", memory
        return peak, "load_fell", replace(memory, last_change_s=now_s, last_direction=-1)
    return current, "steady", memory


def _stale(settings: ChironSettings, model: ModelView) -> bool:
    """No engine has been heard of lately: whatever the load seems to be, do not take instances away."""
    ages = [i.sample_age_s for i in model.instances if i.state == "ready"]
    return bool(ages) and min(ages) > settings.stale_s


def make_chiron(settings: ChironSettings) -> Policy:
    def router(_: Any, estimates: Estimates) -> PackingRouter:
        return PackingRouter(settings.packing, estimates)

    return Policy(
        name="chiron",
        settings=settings,
        router=router,
        local=decide_batch_size if settings.tune_batch_size else None,
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
