"""``chiron``: our default. Both loops of the paper, with learned capacities in place of step-by-step search.

Local (every scrape): the learned step-time model gives the batch size whose mean step meets the tightest ITL SLO on
the instance, corrected by what was measured; a cap that holds nothing back is never raised.

Global, interactive (every tick): load is arriving work over one instance's capacity, so the paper's busy instances
become a fraction; IBP = load / instances, and its target Theta = 1/headroom. How far back to average, how long to
wait before shrinking, and the headroom over that average are chosen by a backtest over the last hour
(``policies.headroom``): what would have met the SLOs, given the measured cold start, with the fewest
instances.

Global, batch: queued work in order of deadline, less what the spare capacity of the interactive fleet will do by
then, over the time left. Instances are added when that demand nears what one instance can still do in time: late
enough that valleys do most of it for nothing, early enough to be safe.

Changes in opposite directions are at least ``hold_s`` apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

from chiron.core.kept import Kept
from chiron.core.types import Request, Role
from chiron.policies.chiron.batch import batch_at_risk, batch_extra, instances_apart
from chiron.policies.chiron.load import (
    ModelMemory,
    backtested,
    begun,
    headroom_now,
    interactive_capacity,
    prepared,
    pressure,
    recurring_to,
    remember,
    seen_s,
    start_s,
    surging_to,
    whole,
    with_itl_missed,
)
from chiron.policies.chiron.load_kept import learned_load, restored_load
from chiron.policies.chiron.local_loop import decide_batch_size
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.chiron.start_budget import replacements, start_budget
from chiron.policies.headroom import CONSTANT, followed, window_mean
from chiron.policies.instances import label_by_rank, take_back_fullest
from chiron.policies.policy import ClassesOf, Estimates, Order, Policy, Refusal
from chiron.policies.queues.deadline_groups import DeadlineGroups
from chiron.policies.queues.overload import OverloadOrder
from chiron.policies.routers.packing import PackingRouter
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView

State = dict[str, ModelMemory]


def decide_fleet(settings: ChironSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Size every model's fleet."""
    state = state or {}
    plans: dict[str, ModelPlan] = {}
    before: State = {}
    memories: State = {}
    for model in view.models:
        memory = begun(settings, state.get(model.name), model, view.now_s - view.since_s)
        before[model.name] = memory
        plans[model.name], memories[model.name] = _decide_model(settings, memory, model, view)
    return share_gpus(settings, plans, before, memories, view)


def prepare(settings: ChironSettings, state: State | None) -> State | None:
    """Compute a part of what the next tick will need."""
    return prepared(state) if state else None


def learned(
    settings: ChironSettings, state: State | None, classes: ClassesOf, now_s: float
) -> dict[str, dict[str, Any]]:
    """The load of the last hour and of two weeks, and what was made of it."""
    return {name: learned_load(memory, classes[name]) for name, memory in (state or {}).items()}


def restore(
    settings: ChironSettings, kept: Mapping[str, Kept], classes: ClassesOf, now_s: float, age_s: float
) -> State:
    """The last hour's load goes on as if no time had passed: who was not there cannot tell the time between from one
    without requests. What is older keeps its time of day."""
    found = {name: restored_load(settings, part, classes[name], now_s, age_s) for name, part in kept.items()}
    return {name: memory for name, memory in found.items() if memory is not None}


