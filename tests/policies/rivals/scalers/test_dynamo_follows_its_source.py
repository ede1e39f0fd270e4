"""NVIDIA Dynamo's planner: a forecast over what one engine does within the SLA, and the loop on latency."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.capacity import capacity, work_s
from chiron.policies.rivals.scalers.dynamo import DynamoSettings, decide_fleet, replicas
from policy_factory import CHAT, TIMES, arrival, fleet, fleet_of, instance, mix, model

CONSTANT = DynamoSettings(predictor="constant")
LOAD = replace(CONSTANT, load=True)
MIX = mix(CHAT, input_tokens=500.0, input_square=250_000.0)


def test_replicas() -> None:
    assert replicas(CONSTANT, 10.0, 4.0) == 3
    assert replicas(CONSTANT, 8.0, 4.0) == 2
    assert replicas(replace(CONSTANT, min_endpoint=2), 0.0, 4.0) == 2


def intervals(settings: DynamoSettings, rates: list[int], **changes: Any) -> list[Any]:
    """Plans of decisions at the ends of intervals of 180 s with so many requests a second each."""
    state, made, current = None, [], 2
    for number, rate in enumerate([0, *rates]):
        now_s = 1000.0 + 180.0 * number
        seconds = range(int(now_s) - 180, int(now_s)) if number else ()
        arrivals = tuple(
            replace(arrival(second, rate), input_tokens=500.0 * rate, input_square=250_000.0 * rate)
            for second in seconds
            if rate
        )
        one = model(fleet_of(current), arrivals=arrivals, **({"mixes": (MIX,)} | changes))
        decided, state = decide_fleet(settings, state, fleet(one, now_s=now_s))
        current = decided["llama"].counts["mixed"]
        made.append(decided["llama"])
    return made[1:]


def test_the_demand_of_the_next_interval_over_what_an_engine_does_within_the_sla() -> None:
    one = model(fleet_of(1))
    carried = capacity(TIMES, [(1.0, MIX)], itl_target_s=CHAT.itl_s, kv_capacity_tokens=16_000, max_num_seqs=1024)
    engine_per_s = carried.work_rate / work_s(TIMES, MIX)
    (plan,) = intervals(CONSTANT, [30])
    assert plan.numbers["requests_per_s"] == 30.0
    assert plan.numbers["engine_per_s"] == pytest.approx(engine_per_s)
    assert plan.counts["mixed"] == replicas(CONSTANT, 30.0, engine_per_s) > one.min_instances


def test_the_last_value_is_what_constant_expects_and_a_trend_is_what_kalman_does() -> None:
    constant = intervals(CONSTANT, [10, 20, 30])[-1].numbers["requests_per_s"]
    kalman = intervals(DynamoSettings(predictor="kalman"), [10, 20, 30])[-1].numbers["requests_per_s"]
    assert constant == 30.0
    assert 35.0 < kalman < 45.0


def test_an_idle_beginning_is_no_part_of_the_series() -> None:
    plans = intervals(CONSTANT, [0, 0, 30])
    assert [plan.counts["mixed"] for plan in plans[:2]] == [2, 2]
    assert plans[2].counts["mixed"] > 2


def by_load(*instances: Any, **changes: Any) -> int:
    one = model(instances, mixes=(MIX,), **changes)
    _, state = decide_fleet(LOAD, None, fleet(one, now_s=1000.0))
    decided, _ = decide_fleet(LOAD, state, fleet(one, now_s=1005.0))
    return decided["llama"].counts["mixed"] - len(instances)


SLOW = {"waiting_tokens": 90_000, "running": 10, "kv_used_tokens": 1_000}  # 5.4 s of prefill, and the SLO is 5 s


def test_more_only_if_all_engines_are_too_slow() -> None:
    assert by_load(instance(1, **SLOW), instance(2, **SLOW)) == 1
    assert by_load(instance(1, **SLOW), instance(2, running=10, kv_used_tokens=13_000)) == 0


def test_fewer_only_if_the_same_load_on_one_less_is_fast_and_fits() -> None:
    calm = {"running": 10, "kv_used_tokens": 4_000}
    assert by_load(instance(1, **calm), instance(2, **calm)) == -1
    assert by_load(instance(1, **calm), instance(2, running=10, kv_used_tokens=8_000)) == 0  # 16,000 do not fit
    queued = {"waiting_tokens": 34_000, "kv_capacity_tokens": 1_000_000}  # 2.04 s now, and 4.08 s then
    assert by_load(instance(1, **queued), instance(2, **queued)) == 0
    assert by_load(instance(1, **calm)) == 0


def test_load_decides_nothing_by_old_scrapes() -> None:
    calm = {"running": 10, "kv_used_tokens": 4_000}
    assert by_load(instance(1, **calm), instance(2, **calm, sample_age_s=31.0)) == 0


def test_what_came_before_the_first_interval_is_no_part_of_it() -> None:
    state: Any = None
    counts = []
    for number in range(3):
        now_s = 1000.0 + 180.0 * number
        arrivals = tuple(arrival(second, 30) for second in range(int(now_s) - 180, int(now_s)))
        one = model(fleet_of(2), arrivals=arrivals, mixes=(MIX,))
        decided, state = decide_fleet(CONSTANT, state, fleet(one, now_s=now_s))
        counts.append(decided["llama"].numbers.get("requests_per_s"))
    assert counts == [None, 30.0, 30.0]


def test_load_decides_nothing_while_instances_start_and_never_below_the_forecast() -> None:
    starting = instance(3, state="starting", sample_age_s=float("inf"))
    assert by_load(instance(1, **SLOW), instance(2, **SLOW), starting) == 0
    plans = intervals(LOAD, [30, 30])
    assert plans[1].counts["mixed"] == plans[1].numbers["floor"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_sensitivity": 1.5}, r"load_sensitivity is 1\.5; it must be above 0 and at most 1"),
        ({"load_interval_s": 200.0}, r"load_interval_s is 200\.0; it must be at most interval_s \(180\.0\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONSTANT, **changes)
