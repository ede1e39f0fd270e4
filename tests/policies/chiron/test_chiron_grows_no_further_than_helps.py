"""Limits of a fleet's growth under ``chiron``: what would be ready too late, or costs more than staying as large."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import first_memory
from chiron.policies.chiron.load_history import presumed
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import CONSTANT, Headroom, Rule, choose_headroom
from chiron.policies.views import GroupView
from policy_factory import CHAT, arrival, fleet, group, instance, model

NOW_S = 1000.0


def batch_planned(
    requests: int,
    left_s: float,
    *,
    running: int = 0,
    cold_start_s: float = 60.0,
    more: tuple[GroupView, ...] = (),
    **changes: float,
) -> int:
    ours = replace(ChironSettings(), **changes)
    live = model(
        [instance(id=i) for i in range(2)],
        groups=(group(deadline_s=NOW_S + left_s, requests=requests), *more),
        cold_start_s=cold_start_s,
    )
    memory = replace(first_memory(ours, live, NOW_S), extra=running)
    plan, _ = decide_fleet(ours, {live.name: memory}, fleet(live, now_s=NOW_S, since_s=5.0))
    return int(plan[live.name].numbers["wanted"])


def test_the_last_of_a_batch_asks_for_no_more_instances_than_it_keeps_busy_for_a_start() -> None:
    last_s = 40.0
    unlimited = batch_planned(2000, last_s, batch_least_s=0.0)
    assert unlimited == 50, "divided by no time left it asks for all there are"
    limited = batch_planned(2000, last_s)
    assert 2 < limited < 20
    assert batch_planned(2000, last_s, cold_start_s=240.0) < limited
    assert batch_planned(4000, last_s) > limited
    assert batch_planned(2000, last_s, cold_start_s=1.0) <= 2 * limited + 2, "a start of a second is no reason for many"


@pytest.mark.parametrize(("left_s", "cold_start_s"), [(500.0, 300.0), (400.0, 300.0), (130.0, 60.0)])
def test_a_deadline_that_can_still_be_met_gets_what_it_needs_however_long_a_start_is(
    left_s: float, cold_start_s: float
) -> None:
    ours = {"left_s": left_s, "cold_start_s": cold_start_s}
    assert 2 < batch_planned(8000, **ours) == batch_planned(8000, **ours, batch_least_s=0.0) < 50


def test_a_group_that_is_lost_does_not_hide_what_another_needs() -> None:
    later = group(deadline_s=NOW_S + 500.0, requests=8000)
    alone = batch_planned(8000, 500.0, cold_start_s=300.0)
    both = {"left_s": 250.0, "cold_start_s": 300.0, "more": (later,)}
    assert 2 < alone < batch_planned(1000, **both) < batch_planned(1000, **both, batch_least_s=0.0)


def test_instances_that_were_added_for_a_batch_stay_until_it_is_done() -> None:
    assert batch_planned(2000, 40.0, running=30) > batch_planned(2000, 40.0)


def test_a_deadline_far_enough_away_is_planned_for_as_ever() -> None:
    assert batch_planned(60_000, 1500.0) == batch_planned(60_000, 1500.0, batch_least_s=0.0) > 2


@pytest.mark.parametrize(("steady", "expected"), [(inf, 15), (4.0, 6), (8.0, 11)])
def test_a_fleet_that_follows_is_never_much_larger_than_one_that_would_have_done_without(
    steady: float, expected: int
) -> None:
    """The busiest minute of an hour, times the headroom that its one spike needed, is no fleet for the next hour."""
    ours = ChironSettings()
    live = model([instance(id=i) for i in range(2)], arrivals=(arrival(999, 1),))
    found = Headroom(rule=Rule(window_s=60, settle_s=1800), h=5.0, instances=3.0, steady=steady)
    load = np.ones(3600)
    load[3000:3060] = 3.0
    counts = np.ones((1, 3600))
    memory = first_memory(ours, live, NOW_S)
    history = replace(presumed(NOW_S - 3600, load, 1), counts=counts)
    memory = replace(memory, history=history, headroom=found, backtest_s=NOW_S)
    plan, _ = decide_fleet(ours, {live.name: memory}, fleet(live, now_s=NOW_S, since_s=5.0))
    assert plan[live.name].counts["mixed"] == expected
    plan, _ = decide_fleet(replace(ours, over_steady=0.0), {live.name: memory}, fleet(live, now_s=NOW_S, since_s=5.0))
    assert plan[live.name].counts["mixed"] == 15
    assert CHAT.interactive


def test_a_backtest_tells_the_least_fixed_fleet_beside_the_rule_that_it_chose() -> None:
    load = np.linspace(1.0, 30.0, 3600)
    found = choose_headroom(
        load,
        np.ceil(load)[None, :],
        [2.0],
        [CONSTANT, Rule(window_s=60, settle_s=60)],
        cold_start_s=60.0,
        tick_s=5.0,
        miss_max=0.005,
        floor=1,
        ceiling=100,
    )
    assert found.rule != CONSTANT
    assert 28.0 <= found.steady <= 30.0
