"""How much an instance can carry, from learned step times and the mix of requests.

A step lasts ``a + work``: a fixed part, and marginal work that grows with what is in it. In a steady state where each
running sequence yields one token a step, a request of ``n`` prompt and ``o`` output tokens brings::

    w = p*n + q*n^2 + o*(b + c*(n + o/2))          marginal seconds over its life
    s = w / o                                       per running sequence and step (prefill spread over its tokens)

so the mean step with B sequences lasts D(B) = a + s*B, and an instance does (D - a)/D seconds of marginal work a
second. B is limited by the ITL target (D <= target), by KV and by the engine. Load in the same unit, arrivals times
w, divided by that capacity is a number of instances.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite

from chiron.policies.size import KV_FILL
from chiron.policies.views import ArrivalView, ClassMix, StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one instance does at the largest batch that is allowed."""

    batch_size: float
    """B: sequences."""
    step_s: float
    """D(B): mean step."""
    work_rate: float
    """Marginal work per second, 0..1: 1 - a/D."""


def prefill_s(times: StepTimes, tokens: float, square: float) -> float:
    """Seconds of marginal work to prefill prompts of this many tokens and this sum of squares."""
    return times.per_prefill_token_s * tokens + times.per_prefill_square_s * square


def decode_s(times: StepTimes, context: float, output: float) -> float:
    """Seconds of marginal work to decode ``output`` tokens after a prompt of ``context``."""
    return output * (times.per_sequence_s + times.per_context_token_s * (context + 0.5 * output))


def arrivals_s(times: StepTimes, arrivals: ArrivalView, output: float) -> float:
    """Seconds of marginal work that these bring; negative of what is taken back."""
    work = prefill_s(times, arrivals.input_tokens, arrivals.input_square)
    work += arrivals.requests * decode_s(times, 0.0, output)
    return work + output * times.per_context_token_s * arrivals.input_tokens


def work_s(times: StepTimes, mix: ClassMix) -> float:
    """Seconds of marginal work of a mean request."""
    return prefill_s(times, mix.input_tokens, mix.input_square) + decode_s(times, mix.input_tokens, mix.output_tokens)


def capacity(
    times: StepTimes,
    weighted: Iterable[tuple[float, ClassMix]],
    *,
    itl_target_s: float,
    kv_capacity_tokens: float,
    max_num_seqs: int,
) -> Capacity:
    """Capacity for a mix of classes, weighted by their rates. ``itl_target_s`` may be inf."""
    total = work = outputs = resident = 0.0
    for weight, mix in weighted:
        total += weight
        work += weight * work_s(times, mix)
        outputs += weight * max(mix.output_tokens, 1.0)
        # Weighted by how long a request stays: its output.
        resident += weight * mix.output_tokens * (mix.input_tokens + mix.output_tokens)
    if total <= 0.0 or work <= 0.0:
        return Capacity(batch_size=1.0, step_s=times.fixed_s, work_rate=0.5)
    slope = work / outputs
    by_kv = KV_FILL * kv_capacity_tokens / max(resident / outputs, 1.0)
    by_itl = (itl_target_s - times.fixed_s) / slope if isfinite(itl_target_s) else inf
    batch = max(1.0, min(by_kv, by_itl, float(max_num_seqs)))
    step = times.fixed_s + slope * batch
    return Capacity(batch_size=batch, step_s=step, work_rate=slope * batch / step)
