"""What a rule has waited for already is not waited for again, and a restart is no reason to wait."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import ModelMemory, first_memory
from chiron.policies.chiron.load_history import remembered
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.fluid_queue import Floats
from chiron.policies.headroom import Headroom, Rule
from policy_factory import fleet, fleet_of, model

NOW_S = 10_000.0
OURS = ChironSettings(backtest_s=1e9)


def knowing(load: Floats) -> ModelMemory:
    """An hour's load until ``NOW_S``, and a rule that waits for a minute."""
    memory = first_memory(OURS, model(fleet_of(4)), NOW_S)
    headroom = Headroom(rule=Rule(window_s=15, settle_s=60), h=1.1, instances=2.0)
    history = remembered(NOW_S - len(load), load, np.ones((1, len(load))))
    return replace(memory, history=history, headroom=headroom, backtest_s=NOW_S)


def plans(memory: ModelMemory, ticks: int, **changes: object) -> list[tuple[int, str]]:
    state, found = {"llama": memory}, []
    for tick in range(1, ticks + 1):
        view = fleet(model(fleet_of(4), **changes), now_s=NOW_S + 5.0 * tick, since_s=5.0)
        plan, state = decide_fleet(OURS, state, view)
        found.append((sum(plan["llama"].counts.values()), plan["llama"].reason))
    return found


def test_a_fleet_shrinks_when_a_peak_is_as_old_as_its_rule_waits() -> None:
    load = np.ones(3600)
    load[-80:-55] = 3.3
    assert plans(knowing(load), 4) == [(4, "steady"), (3, "load_fell"), (2, "load_fell"), (2, "load_fell")]


def test_a_queue_is_a_reason_to_stay_for_the_hold() -> None:
    queue = {"waiting_interactive": 1100, "waiting_input_tokens": 5.5e5, "waiting_input_square": 4.4e8}
    asked, state = decide_fleet(
        OURS,
        {"llama": knowing(np.ones(3600))},
        fleet(model(fleet_of(4), **queue), now_s=NOW_S + 5.0, since_s=5.0),
    )
    assert asked["llama"].numbers["wanted"] == 4
    assert state["llama"].last_direction == 0, "no change, which would be a reason of its own to stay"
    plan, after = decide_fleet(OURS, state, fleet(model(fleet_of(4)), now_s=NOW_S + 10.0, since_s=5.0))
    assert plan["llama"].numbers["wanted"] == 2
    assert sum(plan["llama"].counts.values()) == 4
    assert after["llama"].last_direction == 0


def test_an_hour_that_is_remembered_need_not_be_waited_for_again() -> None:
    assert plans(knowing(np.ones(3600)), 1) == [(2, "load_fell")]
    fresh = first_memory(OURS, model(fleet_of(4)), NOW_S)
    assert plans(replace(fresh, headroom=replace(fresh.headroom, h=0.1)), 1) == [(4, "hold_before_down")]
