"""A fleet policy as Ray Serve's autoscaling policy: its figures in, a number of replicas and the state out."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import Any

import pytest

from chiron.ray import ServeAutoscaler
from chiron.ray.load import request_s

LEAST, MOST, COLD_START_S = 1, 20, 60.0


@dataclass
class Context:
    """The part of Ray Serve's ``AutoscalingContext`` that is read."""

    total_num_requests: float | None = 0.0
    total_queued_requests: float | None = 0.0
    running_replicas: list[str] = field(default_factory=lambda: ["a"])
    target_num_replicas: int = 1
    capacity_adjusted_min_replicas: int = LEAST
    capacity_adjusted_max_replicas: int = MOST
    policy_state: dict[str, Any] = field(default_factory=dict)
    current_time: float | None = 1000.0


class Deployment:
    """Requests arrive, and each takes as long as the profile says; replicas come after their cold start."""

    def __init__(self, autoscaler: ServeAutoscaler) -> None:
        self.autoscaler = autoscaler
        self.now_s = 1000.0
        self.target = self.replicas = 1
        self.targets: list[int] = [1]
        self.reasons: set[str] = set()
        self._coming: list[float] = []
        self._requests = 0.0
        self._state: dict[str, Any] = {}

    def run(self, seconds: int, per_s: float) -> None:
        decisions = self.autoscaler.decisions
        for _ in range(seconds):
            self.now_s += 1.0
            while self._coming and self._coming[0] <= self.now_s:
                self._coming.pop(0)
                self.replicas += 1
            each_s = request_s(decisions.workload, decisions.profile, self._requests / max(1, self.replicas))
            self._requests += per_s - (self._requests / each_s if self.replicas else 0.0)
            self._follow(self._ask())

    def _ask(self) -> int:
        context = Context(
            total_num_requests=self._requests,
            total_queued_requests=0.0 if self.replicas else self._requests,
            running_replicas=["r"] * self.replicas,
            target_num_replicas=self.target,
            policy_state=dict(self._state),
            current_time=self.now_s,
            capacity_adjusted_min_replicas=0 if self.target == 0 else LEAST,
        )
        target, self._state = self.autoscaler(context)
        self.reasons.add(self._state["chiron"].reason)
        return target

    def _follow(self, target: int) -> None:
        self._coming += [self.now_s + COLD_START_S] * (target - self.target)
        for _ in range(self.target - target):
            if self._coming:
                self._coming.pop()
            else:
                self.replicas -= 1
        if target != self.target:
            self.targets.append(target)
        self.target = target


@pytest.mark.slow
def test_replicas_follow_the_load_up_and_down_with_the_policys_reasons() -> None:
    deployment = Deployment(ServeAutoscaler(input_tokens=1000, output_tokens=250, cold_start_s=COLD_START_S))
    deployment.run(300, 3.0)
    assert deployment.targets == [1]
    deployment.run(600, 40.0)
    busy = deployment.target
    assert 4 <= busy <= 8, deployment.targets
    assert max(deployment.targets) <= 10, "no more than the rise itself asks for"
    deployment.run(3600, 3.0)
    assert deployment.target == 1
    assert {"steady", "interactive_load", "load_fell"} <= deployment.reasons


def test_any_policy_decides_by_the_same_code_and_in_its_own_period() -> None:
    deployment = Deployment(
        ServeAutoscaler(policy="ray-serve", settings={"upscale_delay": "10s", "target_ongoing": 16})
    )
    deployment.run(5, 2.0)
    assert deployment.targets == [1]
    deployment.run(120, 20.0)
    assert deployment.target > 1
    assert "ongoing_above_target" in deployment.reasons


def test_from_zero_there_is_a_replica_as_soon_as_somebody_waits() -> None:
    autoscaler = ServeAutoscaler()
    empty = Context(running_replicas=[], target_num_replicas=0, capacity_adjusted_min_replicas=0)
    target, state = autoscaler(empty)
    assert target == 0
    empty.policy_state, empty.current_time = state, 1000.1
    empty.total_num_requests = empty.total_queued_requests = 1.0
    assert autoscaler(empty)[0] == 1, "long before the next tick"


@pytest.mark.parametrize(
    "change",
    [
        {"total_num_requests": nan},
        {"total_num_requests": None},
        {"total_queued_requests": -1.0},
        {"current_time": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_figure_that_is_missing_moves_nothing(change: dict[str, Any]) -> None:
    context = Context(total_num_requests=500.0, target_num_replicas=3, running_replicas=["a"] * 3)
    for key, value in change.items():
        setattr(context, key, value)
    autoscaler = ServeAutoscaler()
    target, state = autoscaler(context)
    assert target == 3
    context.policy_state, context.current_time = state, 1100.0 if context.current_time else None
    assert autoscaler(context)[0] == 3


def test_a_clock_that_is_set_back_moves_nothing() -> None:
    deployment = Deployment(ServeAutoscaler())
    deployment.run(60, 3.0)
    deployment.now_s -= 3600.0
    deployment.run(60, 3.0)
    assert deployment.targets == [1]


def test_bounds_hold_whatever_the_policy_wants() -> None:
    context = Context(total_num_requests=5000.0, total_queued_requests=4000.0, capacity_adjusted_max_replicas=4)
    autoscaler = ServeAutoscaler(settings={"tick": "1s"})
    for second in range(60):
        context.current_time = 1000.0 + second
        context.target_num_replicas, context.policy_state = autoscaler(context)
        assert 1 <= context.target_num_replicas <= 4
    assert context.target_num_replicas == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "chirom"}, "unknown policy 'chirom'"),
        ({"settings": {"tik": 1}}, "unknown key"),
        ({"profile": "llama/none"}, "llama/none"),
        ({"input_tokens": 0.0}, "input_tokens is 0.0; it must be a number above 0"),
        ({"outputs": 5.0}, "unknown argument outputs; one of: policy, settings, profile, input_tokens"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeAutoscaler(**arguments)
