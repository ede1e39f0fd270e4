"""``chiron`` with ``min_instances = 0``: an instance comes with the first request, and not before."""

from __future__ import annotations

from typing import Any

import pytest

from chiron.policies.policy import Policy
from chiron.policies.registry import POLICIES, make_policy
from policy_factory import arrival, fleet, fleet_of, model


class Planner:
    """Ticks of one policy over a fleet that becomes what was planned."""

    def __init__(self, **settings: float) -> None:
        self.policy: Policy = make_policy("chiron", POLICIES["chiron"].settings(**settings))
        self.state: Any = None
        self.now_s = 5.0

    def tick(self, count: int, **changes: Any) -> int:
        view = fleet(model(fleet_of(count), min_instances=0, **changes), now_s=self.now_s, since_s=5.0)
        plans, self.state = self.policy.fleet(self.policy.settings, self.state, view)
        self.now_s += 5.0
        return sum(plans["llama"].counts.values())


def test_nothing_is_started_before_anybody_asks() -> None:
    planner = Planner()
    assert {planner.tick(0) for _ in range(200)} == {0}


def test_the_first_request_starts_one() -> None:
    planner = Planner()
    for _ in range(20):
        planner.tick(0)
    came = {"arrivals": (arrival(int(planner.now_s), 1),), "waiting_interactive": 1, "waiting_input_tokens": 500.0}
    assert planner.tick(0, **came) == 1
    assert planner.tick(1) == 1


def test_a_request_before_the_first_tick_starts_one() -> None:
    came = {"arrivals": (arrival(1, 1),), "waiting_interactive": 1, "waiting_input_tokens": 500.0}
    assert Planner().tick(0, **came) == 1


def test_what_runs_already_is_kept_until_it_is_known_to_be_idle() -> None:
    planner = Planner()
    assert planner.tick(2) == 2


@pytest.mark.parametrize("keep_last_s", [0.0, 0.5, 1.0, 10.0, 300.0])
def test_the_last_one_is_kept_for_as_long_as_was_said(keep_last_s: float) -> None:
    planner = Planner(keep_last_s=keep_last_s)
    for _ in range(200):
        assert planner.tick(1, arrivals=(arrival(int(planner.now_s) - 1, 1),)) == 1
    last_s = planner.now_s - 5.0
    while planner.tick(1):
        assert planner.now_s - last_s <= keep_last_s + 5.0
