"""What autoscalers of one Deployment have in common: each model by itself, one number of instances, scrapes that may be
missing, and the requests of the last minute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import TypeVar

from chiron.policies.views import FleetPlan, FleetView, InstanceView, ModelPlan, ModelView

Settings = TypeVar("Settings")
Memory = TypeVar("Memory")
Arrivals = tuple[tuple[int, int], ...]
"""(second, requests)."""


def each_model(
    decide: Callable[[Settings, Memory, ModelView, float], tuple[ModelPlan, Memory]],
    begin: Callable[[], Memory],
    settings: Settings,
    state: Mapping[str, Memory] | None,
    view: FleetView,
) -> tuple[FleetPlan, dict[str, Memory]]:
    """A fleet hook from the decision about one model, with a memory of its own; ``begin`` makes that of a new one."""
    plans: dict[str, ModelPlan] = {}
    memories: dict[str, Memory] = {}
    for model in view.models:
        memory = state[model.name] if state and model.name in state else begin()
        plans[model.name], memories[model.name] = decide(settings, memory, model, view.now_s)
    return plans, memories


def mixed_plan(count: int, reason: str, numbers: Mapping[str, float] | None = None) -> ModelPlan:
    """So many instances, which serve everything."""
    return ModelPlan(counts={"mixed": count}, reason=reason, numbers=numbers or {})


def within_bounds(model: ModelView, count: int) -> int:
    """At least one, as a Deployment that such an autoscaler has."""
    return min(max(count, model.min_instances, 1), model.max_instances)


def scraped(model: ModelView, stale_s: float) -> list[InstanceView] | None:
    """The ready instances whose scrape is no older than that; None: the metrics are missing, and nothing can be said.
    One that has just come up and was not scraped yet is not counted; one whose scrapes stopped is unknown."""
    ready = [i for i in model.instances if i.state == "ready"]
    fresh = [i for i in ready if i.sample_age_s <= stale_s]
    return None if not fresh or any(stale_s < i.sample_age_s < inf for i in ready) else fresh


def held(model: ModelView) -> ModelPlan:
    """The plan without metrics: what there is, and one if requests wait for none."""
    current = sum(model.planned.values())
    return mixed_plan(max(current, 1 if model.waiting_interactive else 0), "metrics_missing")


def recent(kept: Arrivals, model: ModelView, since_s: float) -> Arrivals:
    """Requests as they came since then. What was refused or taken back later was counted when it came, and stays
    counted: such autoscalers count requests at a load balancer."""
    new = ((arrival.second, arrival.requests) for arrival in model.arrivals if arrival.requests > 0)
    return tuple(each for each in (*kept, *new) if each[0] >= since_s)
