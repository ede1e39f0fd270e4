"""A pipeline as profiles: those of its stages, and their sum for whoever looks at an instance as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from chiron.engines.profile import Profile


def whole_profile(name: str, stages: Sequence[Profile], *, max_num_seqs: int, step_tokens: int) -> Profile:
    """The way of one micro-batch through all stages, on one GPU after the other: the sum of their passes, exactly where
    each is a share of one model's layers. Its KV is what one replica of each stage holds."""
    first = stages[0]
    return Profile(
        name=name,
        model=first.model,
        gpu=first.gpu,
        tp=sum(stage.tp for stage in stages),
        engine=first.engine,
        h_ms=sum(stage.h_ms + stage.step_overhead_ms for stage in stages),
        w0_ms=sum(stage.w0_ms for stage in stages),
        f_ms_per_token=sum(stage.f_ms_per_token for stage in stages),
        c_ms_per_context_token=sum(stage.c_ms_per_context_token for stage in stages),
        q_ms_per_token_squared=sum(stage.q_ms_per_token_squared for stage in stages),
        kv_capacity_tokens=min(stage.kv_capacity_tokens for stage in stages),
        kv_bytes_per_token=sum(stage.kv_bytes_per_token for stage in stages),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        request_overhead_ms=first.request_overhead_ms,
        price_per_gpu_hour=max(stage.price_per_gpu_hour for stage in stages),
        source="the sum of the stages of a pipeline",
    )
