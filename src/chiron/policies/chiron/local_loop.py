"""``chiron``, local loop: the max batch size of one instance, each time a scrape of it arrives.

The learned step-time model says which batch size meets the tightest ITL SLO that runs on the instance; what was
measured corrects it. Where a step full of prefill would break that SLO by itself, the prefill in flight is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Final

from chiron.policies.capacity import work_s
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.chiron.token_budget import Decoding, token_budget
from chiron.policies.views import LocalDecision, LocalView, TokenBudget

LEAST_TARGET: Final = 2.0
"""Of what a step takes without any work; the step to aim at is no shorter where the SLO allows that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalState:
    correction: float = 1.0
    """Measured over predicted step time."""
    interactive_s: float = 0.0
    """Work that interactive requests bring to a step beside batch work: a mean over some five scrapes, because the SLO
    is a mean over a request's tokens."""
    budget_kept_s: float = -inf
    """When the token budget was last no smaller than it had to be: it is raised only after some time without."""


def decide_batch_size(
    settings: ChironSettings, state: LocalState | None, view: LocalView
) -> tuple[LocalDecision | None, LocalState]:
    """Jump to the batch size whose mean step meets the tightest SLO."""
    state = state or LocalState()
    slo_s = view.itl_slo_s
    before = view.max_batch_size
    if not isfinite(slo_s):
        whole = view.max_num_batched_tokens == view.token_budget_max
        if (view.at_cap and before < view.max_num_seqs) or isfinite(view.prefill_limit_s) or not whole:
            decision = LocalDecision(
                max_batch_size=view.max_num_seqs,
                token_budget=TokenBudget(max_num_batched_tokens=view.token_budget_max, reason="no_itl_slo"),
                reason="no_itl_slo",
                evicts=settings.evict,
            )
            return decision, state
        return None, state
    counts = view.class_counts or {name: 1 for name, mix in view.mixes.items() if mix.cls.interactive}
    running = sum(counts.values())
    if not view.learned or running == 0:
        return None, state
    times = view.step_times
    slopes = {name: work_s(times, view.mixes[name]) / max(view.mixes[name].output_tokens, 1.0) for name in counts}
    slope = sum(count * slopes[name] for name, count in counts.items()) / running
    context = sum(
        count * (view.mixes[name].input_tokens + view.mixes[name].output_tokens) for name, count in counts.items()
    )
    context /= running
    correction = state.correction
    if not isnan(view.itl_s) and view.decode_batch >= 1.0:
        predicted = times.fixed_s + slope * view.decode_batch
        ratio = min(2.0, max(0.5, view.itl_s / predicted))
        correction += 0.2 * (ratio - correction)
    target_s = itl_target_s(settings, slo_s, view.itl_missed, times.fixed_s)
    limits = prefill_limits(settings, view, target_s, context)
    limit_s = limits.mean_s
    left_s = target_s / correction - times.fixed_s
    interactive = {name: count for name, count in counts.items() if view.mixes[name].cls.interactive}
    budget = _token_budget(settings, view, target_s, min(max(left_s / slope, 1.0), float(view.max_num_seqs)), context)
    tokens, kept_s = budget.max_num_batched_tokens, state.budget_kept_s
    if tokens <= view.max_num_batched_tokens:
        kept_s = view.now_s
    same = tokens == view.max_num_batched_tokens or (
        tokens > view.max_num_batched_tokens and view.now_s - kept_s < settings.hold_s
    )
    state = LocalState(
        correction=correction,
        interactive_s=_followed(state.interactive_s, interactive, slopes),
        budget_kept_s=kept_s,
    )
    size = int(left_s / slope)
    batch_limit = None
    if 0 < sum(interactive.values()) < running and limits.step_s < inf:
        size, batch_limit = _sizes_beside(view, counts, slopes, left_s, state.interactive_s)
    size = max(1, min(size, view.max_num_seqs))
    reason = "itl_below_slo" if size > before else "itl_above_slo"
    if abs(size - before) <= 0.05 * before or (size > before and not view.at_cap and view.dispatched < 0.8 * before):
        size, reason = before, "steady"
        if same and _near(limit_s, view.prefill_limit_s) and _near(batch_limit, view.batch_limit):
            return None, state
    numbers = {
        "itl_s": view.itl_s,
        "itl_slo_s": slo_s,
        "itl_target_s": target_s,
        "slope_s": slope,
        "correction": correction,
        "prefill_limit_s": limit_s,
        "prefill_step_s": limits.step_s,
    }
    decision = LocalDecision(
        max_batch_size=size,
        prefill_limit_s=limit_s,
        prefill_step_s=limits.step_s,
        prefill_share=limits.share,
        batch_limit=batch_limit,
        token_budget=None if same else budget,
        evicts=settings.evict,
        reason=reason,
        numbers=numbers,
    )
    return decision, state


