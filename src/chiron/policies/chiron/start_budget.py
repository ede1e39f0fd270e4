"""``chiron``, global loop: the token budget that instances are started with (``token_budget``)."""

from __future__ import annotations

from dataclasses import replace

from chiron.policies.capacity import Capacity, decode_s
from chiron.policies.chiron.load import ModelMemory, tightest_itl_s, weighted_mixes
from chiron.policies.chiron.local_loop import itl_target_s
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.chiron.token_budget import Decoding, token_budget
from chiron.policies.views import ModelView


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
