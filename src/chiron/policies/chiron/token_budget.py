"""``chiron``: the token budget of an engine's steps, beside long prompts and tight ITL SLOs.

An engine spends on prefill, in each step, what decoding leaves of its token budget (vLLM: ``max_num_batched_tokens``).
While a long prompt is in prefill every step is a full one. An answer of a few tokens has nothing to average that with:
where a full step is longer than the ITL SLO, it misses it. A smaller budget makes such a step shorter, and the long
prompt's first token later, since each of its chunks pays what a step takes besides.

So the budget is halved until a full step is within what is aimed at, but only where requests do miss their ITL SLO,
where a full step of the whole budget is longer than that, and as long as few prompts that would have been in time are
not any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, inf, isfinite
from typing import Final, NamedTuple

from chiron.policies.views import ClassMix, StepTimes, TokenBudget

LEAST: Final = 128
"""Tokens that are left for prefill; with fewer, what a step takes besides is most of it."""
PART: Final = 4
"""A budget is no smaller than the engine's own over this: prompts of all lengths wait longer behind a long one, which
nothing here counts."""
LONG_SHARE: Final = 0.005
"""Share of prompts that may be longer than the one whose steps are looked at."""
TTFT_SHARE: Final = 0.7
"""Of TTFT, what the prefill of a prompt that is in time may take."""
BACK: Final = 0.85
"""A budget is doubled again once a full step of that would take this share of the aim."""


class Decoding(NamedTuple):
    """What decodes beside the prefill."""

    sequences: float
    """Each takes a token of the budget."""
    step_s: float
    """What they add to a step."""


def full_step_s(times: StepTimes, tokens: int, decoding: Decoding, prompt: float) -> float:
    """A step whose budget is spent on the middle of a prompt of this many tokens, seconds."""
    token_s = times.per_prefill_token_s + times.per_prefill_square_s * prompt
    return times.fixed_s + decoding.step_s + max(0.0, tokens - decoding.sequences) * token_s


def first_token_s(times: StepTimes, tokens: int, decoding: Decoding, prompt: float) -> float:
    """Prefill of that prompt in steps of this budget, seconds; inf if nothing of it is left."""
    chunk = tokens - decoding.sequences
    if chunk < 1.0:
        return inf
    work_s = prompt * (times.per_prefill_token_s + times.per_prefill_square_s * prompt)
    return work_s + ceil(prompt / chunk) * (times.fixed_s + decoding.step_s)


def short_answer_s(times: StepTimes, tokens: int, decoding: Decoding, prompt: float, answer: int) -> float:
    """Mean step of an answer of so many tokens beside which that prompt's prefill begins, seconds."""
    chunk = tokens - decoding.sequences
    gaps = max(1, answer - 1)
    beside = min(gaps, ceil(prompt / chunk)) if chunk >= 1.0 else gaps
    full_s = full_step_s(times, tokens, decoding, prompt)
    return (beside * full_s + (gaps - beside) * (times.fixed_s + decoding.step_s)) / gaps


def gain(times: StepTimes, mixes: Iterable[ClassMix], *, most: int, tokens: int, decoding: Decoding) -> float:
    """By what share of itself the budget ``tokens``, in place of ``most``, shortens the mean step of short answers
    beside a long prompt, in the class in which it does the most. An answer that outlasts the prompt's prefill waits for
    all of it, in however many steps."""
    interactive = [mix for mix in mixes if mix.cls.interactive and mix.input_tail]
    prompt = max(map(long_prompt, interactive), default=0.0)
    found = 0.0
    for mix in interactive:
        if isfinite(mix.cls.itl_s):
            whole_s = short_answer_s(times, most, decoding, prompt, mix.output_low)
            found = max(found, 1.0 - short_answer_s(times, tokens, decoding, prompt, mix.output_low) / whole_s)
    return found


def long_prompt(mix: ClassMix) -> float:
    """Tokens of a prompt that few exceed; 0 if that is not known."""
    above = 0.0
    for tokens, share in mix.input_tail:
        above += share
        if above > LONG_SHARE:
            return tokens
    return 0.0


def late(times: StepTimes, tokens: int, decoding: Decoding, mix: ClassMix) -> float:
    """Share of the prompts of a class that take too long for their TTFT in steps of this budget."""
    most_s = TTFT_SHARE * mix.cls.ttft_s
    above = 0.0
    for prompt, share in mix.input_tail:
        if first_token_s(times, tokens, decoding, prompt) <= most_s:
            return above
        above += share
    return above


def token_budget(
    times: StepTimes,
    mixes: Iterable[ClassMix],
    *,
    most: int,
    present: int,
    decoding: Decoding,
    target_s: float,
    slo_s: float,
    missed: float,
    missed_max: float,
) -> TokenBudget:
    """Of a step, from now on. ``most``: what the engine has by itself; ``present``: the budget in force; ``target_s``:
    the step to aim at, for a tightest ITL SLO of ``slo_s``; ``missed``: share of the requests that miss it;
    ``missed_max``: share that may, and share of the prompts that may come too late by a smaller budget."""
    interactive = [mix for mix in mixes if mix.cls.interactive and mix.input_tail]
    prompt = max(map(long_prompt, interactive), default=0.0)
    whole_s = full_step_s(times, most, decoding, prompt)
    chosen, reason = most, "step_within_itl_slo"
    if isfinite(slo_s) and not interactive:
        chosen, reason = present, "lengths_not_known"
    elif isfinite(slo_s) and whole_s > slo_s and (present < most or missed > missed_max):
        before = [late(times, most, decoding, mix) for mix in interactive]
        while chosen // 2 >= max(LEAST + decoding.sequences, most / PART):
            if full_step_s(times, chosen, decoding, prompt) <= (BACK if chosen > present else 1.0) * target_s:
                break
            half = chosen // 2
            may = missed_max if half < present else 2.0 * missed_max
            after = [late(times, half, decoding, mix) for mix in interactive]
            if any(now > then + may for now, then in zip(after, before, strict=True)):
                reason = "long_prompts_in_time"
                break
            chosen = half
    if chosen < present:
        reason = "step_above_itl_slo"
    numbers = {
        "itl_slo_s": slo_s,
        "itl_target_s": target_s,
        "itl_missed": missed,
        "prompt_tokens": prompt,
        "whole_step_s": whole_s,
        "full_step_s": full_step_s(times, chosen, decoding, prompt),
        "first_token_s": first_token_s(times, chosen, decoding, prompt),
    }
    return TokenBudget(max_num_batched_tokens=chosen, reason=reason, numbers=numbers)
