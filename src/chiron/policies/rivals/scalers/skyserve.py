"""``skyserve``: SkyPilot's SkyServe, on requests a second.

Every 20 s::

    target = ceil(requests of the last 60 s / 60 / target_qps), within the bounds
    more   : once the target has been above the present number for 300 s, in every decision
    fewer  : once it has been below it for 1,200 s; from none to some at once

Sources: skypilot-org/skypilot, sky/serve/autoscalers.py and constants.py (the rule, window, delays and intervals).
``target_qps_per_replica`` has no default there, and one is needed; ours is a common example's. It sees neither lengths
nor latency, no queue and no SLO. Requests go to the instance with the fewest, as its least-load balancer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated

from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, mixed_plan, recent
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class SkyServeSettings:
    target_qps: Annotated[float, Between(0.2, 20.0, log=True)] = 2.0
    """Requests a second per replica. Ours: SkyServe has no default, its examples have 1 to 5."""
    window_s: float = 60.0
    """Of the rate (SkyServe's constant, as the next three)."""
    upscale_delay_s: Annotated[float, Between(20.0, 300.0, log=True)] = 300.0
    downscale_delay_s: Annotated[float, Between(60.0, 1200.0, log=True)] = 1200.0
    interval_s: float = 20.0
    """Between decisions."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "target_qps", "window_s", "interval_s", "max_num_seqs")
        at_least(0, self, "upscale_delay_s", "downscale_delay_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is remembered of one model."""

    arrivals: tuple[tuple[int, int], ...] = ()
    """(second, requests) in the window."""
    above: int = 0
    """Decisions in a row with a target above the present number."""
    below: int = 0


State = dict[str, Memory]


def decide_fleet(settings: SkyServeSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: a service each."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(
    settings: SkyServeSettings, memory: Memory, model: ModelView, now_s: float
) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    arrivals = recent(memory.arrivals, model, now_s - settings.window_s)
    rate = sum(count for _, count in arrivals) / settings.window_s
    target = min(max(ceil(rate / settings.target_qps), model.min_instances), model.max_instances)
    above = memory.above + 1 if target > current else 0
    below = memory.below + 1 if target < current else 0
    count, reason = current, "steady" if target == current else "delayed"
    if target > current and (current == 0 or above >= int(settings.upscale_delay_s / settings.interval_s)):
        count, reason = target, "rate_above_target"
    elif target < current and below >= int(settings.downscale_delay_s / settings.interval_s):
        count, reason = target, "rate_below_target"
    if count != current:
        above = below = 0
    if model.waiting_interactive and count == 0:  # Too few a minute to be a replica's share; SkyServe takes one then.
        count, reason = 1, "first_replica"
    numbers = {"requests_per_s": rate, "target": float(target)}
    return mixed_plan(count, reason, numbers), Memory(arrivals=arrivals, above=above, below=below)


def make_skyserve(settings: SkyServeSettings) -> Policy:
    return Policy(
        name="skyserve",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.interval_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