def share_gpus(
    settings: ChironSettings, plans: dict[str, ModelPlan], before: State, memories: State, view: FleetView
) -> tuple[dict[str, ModelPlan], State]:
    """Fit the plans into the GPUs that exist.

    Growth for batch is refused first; then batch instances elsewhere give way to interactive growth, unless they
    came within the hold time; then interactive growth is refused, in proportion. One model's overload is not
    another's: who wants no more than its fair share (max-min) gets it, from those that have more than theirs and have
    not changed within the hold time. ``before`` are the memories from before these plans: a change that the limit
    refuses is none.
    """
    plans, memories = dict(plans), dict(memories)
    for gpu, limit in view.gpus_max.items():
        models = [m for m in view.models if m.gpu == gpu]
        wanted = {m.name: _total(plans[m.name]) for m in models}
        # Instances kept apart for batch work are there for interactive requests: only those added for it are not.
        added = {m.name: min(memories[m.name].extra, plans[m.name].counts["batch"]) for m in models}
        interactive = {name: wanted[name] - count for name, count in added.items()}
        present = {m.name: sum(m.planned.values()) for m in models}
        excess = sum(wanted[m.name] * m.gpus_per_instance for m in models) - limit
        for stage in (_batch_growth, _idle_batch, _growth):
            while excess > 0:
                able = [
                    m
                    for m in models
                    if stage(settings, _total(plans[m.name]), interactive[m.name], before[m.name], m, view.now_s)
                ]
                if not able:
                    break
                # The one that keeps the largest share of what it wanted gives next.
                model = max(able, key=lambda m: _total(plans[m.name]) / wanted[m.name])
                plans[model.name] = _with_total(plans[model.name], _total(plans[model.name]) - 1, "gpu_limit")
                excess -= model.gpus_per_instance
        plans.update(_fair_plans(settings, plans, before, models, interactive, limit, view.now_s))
        for m in models:
            count, memory = _total(plans[m.name]), before[m.name]
            left = min(added[m.name], max(0, count - interactive[m.name]))
            memories[m.name] = replace(memories[m.name], extra=left)
            if count < present[m.name] <= wanted[m.name]:
                memories[m.name] = replace(memories[m.name], last_change_s=view.now_s, last_direction=-1)
            elif count == present[m.name] < wanted[m.name]:
                memories[m.name] = replace(
                    memories[m.name], last_change_s=memory.last_change_s, last_direction=memory.last_direction
                )
    return plans, memories


def _fair_plans(
    settings: ChironSettings,
    plans: Mapping[str, ModelPlan],
    memories: State,
    models: list[ModelView],
    wanted: Mapping[str, int],
    limit: float,
    now_s: float,
) -> dict[str, ModelPlan]:
    """Move instances, one by one, from models above their fair share of the GPUs to those below it that want more.
    ``wanted`` is for interactive work; batch instances have given way already."""
    shares = max_min_shares({m.name: wanted[m.name] * m.gpus_per_instance for m in models}, limit)
    fair = {m.name: shares[m.name] / m.gpus_per_instance for m in models}
    present = {m.name: min(_total(plans[m.name]), wanted[m.name]) for m in models}
    counts = dict(present)
    free = limit - sum(_total(plans[m.name]) * m.gpus_per_instance for m in models)

    def lacks(model: ModelView) -> bool:
        return counts[model.name] + 1 <= min(wanted[model.name], fair[model.name] + 1e-9)

    def gives(model: ModelView) -> bool:
        left = counts[model.name] - 1
        may = _may_shrink(settings, memories[model.name], now_s)
        return may and left >= max(fair[model.name] - 1e-9, model.min_instances)

    while poor := [m for m in models if lacks(m)]:
        needy = min(poor, key=lambda m: counts[m.name] / fair[m.name])
        while free < needy.gpus_per_instance and (able := [m for m in models if gives(m)]):
            giver = max(able, key=lambda m: counts[m.name] / fair[m.name])
            counts[giver.name] -= 1
            free += giver.gpus_per_instance
        if free < needy.gpus_per_instance:
            break
        counts[needy.name] += 1
        free -= needy.gpus_per_instance
    return {
        name: _with_total(plans[name], _total(plans[name]) + count - present[name], "gpu_share")
        for name, count in counts.items()
        if count != present[name]
    }


def max_min_shares(wanted: Mapping[str, float], total: float) -> dict[str, float]:
    """Max-min fair shares of ``total``: who wants less than an equal part gets it all, the others split the rest."""
    shares: dict[str, float] = {}
    left = total
    for count, name in enumerate(sorted(wanted, key=lambda name: wanted[name])):
        shares[name] = min(wanted[name], left / (len(wanted) - count))
        left -= shares[name]
    return shares


def _may_shrink(settings: ChironSettings, memory: ModelMemory, now_s: float) -> bool:
    return memory.last_direction <= 0 or now_s - memory.last_change_s >= settings.hold_s


def _total(plan: ModelPlan) -> int:
    return sum(plan.counts.values())


def _with_total(plan: ModelPlan, total: int, reason: str) -> ModelPlan:
    """Batch instances go first; what comes is for interactive work."""
    change = total - _total(plan)
    of_batch = min(0, max(change, -plan.counts["batch"]))
    counts: dict[Role, int] = {
        **plan.counts,
        "mixed": plan.counts["mixed"] + change - of_batch,
        "batch": plan.counts["batch"] + of_batch,
    }
    return replace(plan, counts=counts, reason=reason)


