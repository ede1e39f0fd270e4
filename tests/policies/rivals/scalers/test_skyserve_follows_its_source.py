"""SkyServe: a rate over a minute, and a target that must last before anything happens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.scalers.skyserve import SkyServeSettings, decide_fleet
from policy_factory import arrival, fleet, fleet_of, model

DEFAULT = SkyServeSettings()


def plans(settings: SkyServeSettings, rates: list[int], count: int, **changes: Any) -> list[int]:
    """Plans of ticks 20 s apart with so many arrivals in each second between."""
    state, made, current = None, [], count
    for number, rate in enumerate(rates):
        now_s = 1000.0 + 20.0 * number
        arrivals = tuple(arrival(int(now_s) - back, rate) for back in range(20, 0, -1) if rate)
        one = model(fleet_of(current), arrivals=arrivals, **changes)
        decided, state = decide_fleet(settings, state, fleet(one, now_s=now_s))
        current = decided["llama"].counts["mixed"]
        made.append(current)
    return made


def test_more_after_fifteen_decisions_in_a_row() -> None:
    made = plans(DEFAULT, [10] * 20, 2)
    assert made[:14] == [2] * 14
    assert made[15:] == [5] * 5  # 10 a second, 2 each


def test_a_break_starts_the_delay_anew() -> None:
    made = plans(replace(DEFAULT, upscale_delay_s=100.0), [10] * 4 + [1] * 3 + [10] * 8, 2)
    assert made.index(max(made)) >= 4 + 3 + 4


def test_fewer_after_sixty() -> None:
    made = plans(DEFAULT, [2] * 63, 4)
    assert made[:59] == [4] * 59
    assert made[60:] == [1] * 3


def test_from_none_at_once() -> None:
    assert plans(DEFAULT, [10, 10], 0, min_instances=0)[0] >= 1
    assert plans(DEFAULT, [0, 0], 0, min_instances=0) == [0, 0]
    assert plans(DEFAULT, [0, 0], 0, min_instances=0, waiting_interactive=1)[0] == 1


def test_bounds_hold() -> None:
    assert max(plans(DEFAULT, [1000] * 20, 2, max_instances=7)) == 7


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target_qps is 0; it must be above 0"):
        SkyServeSettings(target_qps=0)
