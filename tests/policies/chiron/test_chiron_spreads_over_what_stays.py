"""How many instances ``chiron`` spreads interactive requests over: those that will be there in a while anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import ModelMemory, first_memory
from chiron.policies.chiron.load_history import remembered
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import CONSTANT, Floats, Headroom, Rule
from chiron.policies.views import ModelPlan
from policy_factory import fleet, fleet_of, group, model

NOW_S = 10_000.0
OURS = ChironSettings(backtest_s=1e9)
FOLLOWS = Rule(window_s=15, settle_s=300)


def knowing(load: Floats, rule: Rule, h: float) -> ModelMemory:
    """An hour's load until ``NOW_S``."""
    memory = first_memory(OURS, model(fleet_of(4)), NOW_S)
    history = remembered(NOW_S - len(load), load, np.ones((1, len(load))))
    return replace(memory, history=history, headroom=Headroom(rule=rule, h=h, instances=2.0), backtest_s=NOW_S)


def peaked(ago_s: int) -> Floats:
    """A load of one, and a peak of 3.3 for half a minute."""
    load = np.ones(3600)
    load[len(load) - ago_s : len(load) - ago_s + 30] = 3.3
    return load


def planned(
    load: Floats, rule: Rule = FOLLOWS, h: float = 1.1, settings: ChironSettings = OURS, **view: Any
) -> ModelPlan:
    seen = fleet(model(fleet_of(4), **view), now_s=NOW_S + 5.0, since_s=5.0)
    plan, _ = decide_fleet(settings, {"llama": knowing(load, rule, h)}, seen)
    return plan["llama"]


def test_over_all_while_none_is_to_go() -> None:
    plan = planned(peaked(ago_s=100))
    assert (sum(plan.counts.values()), plan.spread_over) == (4, 4)


def test_those_that_will_go_soon_are_left_alone_before_they_go() -> None:
    plan = planned(peaked(ago_s=320))
    assert (sum(plan.counts.values()), plan.spread_over) == (4, 2)


def test_over_those_that_the_bounds_keep() -> None:
    assert planned(np.zeros(3600), min_instances=3).spread_over == 3


def test_over_a_fleet_that_does_not_follow_the_load() -> None:
    plan = planned(peaked(ago_s=3500), rule=CONSTANT, h=4.0)
    assert (sum(plan.counts.values()), plan.spread_over) == (4, 4)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        pytest.param({"groups": (group(NOW_S + 3600.0, 10),)}, 0, id="batch work waits"),
        pytest.param({"running_batch": 10}, 4, id="batch work all runs"),
        pytest.param({"settings": replace(OURS, spread=False)}, 0, id="off"),
    ],
)
def test_packed_while_batch_work_waits_for_room(beside: dict[str, Any], expected: int) -> None:
    assert planned(peaked(ago_s=100), **beside).spread_over == expected
