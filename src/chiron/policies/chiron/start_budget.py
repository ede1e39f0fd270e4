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
from chiron.policies.chiron.token_budget import Decoding, gain, token_budget
from chiron.policies.views import ModelView

SURGE: Final = 0.25
"""Of the fleet, what is replaced at once: ``maxSurge`` of a Kubernetes Deployment, its default."""
WORTH: Final = 1.0 / 3.0
"""By what share of itself the mean step of short answers must become shorter beside long prompts for a replacement.
Engines with short steps do less in a burst, so where answers have some steps to average, they are not worth a start."""


def replacements(
    settings: ChironSettings, model: ModelView, memory: ModelMemory, serving: Capacity, wanted: int
) -> int:
    """Instances beyond the ``wanted`` ones, to take the place of as many whose token budget is too large. Without them
    a fleet that need not be resized goes on as it is, and more instances do not make its steps shorter. They are asked
    for until they are ready; the fleet then shrinks by those that it has longest to be rid of (``control.lifecycle``).
    A start has to be worth it: only where short answers gain much, and once so many requests have missed their ITL SLO
    that it shows in a mean over ten minutes which began with none."""
    budget = memory.token_budget
    if budget is None or not model.over_budget or memory.itl_missed_lasting <= settings.itl_missed_max:
        return 0
    gained = gain(
        model.step_times,
        model.mixes,
        most=model.max_num_batched_tokens,
        tokens=budget.max_num_batched_tokens,
        decoding=_decoding(model, memory, serving),
    )
    more = min(model.over_budget, ceil(SURGE * wanted)) if gained >= WORTH else 0
    return more if model.count("ready") < wanted + more else 0


def _decoding(model: ModelView, memory: ModelMemory, serving: Capacity) -> Decoding:
    """Of an instance that serves the mix of the last two minutes at its capacity."""
    times, weighted = model.step_times, weighted_mixes(model, memory)
    outputs = sum(weight * max(mix.output_tokens, 1.0) for weight, mix in weighted)
    decoding = sum(weight * decode_s(times, mix.input_tokens, mix.output_tokens) for weight, mix in weighted)
    return Decoding(serving.batch_size, serving.batch_size * decoding / max(outputs, 1e-9))


def start_budget(
    settings: ChironSettings, model: ModelView, memory: ModelMemory, serving: Capacity, now_s: float
) -> ModelMemory:
    """What an instance needs that serves the mix of the last two minutes at its capacity."""
    if not settings.limit_chunk:
        return memory
    times, weighted = model.step_times, weighted_mixes(model, memory)
    slo_s = tightest_itl_s(weighted)
    whole = model.max_num_batched_tokens
    present = whole if memory.token_budget is None else memory.token_budget.max_num_batched_tokens
    budget = token_budget(
        times,
        [mix for _, mix in weighted],
        most=whole,
        present=present,
        decoding=_decoding(model, memory, serving),
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
