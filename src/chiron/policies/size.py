"""How large a request is, what its prefill takes, and what fits on an instance: computed here and nowhere else."""

from __future__ import annotations

from chiron.core.types import Instance, Placement, Request
from chiron.policies.policy import Estimates

KV_FILL = 0.95
"""Share of KV that dispatch plans with; the rest absorbs outputs longer than expected."""


def prompt_tokens(request: Request) -> int:
    """Tokens to prefill: its prompt, and what it had made when it was interrupted."""
    return request.input_tokens + request.tokens_done


def prefill_s(estimates: Estimates, tokens: int) -> float:
    """Seconds of prefill of one prompt."""
    return tokens * (estimates.prefill_token_s + tokens * estimates.prefill_square_s)


def kv_limit(instance: Instance) -> float:
    """KV tokens that may be booked there."""
    return KV_FILL * instance.kv_capacity_tokens


def within(instance: Instance, sequences: int, kv_tokens: float) -> bool:
    """Whether so many sequences, and so much KV in all, may be on this instance."""
    return sequences <= instance.max_batch_size and kv_tokens <= KV_FILL * instance.kv_capacity_tokens


def may_hold(instance: Instance, request: Request) -> bool:
    """Whether its prompt fits there while nothing else runs, and the instance is not kept for a longer one."""
    return prompt_tokens(request) < instance.kv_capacity_tokens <= request.kv_most_tokens


def fits(instance: Instance, request: Request, kv_tokens: float) -> bool:
    """Whether it may be there too. One that is larger than all that may be booked, or asks for more choices than the
    max batch size, runs alone, if its prompt fits."""
    if instance.kv_capacity_tokens > request.kv_most_tokens:
        return False
    if within(instance, instance.sequences + request.sequences, instance.kv_reserved_tokens + kv_tokens):
        return True
    return not instance.requests and prompt_tokens(request) < instance.kv_capacity_tokens


def kv_tokens(estimates: Estimates, request: Request) -> float:
    """KV that it will hold at its expected end, its prompt once for all its choices; whole tokens of it are booked."""
    return prompt_tokens(request) + request.sequences * estimates.expected_output[request.class_name]


def placed(estimates: Estimates, request: Request, instance: Instance) -> Placement:
    """What the request takes on this instance, whether or not it fits."""
    saved = request.kv_saved_tokens and request.kv_saved_on == instance.id
    return Placement(
        instance,
        0.0 if saved else prefill_s(estimates, prompt_tokens(request)),
        int(kv_tokens(estimates, request)),
    )


def prefill_left_s(backlog_s: float, cost_s: float) -> float:
    """Prefill that waits on an instance once ``cost_s`` of it is over. Sums of floats leave dust behind."""
    left_s = backlog_s - cost_s
    return left_s if left_s > 1e-9 else 0.0
