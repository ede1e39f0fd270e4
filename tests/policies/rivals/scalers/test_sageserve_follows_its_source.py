"""SageServe's LT-UA: an hourly plan from a forecast, carried out by memory in use, and batch in what is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request
from chiron.policies.capacity import work_s
from chiron.policies.rivals.scalers.forecasters import Fitted
from chiron.policies.rivals.scalers.sageserve import (
    Memory,
    PendingTokens,
    SageServeSettings,
    change,
    chooses_anew,
    counted,
    decide_fleet,
    tokens_per_minute,
    tokens_planned,
)
from chiron.policies.views import ModelView
from policy_factory import CHAT, JOBS, TIMES, arrival, fleet, fleet_of, mix, model
from scenario_factory import PROFILE, kind_of

DEFAULT = SageServeSettings()
FORECAST = tuple(float(minute) for minute in range(60))


def test_a_plan_is_for_the_most_of_the_minutes_20_to_60_and_a_tenth_of_the_busiest_batch_minute() -> None:
    falling = (900.0, *[500.0] * 19, 100.0, 400.0, *[50.0] * 38)
    assert tokens_planned(DEFAULT, falling, (10.0, 300.0, 20.0)) == 400.0 + 30.0
    assert tokens_planned(DEFAULT, FORECAST, ()) == 59.0
    assert tokens_planned(replace(DEFAULT, ahead_from_s=0.0), falling, ()) == 900.0
    assert tokens_planned(DEFAULT, (7.0, 5.0), ()) == 5.0, "a shorter one: its end"


@pytest.mark.parametrize(
    ("changes", "used", "starting", "expected"),
    [
        pytest.param(2, 0.51, False, (1, "planned_up"), id="planned, and memory is in use"),
        pytest.param(2, 0.5, False, (0, "memory_enough"), id="planned, and memory is not"),
        pytest.param(2, 0.9, True, (0, "one_starts"), id="one at a time"),
        pytest.param(-2, 0.24, False, (-1, "planned_down"), id="planned, and memory is free"),
        pytest.param(-2, 0.25, False, (0, "memory_in_use"), id="planned, and memory is in use"),
        pytest.param(0, 0.99, False, (0, "steady"), id="the plan is carried out"),
        pytest.param(0, 0.01, False, (0, "steady"), id="both ways"),
        pytest.param(None, 0.51, False, (1, "memory_above"), id="no plan yet: by memory alone"),
        pytest.param(None, 0.01, False, (0, "steady"), id="no plan yet: none leaves"),
    ],
)
def test_memory_says_when_a_plan_is_carried_out(
    changes: int | None, used: float, starting: bool, expected: tuple[int, str]
) -> None:
    memory = Memory(minute=70, forecast=FORECAST, forecast_minute=60, changes=changes)
    assert change(DEFAULT, memory, used, starting=starting) == expected


def test_five_times_the_forecast_is_a_reason_to_add_one_more_than_planned() -> None:
    memory = Memory(minute=70, forecast=FORECAST, forecast_minute=60, changes=0)  # 10 in this minute.
    assert change(DEFAULT, replace(memory, last_minute=((4200, 25.0), (4230, 25.0))), 0.1, starting=False)[0] == 0
    seen = replace(memory, last_minute=((4200, 25.0), (4230, 26.0)))
    assert change(DEFAULT, seen, 0.1, starting=False) == (1, "beyond_forecast")
    later = replace(seen, minute=500)
    assert change(DEFAULT, later, 0.1, starting=False)[0] == 0, "nothing is forecast for then"


def test_prompts_are_counted_by_minute_and_by_kind() -> None:
    def seen(memory: Memory, now_s: float, *arrivals: Any) -> Memory:
        return counted(memory, model(fleet_of(1), arrivals=arrivals), now_s)

    memory = seen(Memory(), 600.0)
    memory = seen(memory, 630.0, arrival(610, 2), arrival(620, 3, JOBS))
    assert (memory.minutes, memory.tokens, memory.batch_tokens) == ((), 1000.0, 1500.0)
    memory = seen(memory, 665.0, arrival(655, 1))
    assert (memory.minutes, memory.batch_minutes) == ((1500.0,), (1500.0,))
    assert memory.last_minute == ((610, 1000.0), (655, 500.0))
    memory = seen(memory, 790.0)
    assert memory.minutes == (1500.0, 0.0, 0.0), "minutes without any are minutes too"
    assert memory.last_minute == ()


def test_an_instance_takes_the_prompts_of_the_answers_that_it_makes() -> None:
    one = model(fleet_of(1), mixes=(mix(CHAT), mix(JOBS)), kv_capacity_tokens=10_000_000)
    # 256 sequences of 500 and 200 tokens: a step costs 256 times a 200th of a request's work.
    step_s = TIMES.fixed_s + 256 * work_s(TIMES, mix(CHAT)) / 200.0
    assert tokens_per_minute(DEFAULT, one) == pytest.approx(256 / step_s / 200.0 * 500.0 * 60.0 * 0.8)


def test_five_times_the_forecast_and_memory_in_use_add_one_even_while_some_should_leave() -> None:
    memory = Memory(minute=70, forecast=FORECAST, forecast_minute=60, changes=-2, last_minute=((4200, 51.0),))
    assert change(DEFAULT, memory, 0.51, starting=False) == (1, "beyond_forecast")
    assert change(DEFAULT, memory, 0.5, starting=False) == (0, "memory_in_use")
    assert change(DEFAULT, memory, 0.24, starting=False) == (-1, "planned_down")
    assert change(DEFAULT, replace(memory, last_minute=()), 0.99, starting=False) == (0, "memory_in_use")


def run(settings: SageServeSettings, minutes: int, used: int, count: int) -> tuple[list[int], Memory]:
    """Plans, five seconds apart, under ten requests a second; instances come at once. And what is remembered."""
    state, made = None, []
    for tick in range(12 * minutes):
        now_s = 5.0 * tick
        arrivals = tuple(arrival(int(now_s) - back, 10) for back in range(5, 0, -1) if now_s >= back)
        view: ModelView = model(fleet_of(count, kv_used_tokens=used), arrivals=arrivals)
        plans, state = decide_fleet(settings, state, fleet(view, now_s=now_s, since_s=5.0))
        count = plans["llama"].counts["mixed"]
        made.append(count)
    assert state is not None
    return made, state["llama"]


def test_the_first_plan_comes_after_ten_minutes_and_the_next_an_interval_later() -> None:
    assert run(DEFAULT, 10, 5_000, 3)[1].planned_s == float("-inf")
    assert run(DEFAULT, 12, 5_000, 3)[1].planned_s == 600.0
    often = replace(DEFAULT, plan_s=300.0, ahead_from_s=60.0)
    assert run(often, 16, 5_000, 3)[1].planned_s == 900.0


def test_without_a_plan_memory_in_use_adds_instances_and_none_leaves() -> None:
    assert run(DEFAULT, 1, 9_000, 1)[0] == list(range(2, 14))
    assert run(DEFAULT, 1, 1_000, 3)[0] == [3] * 12
    assert run(DEFAULT, 1, 5_000, 3)[0] == [3] * 12


def test_without_a_plan_batch_work_adds_none() -> None:
    busy = model(fleet_of(2, kv_used_tokens=9_000, dispatched=10, dispatched_interactive=5))
    plans, _ = decide_fleet(DEFAULT, None, fleet(busy))
    assert (plans["llama"].counts["mixed"], plans["llama"].reason) == (2, "steady")
    chat = model(fleet_of(2, kv_used_tokens=9_000, dispatched=10, dispatched_interactive=10))
    assert decide_fleet(DEFAULT, None, fleet(chat))[0]["llama"].counts["mixed"] == 3


def planned_down(settings: SageServeSettings, used: int, **view: Any) -> tuple[int, str, Memory]:
    """A plan for next to nothing, of ten instances."""
    memory = Memory(minute=9, minutes=(0.0,) * 9)
    view_now = model(fleet_of(10, kv_used_tokens=used, **view))
    plans, state = decide_fleet(settings, {"llama": memory}, fleet(view_now, now_s=600.0))
    return plans["llama"].counts["mixed"], plans["llama"].reason, state["llama"]


def test_what_a_plan_takes_away_leaves_at_once() -> None:
    count, reason, memory = planned_down(DEFAULT, 9_000)
    assert (count, reason, memory.changes) == (1, "planned_down", 0)
    count, reason, memory = planned_down(replace(DEFAULT, down_waits=True), 9_000)
    assert (count, reason, memory.changes) == (10, "steady", -9)
    count, reason, memory = planned_down(replace(DEFAULT, down_waits=True), 100)
    assert (count, reason, memory.changes) == (9, "planned_down", -8)


def test_a_plan_waits_for_metrics() -> None:
    count, reason, memory = planned_down(DEFAULT, 9_000, sample_age_s=60.0)
    assert (count, reason, memory.planned_s) == (10, "metrics_missing", float("-inf"))


def test_the_forecasts_order_is_chosen_again_when_there_is_twice_as_much_to_choose_from() -> None:
    kept = Fitted(order=(1, 0, 0), parameters=(100.0, 0.1, 10.0))

    def anew(minutes: int, fitted: Fitted | None, before: int) -> bool:
        return chooses_anew(Memory(minutes=(1.0,) * minutes, fitted=fitted, chosen_from=before))

    assert anew(10, None, 0)
    assert [anew(minutes, kept, 10) for minutes in (19, 20)] == [False, True]
    assert [anew(2 * before, kept, before) for before in (1439, 1440)] == [True, False], "a day says enough"
    assert planned_down(DEFAULT, 100)[2].chosen_from == 10


def test_the_plan_bounds_what_memory_asks_for() -> None:
    each = tokens_per_minute(DEFAULT, model(fleet_of(1)))
    needed = int(-(-10 * 500 * 60 // each))
    state, count, made = None, 1, []
    for tick in range(12 * 30):
        now_s = 5.0 * tick
        arrivals = tuple(arrival(int(now_s) - back, 10) for back in range(5, 0, -1) if now_s >= back)
        used = 5_000 if now_s < 600.0 else 9_000
        view = model(fleet_of(count, kv_used_tokens=used), arrivals=arrivals)
        plans, state = decide_fleet(DEFAULT, state, fleet(view, now_s=now_s, since_s=5.0))
        count = plans["llama"].counts["mixed"]
        made.append(plans["llama"].reason)
    assert count == needed > 1
    assert made.count("planned_up") == needed - 1
    assert made[-1] == "steady"


def test_stale_metrics_hold_the_fleet() -> None:
    stale = model(fleet_of(3, sample_age_s=60.0))
    plans, _ = decide_fleet(DEFAULT, None, fleet(stale))
    assert (plans["llama"].counts["mixed"], plans["llama"].reason) == (3, "metrics_missing")


def instance(id: int, reserved: int = 0) -> Instance:
    made = Instance(id, "m", kind_of(PROFILE, kv_capacity_tokens=1000), "mixed", 0.0)
    made.kv_reserved_tokens = reserved
    return made


def test_requests_go_where_the_fewest_tokens_are_pending_and_batch_work_only_into_what_is_left() -> None:
    router = PendingTokens(DEFAULT, Learner((CHAT, JOBS)))
    one, two = instance(1, 700), instance(2, 500)
    for each in (one, two, two):
        router.add(each)
    chat, job = Request(1, "m", CHAT, 0.0, 10), Request(2, "m", JOBS, 0.0, 10)
    placed = [router.place(each, 0.0) for each in (chat, job)]
    assert [None if each is None else each.instance.id for each in placed] == [2, 2], "60 % of all are not above 60 %"
    one.kv_reserved_tokens = 701
    router.changed(one)
    assert router.place(job, 0.0) is None
    assert router.place(chat, 0.0) is not None
    router.remove(one)
    router.remove(one)
    assert router.place(job, 0.0) is not None, "what another has no longer counts"
    router.changed(one)
    router.add(one)
    assert router.place(job, 0.0) is None
