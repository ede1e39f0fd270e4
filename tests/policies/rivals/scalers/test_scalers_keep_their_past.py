"""After a history each scaler that learns forecasts what it would have forecast without the cut."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import sin
from typing import Any

import numpy as np
import pytest

from chiron.core.kept import Kept
from chiron.policies.chiron.paper import ChironPaperSettings, make_chiron_paper
from chiron.policies.policy import PAST_MAX_S, Policy
from chiron.policies.rivals.scalers.aibrix_optimizer import AibrixOptimizerSettings, make_aibrix_optimizer
from chiron.policies.rivals.scalers.autothrottle import AutothrottleSettings, make_autothrottle
from chiron.policies.rivals.scalers.dynamo import DynamoSettings, make_dynamo
from chiron.policies.rivals.scalers.dynamo_batch import DynamoBatchSettings, make_dynamo_batch
from chiron.policies.rivals.scalers.dynamollm import DynamoLlmSettings, make_dynamollm
from chiron.policies.rivals.scalers.forecast import (
    MOST_VALUES,
    ForecastHoltWintersSettings,
    ForecastSettings,
    Memory,
    make_forecast,
)
from chiron.policies.rivals.scalers.forecast_lstm import LstmSettings, make_forecast_lstm, weights_of
from chiron.policies.rivals.scalers.sageserve import SageServeSettings, make_sageserve
from chiron.policies.views import FleetPlan, FleetView
from policy_factory import CHAT, JOBS, arrival, fleet, fleet_of, group, local, model

CLASSES = {"llama": (CHAT, JOBS)}


def view(policy: Policy, second: int, since_s: float, shift_s: float = 0.0) -> FleetView:
    """Of a load that goes up and down, at this second of a life; ``shift_s``: its clock began so much later."""
    came = []
    for each in range(max(0, int(second - since_s)), second):
        came.append(arrival(int(each - shift_s), 4 + each % 3 + round(3 * sin(each / 300.0))))
        if each % 20 == 0:
            came.append(arrival(int(each - shift_s), 2, JOBS))
    held = (group(second - shift_s + 1200.0, 40),)
    now_s = second - shift_s
    return fleet(model(fleet_of(3), arrivals=tuple(came), groups=held, cold_start_s=30.0), now_s=now_s, since_s=since_s)


def lived(policy: Policy, state: Any, seconds: range, shift_s: float = 0.0) -> tuple[list[FleetPlan], Any]:
    plans = []
    assert policy.fleet is not None
    for second in seconds:
        plan, state = policy.fleet(policy.settings, state, view(policy, second, seconds.step, shift_s))
        plans.append(plan)
    return plans, state


def kept(policy: Policy, state: Any, now_s: float) -> dict[str, Any]:
    """As it comes back from a file."""
    assert policy.learned is not None
    made: dict[str, Any] = json.loads(json.dumps(policy.learned(policy.settings, state, CLASSES, now_s)))
    return made


def restored(policy: Policy, told: dict[str, Any], notes: list[str], age_s: float = 0.0) -> Any:
    assert policy.restore is not None
    parts = {name: Kept(part, name, notes) for name, part in told.items()}
    return policy.restore(policy.settings, parts, CLASSES, 0.0, age_s)


@dataclass(frozen=True, kw_only=True)
class Life:
    """Ticks in a first part and in a second."""

    make: Any
    settings: Any
    tick_s: int
    first: int
    second: int
    library: str | None = None
    skips: int = 0
    """Of the second part's ticks: plans of before are not known."""