def _batch_growth(
    settings: ChironSettings, total: int, interactive: int, memory: ModelMemory, model: ModelView, now_s: float
) -> bool:
    return total > max(interactive, sum(model.planned.values()))


def _idle_batch(
    settings: ChironSettings, total: int, interactive: int, memory: ModelMemory, model: ModelView, now_s: float
) -> bool:
    return total > max(interactive, model.min_instances) and _may_shrink(settings, memory, now_s)


def _growth(
    settings: ChironSettings, total: int, interactive: int, memory: ModelMemory, model: ModelView, now_s: float
) -> bool:
    return total > sum(model.planned.values())


def _decide_model(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, view: FleetView
) -> tuple[ModelPlan, ModelMemory]:
    now_s = view.now_s
    model = replace(model, cold_start_s=start_s(settings, memory, model))
    serving = interactive_capacity(settings, model, memory)
    rate = serving.work_rate * settings.utilisation
    memory = remember(settings, memory, model, now_s, rate)
    memory = with_itl_missed(settings, memory, model)
    memory = backtested(settings, memory, model, now_s)
    memory = replace(memory, pressure=pressure(memory.pressure, model))
    memory = start_budget(settings, model, memory, serving, now_s)
    level = followed(memory.load, memory.headroom.rule, settings.tick_s, model.cold_start_s)
    recent = window_mean(memory.load, 60)
    h = headroom_now(settings, memory)
    headroom = h * memory.pressure
    surging = surging_to(settings, memory, model, serving)
    following = _following(settings, memory, level)
    recurring = recurring_to(settings, memory, model)
    needed = max(following, settings.floor_over_load * recent, surging, recurring)
    # However small the load, somebody has to serve it.
    present = model.waiting_interactive > 0 or window_mean(memory.load, max(1, int(settings.keep_last_s))) > 0.0
    interactive = max(whole(needed), 1) if present else _without_requests(whole(needed), model, memory)
    # What is foretold is asked for before its first request.
    interactive = max(interactive, whole(recurring), model.min_instances)
    extra, bbp, batch_numbers, memory = batch_extra(settings, memory, model, serving, now_s, interactive)
    wanted = min(max(interactive + extra, model.min_instances), model.max_instances)
    # What the rule says has settled already; the rest may pass.
    passing = wanted if extra else min(whole(max(settings.floor_over_load * recent, surging)), wanted)
    renewed = min(replacements(settings, model, memory, serving, wanted), _room(model, view, wanted))
    total, reason, memory = _settle(settings, memory, model, now_s, wanted + renewed, extra, passing)
    if 0 < total - sum(model.planned.values()) <= renewed:
        reason = "smaller_token_budget"
    memory = replace(memory, extra=min(extra, max(0, total - interactive)))
    batch = max(memory.extra, instances_apart(settings, memory, total, now_s))
    counts: dict[Role, int] = {"interactive": 0, "mixed": total - batch, "batch": batch}
    live = max(1, model.count("ready", "starting"))
    spread_over = _spread_over(settings, memory, model, max(surging, recurring), total - batch)
    numbers = {
        "load": recent,
        "level": level,
        "headroom": h,
        "pressure": memory.pressure,
        "window_s": float(memory.headroom.rule.window_s),
        "settle_s": float(memory.headroom.rule.settle_s),
        "period_s": float(memory.headroom.rule.period_s),
        "surging": surging,
        "capacity_batch": serving.batch_size,
        "work_rate": rate,
        "cold_start_s": model.cold_start_s,
        "wanted": float(wanted),
        "spread_over": float(spread_over),
        **({"recurring": recurring, "recurs_s": float(memory.recurrence.period_s)} if recurring else {}),
        **batch_numbers,
    }
    plan = ModelPlan(
        counts=counts,
        reason=reason,
        spread_over=spread_over,
        numbers=numbers,
        ibp=recent / live,
        ibp_target=1.0 / headroom,
        bbp=float(bbp),
        token_budget=memory.token_budget,
        batch_at_risk=batch_at_risk(memory, model, now_s),
        renews=renewed,
        asleep=model.max_instances if settings.sleepers else 0,
    )
    return plan, memory


def _following(settings: ChironSettings, memory: ModelMemory, level: float) -> float:
    """Instances that the rule wants at this level of the load."""
    following = level * (headroom_now(settings, memory) * memory.pressure)
    if settings.over_steady:
        following = min(following, settings.over_steady * memory.headroom.steady * memory.pressure)
    return following


