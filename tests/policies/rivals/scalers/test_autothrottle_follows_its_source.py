"""Autothrottle: the published steps of a Captain, and a Tower that finds the cheapest target that keeps the SLOs."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from chiron.policies.rivals.scalers.autothrottle import (
    LADDER,
    AutothrottleSettings,
    Captain,
    Tower,
    Try,
    chosen,
    commanded,
    cost,
    decide_batch_size,
    latency_over_slo,
    supervised,
)
from policy_factory import CHAT, JOBS, local, mix

DEFAULT = AutothrottleSettings()
FRESH = Captain(size=100.0, last_size=100.0, margin=3.0)


def after(captain: Captain, throttled: list[bool], used: list[float], target: float = 0.1) -> Captain:
    for wait, use in zip(throttled, used, strict=True):
        captain = commanded(DEFAULT, captain, throttled=wait, used=use, target=target, most=256)
    return captain


def test_the_ladder_is_the_published_one() -> None:
    assert LADDER == (0.0, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3)


def test_half_the_periods_throttled_at_a_target_of_a_tenth_give_a_fifth_more() -> None:
    raised = after(FRESH, [True, False] * 5, [100.0] * 10)
    assert raised.size == pytest.approx(120.0)
    assert raised.margin == pytest.approx(3.4)
    assert (raised.reason, raised.last_size, raised.throttled) == ("throttled", 100.0, ())


def test_what_is_not_used_is_given_back_but_for_the_margin_and_at_most_half() -> None:
    steady = after(FRESH, [False] * 10, [40.0] * 10)
    assert steady.size == 50.0
    assert steady.margin == pytest.approx(2.9)
    uneven = after(FRESH, [False] * 10, [60.0, 64.0] * 5)
    assert uneven.size == pytest.approx(64.0 + 2.0 * 2.9)
    full = after(FRESH, [False] * 10, [86.0] * 10)
    assert after(FRESH, [False] * 10, [91.0] * 10).size == 100.0
    assert (full.size, full.stepped_down) == (86.0, True)


def test_a_step_down_that_throttles_is_taken_back_once_over_before_the_next_decision() -> None:
    down = replace(FRESH, size=60.0, last_size=100.0, stepped_down=True)
    three = after(down, [True] * 3, [60.0] * 3)
    assert three.size == 60.0  # 0.3 is not above 3 * 0.1
    four = after(down, [True] * 4, [60.0] * 4)
    assert (four.size, four.margin, four.stepped_down) == (140.0, pytest.approx(3.3), False)
    assert after(replace(down, stepped_down=False), [True] * 4, [60.0] * 4).size == 60.0


def test_sizes_stay_between_one_and_the_largest() -> None:
    assert after(replace(FRESH, size=250.0), [True] * 10, [250.0] * 10).size == 256.0
    assert after(replace(FRESH, size=1.2), [False] * 10, [0.0] * 10).size == 1.0


# -- the Tower -----------------------------------------------------------------------------------------------------


def test_a_minute_costs_what_was_given_or_two_and_by_how_far_it_missed() -> None:
    assert cost(1.0, 0.4) == 0.4
    assert cost(1.001, 0.4) == pytest.approx(2.001, abs=1e-4)
    assert cost(4.0, 0.4) == 2.75
    assert cost(inf, 0.4) == 3.0


def test_each_target_is_tried_before_any_is_preferred() -> None:
    tries: tuple[Try, ...] = ()
    for number in range(9):
        tries = (*tries, Try(target=chosen(DEFAULT, tries, 3, number, 0.5), rate=3, cost=1.0))
    assert [each.target for each in tries] == list(range(9))


TRIES = tuple(Try(target=n, rate=3, cost=2.5 if n > 5 else 0.9 - 0.1 * n) for n in range(9))


@pytest.mark.parametrize(("draw", "target"), [(0.5, 5), (0.04, 4), (0.06, 6), (0.1, 5)])
def test_the_cheapest_is_taken_and_a_neighbour_one_time_in_ten(draw: float, target: int) -> None:
    assert chosen(DEFAULT, TRIES, 3, 9, draw) == target


def test_what_counts_is_the_median_at_the_nearest_rate() -> None:
    more = (*TRIES, *(Try(target=5, rate=9, cost=3.0) for _ in range(3)), Try(target=5, rate=3, cost=2.9))
    assert chosen(DEFAULT, more, 8, 20, 0.5) == 4
    assert chosen(DEFAULT, (*more, Try(target=5, rate=3, cost=0.3)), 3, 20, 0.5) == 5  # of 0.4, 2.9 and 0.3


def test_latency_is_the_worse_of_itl_and_of_the_wait_for_a_first_token() -> None:
    assert latency_over_slo(local(itl_s=0.05)) == 0.25
    waits = local(dispatched=94, max_batch_size=64, throughput=600.0)  # 30 answers of 200 tokens: 10 s of 5
    assert latency_over_slo(waits) == pytest.approx(2.0)
    assert latency_over_slo(waits._replace(throughput=0.0, itl_s=nan)) == inf
    batch = waits._replace(class_counts={"jobs": 94}, mixes={"jobs": mix(JOBS)}, itl_slo_s=inf)
    assert latency_over_slo(batch) == 0.0


def test_a_tower_decides_once_a_minute_by_the_worst_of_it() -> None:
    tower = Tower(since_s=1000.0)
    for second in range(1, 60):
        slow = 0.3 if second == 20 else 0.05
        tower = supervised(DEFAULT, tower, local(now_s=1000.0 + second, itl_s=slow), 0.5)
    assert tower.tries == ()
    tower = supervised(DEFAULT, tower, local(now_s=1060.0), 0.5)
    assert tower.tries == (Try(target=4, rate=6, cost=pytest.approx(3.0 - 1 / 1.5)),)  # 1,200 tokens a second
    assert (tower.target, tower.decisions, tower.worst, tower.periods) == (0, 1, 0.0, 0)


# -- both ----------------------------------------------------------------------------------------------------------


def test_an_instance_begins_with_the_largest_size_and_counts_a_period_once() -> None:
    memory: Any = None
    sizes = []
    for number in range(22):
        view = local(now_s=1000.0 + 0.5 * number, dispatched=20, at_cap=False, max_batch_size=256, max_num_seqs=4096)
        decision, memory = decide_batch_size(DEFAULT, memory, view)
        sizes.append(None if decision is None else decision.max_batch_size)
    assert sizes[:18] == [None] * 18
    assert sizes[18] == 128, "ten periods, of two views each"
    assert len(memory.captain.usage) == 11


def test_the_largest_size_is_what_the_engine_can() -> None:
    view = local(max_num_seqs=100, max_batch_size=256, class_counts={"chat": 1}, mixes={"chat": mix(CHAT)})
    decision, _ = decide_batch_size(DEFAULT, None, view)
    assert decision is not None
    assert decision.max_batch_size == 100


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"explore is 1\.5; it must be 0 to 1"):
        AutothrottleSettings(explore=1.5)