LIVES = {
    "forecast-arima": Life(
        make=make_forecast, settings=ForecastSettings(), tick_s=60, first=15, second=3, library="statsmodels"
    ),
    "forecast-holt-winters": Life(
        make=make_forecast,
        settings=ForecastHoltWintersSettings(season_s=600.0),
        tick_s=60,
        first=25,
        second=3,
        library="statsmodels",
    ),
    "forecast-lstm": Life(
        make=make_forecast_lstm,
        settings=LstmSettings(epochs=1, steps=20),
        tick_s=60,
        first=16,
        second=4,
        library="torch",
    ),
    "dynamo-kalman": Life(make=make_dynamo, settings=DynamoSettings(predictor="kalman"), tick_s=180, first=8, second=4),
    "dynamo-arima": Life(
        make=make_dynamo, settings=DynamoSettings(), tick_s=180, first=9, second=3, library="statsmodels"
    ),
    "dynamo-load": Life(
        make=make_dynamo, settings=DynamoSettings(predictor="kalman", load=True), tick_s=5, first=120, second=80
    ),
    "dynamo-batch": Life(
        make=make_dynamo_batch, settings=DynamoBatchSettings(predictor="kalman"), tick_s=5, first=120, second=80
    ),
    "aibrix-optimizer": Life(
        make=make_aibrix_optimizer, settings=AibrixOptimizerSettings(), tick_s=10, first=40, second=30
    ),
    "dynamollm": Life(make=make_dynamollm, settings=DynamoLlmSettings(), tick_s=60, first=50, second=40, skips=1),
    "dynamollm-weeks": Life(
        make=make_dynamollm,
        settings=DynamoLlmSettings(epoch_s=300.0, week_s=1800.0),
        tick_s=60,
        first=90,
        second=60,
        skips=1,
    ),
    "chiron-paper": Life(
        make=make_chiron_paper,
        settings=ChironPaperSettings(theta_from_history=True),
        tick_s=10,
        first=90,
        second=10,
        skips=7,  # So long a larger plan is held.
    ),
}


NAMES = [pytest.param(name, marks=[pytest.mark.slow] if life.library else []) for name, life in LIVES.items()]


@pytest.mark.parametrize("name", NAMES)
def test_after_a_cut_it_plans_as_it_would_have_without(name: str) -> None:
    life = LIVES[name]
    if life.library is not None:
        pytest.importorskip(life.library)
    policy = life.make(life.settings)
    cut_s = life.tick_s * life.first
    _, state = lived(policy, None, range(life.tick_s, cut_s + 1, life.tick_s))
    rest = range(cut_s + life.tick_s, cut_s + life.tick_s * life.second + 1, life.tick_s)
    uncut, _ = lived(policy, state, rest)
    notes: list[str] = []
    again, _ = lived(policy, restored(policy, kept(policy, state, cut_s), notes), rest, shift_s=cut_s)
    assert notes == []
    for expected, made in list(zip(uncut, again, strict=True))[life.skips :]:
        assert made["llama"].counts == expected["llama"].counts
        assert made["llama"].numbers == pytest.approx(expected["llama"].numbers)
    fresh, _ = lived(policy, None, rest, shift_s=cut_s)
    assert [plan["llama"].numbers for plan in fresh] != [plan["llama"].numbers for plan in uncut], "the past matters"


def test_dynamollm_plans_at_once_for_what_the_plan_in_force_was_for() -> None:
    policy = make_dynamollm(DynamoLlmSettings())
    plans, state = lived(policy, None, range(60, 3001, 60))
    last = [plan["llama"].counts["mixed"] for plan in plans if "busiest" in plan["llama"].numbers][-1]
    assert last != 3, "as many as there are"
    (first, *_), _ = lived(policy, restored(policy, kept(policy, state, 3000.0), []), range(3060, 3061, 60), 3000.0)
    assert first["llama"].counts["mixed"] == last


@pytest.mark.slow
def test_sageserve_forecasts_from_the_minutes_of_its_past_at_its_first_decision() -> None:
    pytest.importorskip("statsmodels")
    policy = make_sageserve(SageServeSettings(plan_s=1800.0, first_s=605.0))
    # The plans are at 605, 2405 and 4205 s; the last one comes right after the cut.
    _, state = lived(policy, None, range(5, 4201, 5))
    _, uncut = lived(policy, state, range(4205, 4206, 5))
    notes: list[str] = []
    told = kept(policy, state, 4200.0)
    _, again = lived(policy, restored(policy, told, notes), range(4205, 4206, 5), shift_s=4200.0)
    assert notes == []
    assert uncut["llama"].planned_s == 4205.0
    assert again["llama"].planned_s == 5.0
    assert len(again["llama"].minutes) == 70
    assert again["llama"].forecast == pytest.approx(uncut["llama"].forecast)