def _spread_over(settings: ChironSettings, memory: ModelMemory, model: ModelView, asked: float, mixed: int) -> int:
    """Of the ``mixed`` ones, those that stay for the next ``hold_s`` even if the load grows no more: packed on fewer,
    requests would be slower, and nobody would gain. What is soon to be stopped is left to become empty. Batch work that
    waits does gain: it gets more done where no interactive prompts are in its way."""
    if not settings.spread or model.groups:
        return 0
    rule = memory.headroom.rule
    later = replace(rule, settle_s=max(0, rule.settle_s - int(settings.hold_s)))
    level = followed(memory.load, later, settings.tick_s, model.cold_start_s)
    least = settings.floor_over_load * window_mean(memory.load, 60)
    staying = max(_following(settings, memory, level), least, asked)
    return min(max(whole(staying), model.min_instances, 1), mixed)


def _room(model: ModelView, view: FleetView, wanted: int) -> int:
    """Instances that may come besides those wanted: within the model's bounds, and on GPUs that no plan has."""
    planned = sum(sum(m.planned.values()) * m.gpus_per_instance for m in view.models if m.gpu == model.gpu)
    free = (view.gpus_max.get(model.gpu, inf) - planned) / model.gpus_per_instance
    present = sum(model.planned.values())
    return max(0, int(min(model.max_instances, present + free)) - wanted)


def _without_requests(wanted: int, model: ModelView, memory: ModelMemory) -> int:
    """No request has arrived for a while: nothing is added for what busier times would need, and the last one goes.
    A fleet that does not follow the load would stay for ever, so where it may be empty all of it goes."""
    if model.min_instances == 0 and memory.headroom.rule == CONSTANT:
        return 0
    return min(wanted, sum(model.planned.values())) if wanted > 1 else 0


# -- holding -----------------------------------------------------------------------------------------------------


def _settle(
    settings: ChironSettings, memory: ModelMemory, model: ModelView, now_s: float, wanted: int, extra: int, passing: int
) -> tuple[int, str, ModelMemory]:
    """Turn what is wanted now into the plan, never back within the hold. A shrinking fleet goes no lower than the
    most that was wanted meanwhile for what may pass (``passing``): a queue, the last minute's load, batch work."""
    current = sum(model.planned.values())
    window = (*(w for w in memory.wanted if w[0] > now_s - settings.hold_s), (now_s, passing))
    memory = replace(memory, wanted=window)
    held = now_s - memory.last_change_s < settings.hold_s
    if wanted > current:
        if memory.last_direction < 0 and held:
            return current, "hold_after_down", memory
        reason = "batch_deadlines" if extra and wanted - extra <= current else "interactive_load"
        return wanted, reason, replace(memory, last_change_s=now_s, last_direction=1)
    peak = max(wanted, *(count for _, count in window))
    if peak < current:
        settled = seen_s(settings, memory) >= settings.hold_s - 1.5 * settings.tick_s
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


def admit(settings: ChironSettings, order: Order, request: Request, now_s: float) -> Refusal | None:
    """Early refusal: the order of the waiting requests knows how long it would wait."""
    assert isinstance(order, OverloadOrder)
    return order.admit(request, now_s)


def make_chiron(settings: ChironSettings) -> Policy:
    def router(_: Any, estimates: Estimates) -> PackingRouter:
        return PackingRouter(
            settings.packing,
            estimates,
            evicts=settings.evict,
            keeps_apart=True,
            passes_long=True,
            spreads_long=settings.itl_missed_max if settings.spread_long else inf,
            sends_ahead=True,
        )

    def order_batch(_: Any, estimates: Estimates) -> DeadlineGroups:
        return DeadlineGroups(settings.group_span_s, estimates.shortest_s)

    return Policy(
        name="chiron",
        settings=settings,
        place=router,
        batch_size=decide_batch_size if settings.tune_batch_size else None,
        fleet=decide_fleet,
        fleet_period_s=settings.tick_s,
        prepare=prepare,
        learned=learned,
        restore=restore,
        initial_max_batch_size=settings.initial_max_batch_size,
        take_back=take_back_fullest,
        label=label_by_rank,
        order=lambda _, estimates: OverloadOrder(settings.overload, estimates),
        admit=admit if settings.overload.refuse else None,
        order_batch=order_batch,
        group_span_s=settings.group_span_s,
    )
