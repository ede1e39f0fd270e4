"""``chiron``, global loop: batch work planned by deadline into spare capacity, and instances for what is left."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf

from chiron.policies.capacity import Capacity, arrivals_s, capacity, decode_s, prefill_s
from chiron.policies.chiron.load import ModelMemory, whole
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import Rule, followed, window_mean
from chiron.policies.views import GroupView, ModelView


def batch_extra(
    settings: ChironSettings,
    memory: ModelMemory,
    model: ModelView,
    serving: Capacity,
    now_s: float,
    interactive: int,
) -> tuple[int, int, dict[str, float], ModelMemory]:
    """(instances to add for batch deadlines, BBP, numbers, memory)."""
    if not model.groups:
        risk_until_s = memory.risk_until_s if model.running_batch else -inf
        return 0, 0, {}, replace(memory, extra=0, batch_work_s=0.0, batch_apart=0.0, risk_until_s=risk_until_s)
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
    ahead, demand, helped, bbp, need = 0.0, -inf, 0.0, 0, 0.0
    in_time, risk_until_s = 0.0, memory.risk_until_s if model.running_batch else -inf
    shortest_s = max(m.output_tokens * own.step_s for m in seen)
    for group, group_work in zip(model.groups, work, strict=True):
        ahead += group_work
        left_s = group.deadline_s - now_s
        usable_s = max(settings.tick_s, left_s * (1.0 - settings.deadline_margin) - duration_s)
        bbp += ahead > present * usable_s
        if left_s > shortest_s:
            in_time += group_work
            # Before any instance is ready, nothing says what the fleet will do.
            if ready and in_time > max(present, settings.risk_share * ready * own.work_rate) * usable_s:
                risk_until_s = max(risk_until_s, group.deadline_s)
        need = max(need, ahead / own.work_rate / usable_s)
        overdue = ahead - trust * spare * usable_s
        works_s = usable_s - model.cold_start_s
        asked = overdue / own.work_rate / max(settings.tick_s, works_s)
        demand = max(demand, asked)
        if settings.fill * works_s >= settings.batch_least_s:
            helped = max(helped, asked)
    numbers = {"batch_demand": demand, "batch_spare": spare, "batch_work_s": ahead, "spare_trust": trust}
    extra = _batch_instances(settings, memory.extra, demand, helped, ahead / own.work_rate, model.cold_start_s)
    memory = replace(
        memory,
        extra=extra,
        batch_work_s=ahead,
        risk_until_s=risk_until_s,
        batch_spare=max(0.0, min(ready, interactive) - average) * serving.work_rate,
        batch_own=max(0, ready - interactive) * own.work_rate,
        batch_apart=need if own.work_rate > settings.apart_gain * serving.work_rate else 0.0,
        apart_missed_s=now_s if model.itl_missed > 3.0 * settings.itl_missed_max else memory.apart_missed_s,
    )
    return extra, bbp, numbers, memory


def batch_at_risk(memory: ModelMemory, model: ModelView, now_s: float) -> bool:
    """Work that was found at risk is queued or runs. It stays so while it runs: what lost requests evicted as soon as
    little of it was queued would be at risk again."""
    if now_s >= memory.risk_until_s:
        return False
    return model.running_batch > 0 or any(group.deadline_s <= memory.risk_until_s for group in model.groups)


def instances_apart(settings: ChironSettings, memory: ModelMemory, total: int, now_s: float) -> int:
    """Of ``total`` instances, those to be kept free of interactive requests for batch work, where ITL SLOs leave it
    little beside them: no more than the batch work can fill, and none that the busiest minute of late would need."""
    if memory.batch_apart <= 0.0 or now_s - memory.apart_missed_s < 60.0:
        return 0
    busiest = followed(memory.load, Rule(window_s=60, settle_s=600), settings.tick_s)
    return max(0, min(ceil(memory.batch_apart), total - max(1, whole(busiest))))


def _batch_instances(
    settings: ChironSettings, running: int, demand: float, helped: float, work: float, cold_start_s: float
) -> int:
    """Whole instances for a demand: none until one would be well used, then until hardly any of it queues.

    The demand divides by the time left, so the last of the work asks for any number of instances. More than would do
    all of it in the time that one takes to start are none that help: they would be ready when it is over. But what is
    due later than that gets what it needs: ``helped`` is the demand of those request groups for which an instance that
    is added now still has ``batch_least_s`` to work."""
    if not settings.plan_batch:
        return max(1, ceil(work / 300.0))
    if demand <= 0.05 or (running == 0 and demand < settings.start_share):
        return 0
    useful = ceil(work / max(settings.batch_least_s, cold_start_s)) if settings.batch_least_s > 0.0 else inf
    wanted = min(ceil(demand / settings.fill), max(running, useful, ceil(helped / settings.fill)))
    return int(max(1, wanted))


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
            arrived += arrivals_s(model.step_times, arrival, outputs[arrival.cls.name])
    released = (memory.batch_work_s + arrived - work) / settings.tick_s
    ratio = min(1.2, max(0.05, (released - memory.batch_own) / memory.batch_spare))
    before = memory.spare_trust or settings.spare_trust
    return replace(memory, spare_trust=before + 0.05 * (ratio - before))
