"""``chiron`` asks for sleepers, and plans with what its next starts will take: a wake, a peer, or a cold start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chiron.core.types import StartSource
from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import first_memory, start_s
from chiron.policies.chiron.load_history import presumed
from chiron.policies.chiron.settings import ChironSettings
from policy_factory import arrival, fleet, instance, model

SETTINGS = ChironSettings()
BUSY = tuple(arrival(second, 4) for second in range(990, 999))


def planned_with(*, ready: int, busiest: float = 0.0, settings: ChironSettings = SETTINGS, **given: Any) -> float:
    """Start time, where the busiest minute of the last hour was worth so many instances."""
    view = model([instance(number) for number in range(1, ready + 1)], **given)
    memory = first_memory(SETTINGS, view, 1000.0)
    load = np.zeros(1200)
    load[300:360] = busiest
    return start_s(settings, replace(memory, history=presumed(0, load, 1)), view)


ALL: Mapping[StartSource, float] = {"node": 70.0, "memory": 3.0, "peer": 9.0}
OWN: Mapping[StartSource, float] = {"node": 70.0, "memory": 3.0}


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        (60.0, {"ready": 2}),
        (60.0, {"ready": 2, "start_s": {"node": 70.0, "disk": 20.0}}),
        (3.0, {"ready": 2, "start_s": ALL, "asleep": 1}),
        (3.0, {"ready": 2, "start_s": ALL, "asleep": 4, "busiest": 4.6}),
        (9.0, {"ready": 2, "start_s": ALL, "asleep": 4, "busiest": 4.7}),
        (60.0, {"ready": 2, "start_s": OWN, "asleep": 4, "busiest": 4.7}),
        (60.0, {"ready": 5, "start_s": OWN, "asleep": 0}),
        (70.0, {"ready": 0, "start_s": ALL, "asleep": 0}),
        (9.0, {"ready": 2, "start_s": ALL, "asleep": 1, "settings": ChironSettings(sleepers=False)}),
        (60.0, {"ready": 2, "asleep": 1}),
    ],
    ids=[
        "no source is known to be fast",
        "a warm node is a matter of luck, and in the mean already",
        "a sleeper",
        "as many as the busiest minute would need",
        "fewer: a peer",
        "fewer, and no peer",
        "all of them are awake",
        "no instance is ready to hand its weights over",
        "not to be counted on",
        "none has woken yet",
    ],
)
def test_what_the_next_starts_take(expected: float, given: dict[str, Any]) -> None:
    assert planned_with(**given) == expected


@pytest.mark.parametrize(("on", "asleep"), [(True, 50), (False, 0)])
def test_it_asks_for_as_many_sleepers_as_there_may_be_instances(*, on: bool, asleep: int) -> None:
    plans, _ = decide_fleet(ChironSettings(sleepers=on), None, fleet(model([instance(1)])))
    assert plans["llama"].asleep == asleep


def test_plans_and_backtests_look_ahead_by_that() -> None:
    view = model([instance(number) for number in range(1, 9)], asleep=20, start_s={"memory": 3.0}, arrivals=BUSY)
    memory = replace(first_memory(SETTINGS, view, 1000.0), backtest_s=0.0)
    memory = replace(memory, history=presumed(-9000, np.full(10_000, 4.0), 1))
    plans, after = decide_fleet(SETTINGS, {"llama": memory}, fleet(view, now_s=1000.0, since_s=5.0))
    assert plans["llama"].numbers["cold_start_s"] == 3.0
    backtest = after["llama"].backtest
    assert backtest is not None
    assert backtest.question.cold_start_s == 3.0
