"""``chiron``, global loop: the token budget that instances are started with (``token_budget``), and their replacement
where they run with a larger one and keep it."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Final

from chiron.policies.capacity import Capacity, decode_s
from chiron.policies.chiron.load import ModelMemory, tightest_itl_s, weighted_mixes
from chiron.policies.chiron.local_loop import itl_target_s
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.chiron.token_budget import Decoding, token_budget
from chiron.policies.views import ModelView

SURGE: Final = 0.25
"""Of the fleet, what is replaced at once: ``maxSurge`` of a Kubernetes Deployment, its default."""


def replacements(settings: ChironSettings, model: ModelView, memory: ModelMemory, wanted: int) -> int:
    """Instances beyond the ``wanted`` ones, to take the place of as many whose token budget is too large. Without them
    a fleet that need not be resized goes on as it is, and more instances do not make its steps shorter. They are asked
    for until they are ready; the fleet then shrinks by those that it has longest to be rid of (``control.lifecycle``).
    A start has to be worth it: only once so many requests have missed their ITL SLO that it shows in a mean over ten
    minutes which began with none."""
    if memory.itl_missed_lasting <= settings.itl_missed_max:
        return 0
    more = min(model.over_budget, ceil(SURGE * wanted))
    return more if model.count("ready") < wanted + more else 0


def start_budget(
    settings: ChironSettings, model: ModelView, memory: ModelMemory, serving: Capacity, now_s: float
) -> ModelMemory:
    """What an instance needs that serves the mix of the last two minutes at its capacity."""
    if not settings.limit_chunk:
        return memory
    times, weighted = model.step_times, weighted_mixes(model, memory)
    slo_s = tightest_itl_s(weighted)
    outputs = sum(weight * max(mix.output_tokens, 1.0) for weight, mix in weighted)
    decoding = sum(weight * decode_s(times, mix.input_tokens, mix.output_tokens) for weight, mix in weighted)
    whole = model.max_num_batched_tokens
    present = whole if memory.token_budget is None else memory.token_budget.max_num_batched_tokens
    budget = token_budget(
        times,
        [mix for _, mix in weighted],
        most=whole,
        present=present,
        decoding=Decoding(serving.batch_size, serving.batch_size * decoding / max(outputs, 1e-9)),
        target_s=itl_target_s(settings, slo_s, model.itl_missed, times.fixed_s),
        slo_s=slo_s,
        missed=model.itl_missed,
        missed_max=settings.itl_missed_max,
    )
    tokens = budget.max_num_batched_tokens
    if tokens > present and now_s - memory.budget_kept_s < settings.hold_s:
        return memory
    if tokens == present:
        return replace(memory, budget_kept_s=now_s)
    return replace(memory, budget_kept_s=now_s, token_budget=budget if tokens < whole else None)