@pytest.mark.parametrize(("over_s", "minutes"), [(25, 1), (35, 2), (95, 2), (185, 4)])
def test_sageserve_takes_a_minute_for_whole_once_half_of_it_is_over(over_s: int, minutes: int) -> None:
    policy = make_sageserve(SageServeSettings())
    _, state = lived(policy, None, range(60, 121, 5))
    _, state = lived(policy, state, range(125, 121 + min(over_s, 55), 5))
    told = kept(policy, state, 120.0 + over_s)["llama"]["minutes"]
    assert len(told) == minutes, "the first began with the first decision"
    if over_s == 35:
        assert told[-1] == pytest.approx(told[0], rel=0.5), "in proportion"


def test_autothrottle_knows_what_its_targets_have_cost() -> None:
    policy = make_autothrottle(AutothrottleSettings())
    assert policy.batch_size is not None
    assert policy.learned_sizes is not None
    assert policy.restore_sizes is not None
    state: Any = None
    for second in range(1, 1201):
        seen = local(now_s=float(second), dispatched=40 + 8 * (second // 60 % 4), max_batch_size=48, throughput=900.0)
        _, state = policy.batch_size(policy.settings, state, seen)
    notes: list[str] = []
    told = json.loads(json.dumps(policy.learned_sizes(policy.settings, state, 1200.0)))
    again: Any = policy.restore_sizes(policy.settings, Kept(told, "0", notes), 0.0)
    assert notes == []
    assert again.tower.tries == state.tower.tries
    assert again.tower.decisions == state.tower.decisions > policy.settings.warm_up, "no warm-up again"
    assert (again.captain.size, again.captain.margin) == (state.captain.size, state.captain.margin)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_too_old_or_damaged_begins_anew(name: str) -> None:
    life = LIVES[name]
    if life.library is not None:
        pytest.importorskip(life.library)
    policy = life.make(life.settings)
    _, state = lived(policy, None, range(life.tick_s, 4 * life.tick_s + 1, life.tick_s))
    told = kept(policy, state, 4.0 * life.tick_s)
    for age_s, changed in (
        (3601.0, told),
        (0.0, {"llama": {}}),
        (0.0, {"llama": dict.fromkeys(told["llama"], "x")}),
        (0.0, {"llama": {key: [[float("nan")]] for key in told["llama"]}}),
    ):
        plans, _ = lived(policy, restored(policy, changed, [], age_s), range(life.tick_s, life.tick_s * 3, life.tick_s))
        assert all(plan["llama"].counts["mixed"] >= 1 for plan in plans)


def test_series_of_another_period_and_another_network_are_left_out() -> None:
    settings = ForecastSettings(period_s=30.0)
    told = {"period_s": 60.0, "series": [1.0, 2.0], "fitted": {}}
    pytest.importorskip("statsmodels")
    notes: list[str] = []
    assert restored(make_forecast(settings), {"llama": told}, notes) == {}
    assert notes == ["llama.period_s: its series are of 60 s, and now of 30 s"]
    pytest.importorskip("torch")
    small = make_forecast_lstm(LstmSettings(hidden=2))
    network = {"weights": [0.1] * weights_of(LstmSettings()), "least": 0.0, "most": 1.0, "age": 0}
    found = restored(small, {"llama": {"period_s": 60.0, "series": [1.0], "fitted": network}}, [])
    assert found == {"llama": Memory(series=(1.0,), fitted=None)}


def test_what_is_kept_is_of_two_weeks_at_the_most() -> None:
    policy = make_chiron_paper(ChironPaperSettings(theta_from_history=True, history_s=10**8))
    _, state = lived(policy, None, range(10, 21, 10))
    long = replace(state["llama"], arrivals=np.zeros(PAST_MAX_S + 1000))
    assert len(kept(policy, {"llama": long}, 0.0)["llama"]["arrivals"]) == PAST_MAX_S
    assert MOST_VALUES * 300.0 <= PAST_MAX_S
