"""Views made by hand for the tests of policies: a healthy model of one instance kind, changed by what a test says."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import Any

from chiron.core.types import RequestClass, Role
from chiron.policies.views import (
    ArrivalView,
    ClassMix,
    FleetView,
    GroupView,
    InstanceView,
    LocalView,
    ModelView,
    StepTimes,
)

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.2)
JOBS = RequestClass(name="jobs", kind="batch", deadline_s=3600.0)
TIMES = StepTimes(
    fixed_s=0.012, per_sequence_s=4e-5, per_context_token_s=6e-8, per_prefill_token_s=6e-5, per_prefill_square_s=1.5e-9
)


def instance(id: int = 1, **changes: Any) -> InstanceView:
    """Ready and mixed, scraped a moment ago, idle, with room for 16,000 tokens (1,000 blocks)."""
    given: dict[str, Any] = {
        "id": id, "role": "mixed", "state": "ready", "age_s": 600.0, "dispatched": 0, "dispatched_interactive": 0,
        "max_batch_size": 256, "kv_capacity_tokens": 16_000, "sample_age_s": 0.5, "running": 0, "waiting": 0,
        "waiting_tokens": 0, "head_tokens": 0, "kv_used_tokens": 0, "itl_s": 0.03,
    }  # fmt: skip
    return InstanceView(**(given | changes))


def fleet_of(count: int, first: int = 1, **changes: Any) -> tuple[InstanceView, ...]:
    return tuple(instance(first + i, **changes) for i in range(count))


def mix(cls: RequestClass, **changes: Any) -> ClassMix:
    given: dict[str, Any] = {
        "cls": cls, "input_tokens": 500.0, "input_square": 4e5, "output_tokens": 200.0, "output_sd": 100.0,
        "finished": 100,
    }  # fmt: skip
    return ClassMix(**(given | changes))


def group(deadline_s: float, requests: int, **changes: Any) -> GroupView:
    given: dict[str, Any] = {
        "deadline_s": deadline_s, "requests": requests, "input_tokens": 500.0 * requests,
        "input_square": 4e5 * requests, "output_tokens": 200.0 * requests,
    }  # fmt: skip
    return GroupView(**(given | changes))


def arrival(second: int, requests: int, cls: RequestClass = CHAT) -> ArrivalView:
    return ArrivalView(
        second=second, cls=cls, requests=requests, input_tokens=500.0 * requests, input_square=4e5 * requests
    )


def model(instances: Iterable[InstanceView], **changes: Any) -> ModelView:
    """A model whose plan is the instances that start or are ready; bounds 1 to 50."""
    instances = tuple(instances)
    planned: dict[Role, int] = {"interactive": 0, "mixed": 0, "batch": 0}
    for one in instances:
        if one.state in ("starting", "ready"):
            planned[one.role] += 1
    given: dict[str, Any] = {
        "name": "llama", "min_instances": 1, "max_instances": 50, "gpu": "A100", "gpus_per_instance": 1,
        "price_per_hour": 2.0, "kv_capacity_tokens": 16_000, "max_num_seqs": 1024, "max_num_batched_tokens": 8192,
        "planned": planned, "instances": instances, "arrivals": (), "mixes": (mix(CHAT), mix(JOBS)),
        "waiting_interactive": 0, "waiting_input_tokens": 0.0,
        "waiting_input_square": 0.0, "oldest_wait_s": 0.0, "groups": (), "running_batch": 0, "attained": 0,
        "missed": 0, "itl_missed": 0.0, "step_times": TIMES, "cold_start_s": 60.0, "cold_starts_seen": 1,
    }  # fmt: skip
    return ModelView(**(given | changes))


def fleet(*models: ModelView, now_s: float = 1000.0, since_s: float = 15.0) -> FleetView:
    return FleetView(now_s=now_s, since_s=since_s, models=models)


def local(**changes: Any) -> LocalView:
    """An instance that decodes at its cap, well within an ITL SLO of 0.2 s."""
    given: dict[str, Any] = {
        "now_s": 1000.0, "role": "mixed", "max_batch_size": 64, "max_num_seqs": 4096, "max_num_batched_tokens": 8192,
        "token_budget_max": 8192,
        "prefill_limit_s": inf, "batch_limit": None, "batch_waits": False, "itl_missed": 0.0, "dispatched": 64,
        "at_cap": True, "itl_slo_s": 0.2, "itl_s": 0.05,
        "decode_batch": 60.0, "throughput": 1200.0, "class_counts": {"chat": 64}, "mixes": {"chat": mix(CHAT)},
        "step_times": TIMES, "learned": True,
    }  # fmt: skip
    return LocalView(**(given | changes))
