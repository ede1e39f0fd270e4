"""``chiron``, local loop: the max batch size of one instance, each time a scrape of it arrives.

The learned step-time model says which batch size meets the tightest ITL SLO that runs on the instance; what was
measured corrects it. Where a step full of prefill would break that SLO by itself, the prefill in flight is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, isnan

from chiron.policies.capacity import work_s
from chiron.policies.chiron_settings import ChironSettings
from chiron.policies.views import LocalDecision, LocalView


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
