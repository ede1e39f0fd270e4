"""A fleet policy of Chiron as a custom autoscaling policy of Ray Serve, for a deployment or Ray Serve LLM.

    autoscaling_config={
        "min_replicas": 1, "max_replicas": 8, "upscale_delay_s": 0, "downscale_delay_s": 0, "look_back_period_s": 5,
        "policy": {
            "policy_function": "chiron.ray:ServeAutoscaler",
            "policy_kwargs": {"profile": "llama-3.1-8b/a100/tp1", "input_tokens": 1000, "output_tokens": 250},
        },
    }

Ray Serve's delays are zero because the policy has hold times of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from chiron.ray.decisions import Decisions, Memory
from chiron.ray.load import ServeLoad, Workload

STATE = "chiron"
"""Key of Ray Serve's state under which ours is."""


class ServeAutoscaler:
    """Called by Ray Serve's controller with an ``AutoscalingContext``; returns the number of replicas, and the state
    that it is to hand back."""

    def __init__(
        self,
        *,
        policy: str = "chiron",
        settings: Mapping[str, Any] | None = None,
        profile: str = "llama-3.1-8b/a100/tp1",
        **workload: float,
    ) -> None:
        """``settings`` of the policy as in ``[policies.NAME]``; ``workload``: the fields of ``load.Workload``. Raises
        ValueError for what there is not."""
        unknown = sorted(set(workload) - set(Workload.__dataclass_fields__))
        if unknown:
            allowed = ", ".join(("policy", "settings", "profile", *Workload.__dataclass_fields__))
            raise ValueError(f"unknown argument {', '.join(unknown)}; one of: {allowed}")
        self.decisions = Decisions(
            policy=policy, settings=settings or {}, profile=profile, workload=Workload(**workload)
        )

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        before = context.policy_state.get(STATE)
        memory = before if isinstance(before, Memory) else None
        if context.current_time is None:
            return int(context.target_num_replicas), {STATE: memory}
        memory = self.decisions.decide(serve_load(context), float(context.current_time), memory)
        assert memory.target is not None
        return memory.target, {STATE: memory}


def serve_load(context: Any) -> ServeLoad:
    total, queued = _figure(context.total_num_requests), _figure(context.total_queued_requests or 0.0)
    return ServeLoad(
        # Both are means over windows of their own, so the difference may fall below zero.
        running=max(0.0, total - queued) if total == total and queued == queued else nan,
        queued=queued,
        replicas=len(context.running_replicas),
        target=int(context.target_num_replicas),
        least=int(context.capacity_adjusted_min_replicas),
        most=int(context.capacity_adjusted_max_replicas),
    )


def _figure(value: object) -> float:
    return float(value) if isinstance(value, int | float) else nan
