"""The headroom of ``chiron`` before its first backtest; with ``prior_steady_s``, less the longer traffic was seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import ModelMemory, first_memory, headroom_now
from chiron.policies.chiron.load_history import presumed
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import Headroom, Rule
from policy_factory import arrival, fleet, instance, model

OURS = ChironSettings(prior_steady_s=120.0)


def after(seconds: int, *, idle_s: int = 0, ours: ChironSettings = OURS) -> ModelMemory:
    """Nobody came for ``idle_s``, then one request a second for so long."""
    memory = first_memory(ours, model([instance()]), 0.0)
    before = ours.prior_s + idle_s
    counts = np.concatenate((np.zeros((1, before)), np.ones((1, seconds))), axis=1)
    return replace(memory, history=replace(presumed(0.0, np.ones(before + seconds), 1), counts=counts))


@pytest.mark.parametrize(("seconds", "h"), [(0, 1.5), (60, 1.5), (120, 1.5), (240, 1.3536), (480, 1.25), (600, 1.2236)])
def test_falls_with_the_root_of_the_time_seen(seconds: int, h: float) -> None:
    assert headroom_now(OURS, after(seconds)) == pytest.approx(h, abs=1e-4)


def test_time_without_requests_shows_nothing() -> None:
    assert headroom_now(OURS, after(0, idle_s=900)) == 1.5
    assert headroom_now(OURS, after(240, idle_s=900)) == headroom_now(OURS, after(240))


@pytest.mark.parametrize(
    "changes",
    [{"prior_steady_s": ChironSettings().prior_steady_s}, {"adapt_headroom": False}],
    ids=["default", "fixed"],
)
def test_stays_where_that_is_asked_for(changes: dict[str, float]) -> None:
    ours = replace(OURS, **changes)
    assert headroom_now(ours, after(480, ours=ours)) == 1.5


def test_what_a_backtest_found_is_left_alone() -> None:
    memory = replace(after(480), headroom=Headroom(rule=Rule(window_s=60, settle_s=300), h=1.5, instances=3.0))
    assert headroom_now(OURS, memory) == 1.5


def test_the_plan_and_its_numbers_follow() -> None:
    """A steady load of some 6 instances for eight minutes: the fleet shrinks with the headroom before any backtest."""
    state, plans = None, []
    for tick in range(1, 97):
        now_s = 5.0 * tick
        arrivals = tuple(arrival(int(now_s) - k, 60) for k in range(5, 0, -1))
        view = fleet(
            model([instance(id=i) for i in range(20)], arrivals=arrivals, max_instances=40), now_s=now_s, since_s=5.0
        )
        found, state = decide_fleet(OURS, state, view)
        plans.append(found["llama"])
    early, late = plans[23].numbers, plans[-1].numbers
    assert early["headroom"] == 1.5
    assert late["headroom"] == pytest.approx(1.25)
    assert late["level"] == pytest.approx(early["level"])
    assert late["wanted"] < early["wanted"]
    assert plans[-1].ibp_target == pytest.approx(1 / 1.25)


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(ValueError, match="prior_steady_s"):
        ChironSettings(prior_steady_s=-1.0)
