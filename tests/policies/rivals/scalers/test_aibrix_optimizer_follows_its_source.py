"""AIBrix's optimizer: load by patterns over what an instance does, and the autoscaler that follows it."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest

from chiron.policies.capacity import capacity, work_s
from chiron.policies.rivals.scalers.aibrix_optimizer import (
    AibrixOptimizerSettings,
    Memory,
    decide_fleet,
    followed,
    pods_of,
)
from policy_factory import CHAT, JOBS, TIMES, arrival, fleet, fleet_of, mix, model

DEFAULT = AibrixOptimizerSettings(utilisation=1.0)
KV_TOKENS = 1_000_000


@pytest.mark.parametrize(
    ("mean", "pods", "wanted"),
    [(8.0, 4, 8), (12.0, 4, 8), (1.6, 4, 2), (4.2, 4, 4), (4.5, 4, 5), (1.0, 8, 4)],
)
def test_the_autoscaler_follows_within_its_tolerance_and_rates(mean: float, pods: int, wanted: int) -> None:
    assert pods_of(DEFAULT, mean, pods) == wanted


def test_a_target_below_one_leaves_headroom() -> None:
    assert pods_of(replace(DEFAULT, target=0.5), 4.0, 4) == 8


def test_a_panic_follows_the_short_window_and_holds_what_it_asked_for() -> None:
    calm = tuple((10.0 * number, 2) for number in range(12))
    surge = (*calm, *((120.0 + 10.0 * number, 9) for number in range(6)))
    count, memory = followed(DEFAULT, Memory(replicas=surge), 4, 170.0)
    assert (count, memory.panic_s) == (8, 170.0)  # 9 / 1, at most twice the 4
    later = replace(memory, replicas=tuple((200.0 + 10.0 * number, 2) for number in range(14)))
    assert followed(DEFAULT, later, 8, 340.0)[0] == 8
    count, memory = followed(DEFAULT, later, 8, 351.0)
    assert (count, memory.panic_pods) == (4, 0)  # 2, and no less than half


def plans(*ticks: Any, settings: AibrixOptimizerSettings = DEFAULT, **changes: Any) -> list[Any]:
    """Of decisions 10 s apart, with these arrivals before each; the fleet is the plan at once."""
    state, made, current = None, [], 2
    for number, arrivals in enumerate(ticks):
        one = model(fleet_of(current), arrivals=arrivals, kv_capacity_tokens=KV_TOKENS, **changes)
        decided, state = decide_fleet(settings, state, fleet(one, now_s=1000.0 + 10.0 * number, since_s=10.0))
        current = decided["llama"].counts["mixed"]
        made.append(decided["llama"])
    return made


def per_s(of: Any) -> float:
    carried = capacity(TIMES, [(1.0, of)], itl_target_s=CHAT.itl_s, kv_capacity_tokens=KV_TOKENS, max_num_seqs=256)
    return carried.work_rate / work_s(TIMES, of)


def test_replicas_are_the_sum_over_patterns_of_load_over_what_an_instance_does() -> None:
    both = (*(arrival(990 + second, 40) for second in range(10)), *(arrival(990 + n, 6, JOBS) for n in range(10)))
    (plan,) = plans(both)
    assert plan.numbers["requests_per_s"] == 46.0
    assert plan.numbers["optimum"] == ceil(40.0 / per_s(mix(CHAT)) + 6.0 / per_s(mix(JOBS)))


def test_its_table_has_a_share_of_what_step_times_allow() -> None:
    many = tuple(arrival(990 + second, 40) for second in range(10))
    (plan,) = plans(many, settings=replace(DEFAULT, utilisation=0.5))
    assert plan.numbers["optimum"] == ceil(80.0 / per_s(mix(CHAT)))


def test_what_is_rare_is_left_out_and_its_load_is_not() -> None:
    many = tuple(arrival(990 + second, 40) for second in range(10))
    rare = tuple(replace(arrival(991, 9), input_tokens=9.0 * 2**n, input_square=9.0 * 4**n) for n in range(17))
    (beside,) = plans((*many, *(each for each in rare if each.input_tokens != 9.0 * 512)))
    assert beside.numbers["optimum"] == ceil(54.4 / per_s(mix(CHAT))) > ceil(40.0 / per_s(mix(CHAT)))
    ten = replace(rare[16], requests=10, input_tokens=10.0 * 2**16, input_square=10.0 * 4**16)
    assert plans((*many, ten))[0].numbers["optimum"] > ceil(41.0 / per_s(mix(CHAT)))


def test_with_too_few_requests_the_fleet_stays_and_with_none_it_goes_to_the_least() -> None:
    (few,) = plans((arrival(999, 9),))
    assert (few.counts["mixed"], few.reason) == (2, "too_few_requests")
    assert [plan.counts["mixed"] for plan in plans((), ())] == [1, 1]


def test_requests_are_forgotten_after_the_window() -> None:
    many = tuple(arrival(990 + second, 40) for second in range(10))
    numbers = [plan.numbers["requests_per_s"] for plan in plans(many, *[()] * 25)]
    assert numbers[0] == 40.0
    assert numbers[11] == pytest.approx(400 / 120)
    assert numbers[23] == pytest.approx(400 / 240)
    assert numbers[25] == 0.0


def test_a_jump_counts_as_it_is_at_once_and_a_lull_as_the_mean_of_the_window() -> None:
    calm, burst, lull = (tuple(arrival(second, rate) for second in range(10)) for rate in (10, 40, 5))
    ticks = [*[calm] * 24, burst, lull]
    shifted = [
        tuple(replace(each, second=990 + 10 * number + each.second) for each in tick)
        for number, tick in enumerate(ticks)
    ]
    made = plans(*shifted)
    rates = [plan.numbers["requests_per_s"] for plan in made]
    assert rates[23:] == [10.0, 40.0, pytest.approx((22 * 10.0 + 40.0 + 5.0) / 24)]
    assert made[24].numbers["optimum"] == ceil(40.0 / per_s(mix(CHAT))) > made[23].numbers["optimum"]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"window_s is 5\.0; it must be at least interval_s \(10\.0\)"):
        AibrixOptimizerSettings(window_s=5.0)
    with pytest.raises(ValueError, match=r"panic_window_s is 200\.0; it must be at most stable_window_s \(180\.0\)"):
        AibrixOptimizerSettings(panic_window_s=200.0)
