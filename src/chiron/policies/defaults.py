"""What a hook does that a policy does not set, and that has to do something."""

from __future__ import annotations

from typing import Any

from chiron.core.types import Instance
from chiron.policies.policy import BatchOrder, Estimates, Order, Router
from chiron.policies.queues.order import KeyOrder
from chiron.policies.routers.least import LeastRouter
from chiron.policies.views import FleetPlan, FleetView, ModelPlan


def earliest_first_token(settings: Any, estimates: Estimates) -> Order:
    """``order``: earliest TTFT deadline first."""
    return KeyOrder()


def arrival_order(settings: Any, estimates: Estimates) -> BatchOrder:
    """Of a policy without ``order_batch``, which holds no batch work: nothing is ever in it."""
    return KeyOrder()


def least_outstanding(settings: Any, estimates: Estimates) -> Router:
    """``place``: on the instance with the fewest requests, as many as come."""
    return LeastRouter(estimates, outstanding)


def outstanding(instance: Instance) -> float:
    return len(instance.requests)


def keep_fleet(settings: Any, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    """``fleet``: the plan in force."""
    return {model.name: ModelPlan(counts=dict(model.planned), reason="kept") for model in view.models}, None