def _token_budget(
    settings: ChironSettings, view: LocalView, target_s: float, sequences: float, context: float
) -> TokenBudget:
    """Beside as many sequences as meet the target."""
    times = view.step_times
    if not settings.limit_chunk:
        return TokenBudget(max_num_batched_tokens=view.max_num_batched_tokens, reason="off")
    return token_budget(
        times,
        view.mixes.values(),
        most=view.token_budget_max,
        present=view.max_num_batched_tokens,
        decoding=Decoding(sequences, sequences * (times.per_sequence_s + times.per_context_token_s * context)),
        target_s=target_s,
        slo_s=view.itl_slo_s,
        missed=view.itl_missed,
        missed_max=settings.itl_missed_max,
    )


def _near(wanted: float | None, present: float | None) -> bool:
    """A change too small to matter."""
    if wanted is None or present is None:
        return wanted is present
    return wanted == present or abs(wanted - present) <= 0.1 * wanted


def _followed(before_s: float, interactive: Mapping[str, int], slopes: Mapping[str, float]) -> float:
    return before_s + 0.2 * (sum(count * slopes[name] for name, count in interactive.items()) - before_s)


def _sizes_beside(
    view: LocalView, counts: Mapping[str, int], slopes: Mapping[str, float], left_s: float, interactive_s: float
) -> tuple[int, int]:
    """(max batch size, requests up to which batch work is added) where both kinds run.

    Batch work that runs has had its prefill: what it costs a step is its decoding, so little of it need be evicted for
    interactive requests that come. Batch work to be added costs its prefill too.
    """
    times = view.step_times
    inside = outside = weight = 0.0
    work_s = 0.0
    for name, count in counts.items():
        mix = view.mixes[name]
        if mix.cls.interactive:
            inside += count
            work_s += count * slopes[name]
        else:
            outside += count
            context = mix.input_tokens + 0.5 * mix.output_tokens
            weight += count * (times.per_sequence_s + times.per_context_token_s * context)
    batch_slope = sum(count * slopes[name] for name, count in counts.items()) - work_s
    room_s = left_s - interactive_s
    more_s = room_s - weight
    kept = outside + more_s / (weight / outside) if more_s < 0.0 else outside
    size = inside + max(0.0, kept) + max(0.0, more_s) / (work_s / inside)
    return int(size), int(inside + max(0.0, room_s) / (batch_slope / outside))


def itl_target_s(settings: ChironSettings, slo_s: float, missed: float, fixed_s: float) -> float:
    """The mean step to aim at: below the SLO by a margin that grows while requests miss it. It leaves room for work
    beside what every step takes: a margin that left none would stop an instance whose SLO is near its shortest step,
    and what it does not run misses its TTFT."""
    tight = 1.0 - settings.itl_gain * max(0.0, missed - settings.itl_missed_max)
    wide_s = settings.itl_margin * slo_s
    return max(max(0.5, tight) * wide_s, min(wide_s, LEAST_TARGET * fixed_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    """Seconds of prefill in flight on an instance, estimated."""

    mean_s: float = inf
    """What the requests that decode can bear as a mean over their tokens."""
    step_s: float = inf
    """What one step can hold and still be within the target."""
    share: float = 1.0
    """Of the time, what prefill may take while steps are as long as the target."""


def prefill_limits(settings: ChironSettings, view: LocalView, target_s: float, context: float) -> PrefillLimits:
    """No limits where the engine's own token budget keeps steps within the target.

    A prompt of c seconds delays each request that decodes by c in all, whatever steps it is spread over. The
    SLO is the mean over a request's tokens, so one of n tokens bears n times what a step has left. n is what all
    but a few requests of a class have; while requests miss their ITL, the limit goes back to what a single step has
    left.
    """
    times = view.step_times
    decoding_s = view.decode_batch * (times.per_sequence_s + times.per_context_token_s * context)
    full_s = times.fixed_s + decoding_s + times.per_prefill_token_s * view.max_num_batched_tokens
    if full_s <= target_s or not settings.limit_prefill:
        return PrefillLimits()
    step_s = max(target_s - times.fixed_s - decoding_s, 0.1 * target_s)
    afford = min(1.0, max(0.0, 3.0 - view.itl_missed / settings.itl_missed_max))
    sure = min(1.0, max(0.0, 1.5 - view.itl_missed / settings.itl_missed_max))
    mean_s = inf
    if view.batch_waits and sure > 0.0:  # Else nobody gains from packing.
        for mix in view.mixes.values():
            if mix.cls.interactive and isfinite(mix.cls.itl_s):
                goal_s = target_s * mix.cls.itl_s / view.itl_slo_s
                tokens = 1.0 + sure * (mix.output_low - 1.0)
                mean_s = min(mean_s, tokens * max(goal_s - times.fixed_s - decoding_s, 0.1 * goal_s))
    if mean_s == inf:
        mean_s = step_s
    return PrefillLimits(mean_s=mean_s, step_s=afford * step_s, share=step_s / target_s)
