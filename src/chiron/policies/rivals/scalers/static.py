"""A static fleet: a fixed number of instances, each request to the one with the fewest outstanding."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Protocol

from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.views import FleetPlan, FleetView, ModelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticSettings:
    instances: Annotated[int, Between(1, 256, log=True)] = 0
    """Instances of each model; 0: the initial fleet stays."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""


class Fixed(Protocol):
    """Settings of a rival that schedules on a fleet that somebody else has sized."""

    @property
    def instances(self) -> int: ...

    @property
    def fleet_factor(self) -> float: ...


def initial_count(settings: Fixed, count: int) -> int:
    """The initial fleet times ``fleet_factor``, rounded up but for what is dust of floats."""
    return count if settings.instances else ceil(settings.fleet_factor * count - 1e-9)


def initial_roles(settings: Fixed, count: int) -> dict[str, int]:
    return {"mixed": initial_count(settings, count)}


def decide_fleet(settings: StaticSettings | Fixed, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    plans = {}
    for model in view.models:
        count = settings.instances or max(sum(model.planned.values()), model.min_instances)
        plans[model.name] = ModelPlan(counts={"mixed": count}, reason="static")
    return plans, None


def make_static(settings: StaticSettings) -> Policy:
    return Policy(
        name="static",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
