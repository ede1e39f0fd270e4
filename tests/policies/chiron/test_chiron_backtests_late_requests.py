"""In a backtest late requests make way, as in the queue: one overload does not make all late that follows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.load import late_max
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.fluid_queue import Floats, late_makes_way, late_requests, meets_slos
from chiron.policies.headroom import CONSTANT, Rule, choose_headroom
from effort import examples
from policy_factory import arrival, fleet, fleet_of, model


def overload(load: float, lasts_s: int, *, after_s: int = 0) -> Floats:
    return np.concatenate((np.full(lasts_s, load), np.full(after_s, 1.0)))


@pytest.mark.parametrize(
    ("load", "slack_s", "late_s"),
    [
        (overload(2.0, 100), 2.0, 0.0),
        # Four arrive and two are served: after two seconds the queue is as long as can be borne, then half are late.
        (overload(4.0, 100), 2.0, 49.0),
        (overload(4.0, 100), 5.0, 47.5),
        # What comes after it is served: the queue was never longer than two seconds.
        (overload(4.0, 100, after_s=500), 2.0, 49.0),
        (overload(4.0, 2), 2.0, 0.0),
    ],
    ids=["no overload", "half is late", "patient", "over", "short"],
)
def test_what_cannot_be_served_in_time_is_late_and_no_more(load: Floats, slack_s: float, late_s: float) -> None:
    fleet = np.full(len(load), 2.0)
    assert late_requests(load, np.full(len(load), 3.0), slack_s, fleet) == pytest.approx(3.0 * late_s)


def test_in_order_of_arrival_one_overload_makes_many_late_that_need_not_be() -> None:
    load, fleet = overload(4.0, 100, after_s=500), np.full(600, 2.0)
    counts = load[None, :]
    assert not meets_slos(load, counts, [2.0], fleet, 0.25)
    assert late_makes_way(load, counts, [2.0], fleet, [225.0])
    assert not late_makes_way(load, counts, [2.0], fleet, [180.0]), "196 of 900"


@pytest.mark.parametrize("ceiling", [100, 8])
def test_what_the_largest_fleet_would_have_missed_asks_for_no_headroom(ceiling: int) -> None:
    """Of 3,600 s with four instances' worth of load one minute has 40: a fleet of a hundred could have served it, and
    that of eight is no reason to keep all eight."""
    load = np.full(3600, 4.0)
    load[600:660] = 40.0
    rules = [CONSTANT, Rule(window_s=60, settle_s=300)]
    found = choose_headroom(
        load, load[None, :], [2.0], rules,
        cold_start_s=30.0, tick_s=5.0, miss_max=0.008, floor=1, ceiling=ceiling,
    )  # fmt: skip
    if ceiling == 100:
        assert found.instances > 30.0
    else:
        assert found.instances < 6.0


def test_there_is_always_a_fleet_that_does() -> None:
    load = np.full(600, 40.0)
    found = choose_headroom(
        load, load[None, :], [2.0], [CONSTANT],
        cold_start_s=30.0, tick_s=5.0, miss_max=0.008, floor=1, ceiling=8,
    )  # fmt: skip
    assert (found.h, found.instances) == (8.0, 8.0)


def test_it_is_counted_no_further_than_asked() -> None:
    load, fleet = overload(4.0, 100), np.full(100, 2.0)
    assert 10.0 < late_requests(load, load, 2.0, fleet, 10.0) < 20.0


@settings(max_examples=examples(60))
@given(
    st.lists(st.tuples(st.floats(0, 9), st.integers(1, 6)), min_size=1, max_size=40),
    st.floats(0.5, 8),
)
def test_never_more_than_all_and_never_more_than_in_order_of_arrival(
    seconds: list[tuple[float, int]], slack_s: float
) -> None:
    load = np.array([each for each, _ in seconds])
    fleet = np.array([float(count) for _, count in seconds])
    late = late_requests(load, np.ones(len(load)), slack_s, fleet)
    assert 0.0 <= late <= len(load)
    if late > 0.0:
        assert not meets_slos(load, np.ones((1, len(load))), [slack_s], fleet, (late - 1e-9) / len(load))


@pytest.mark.parametrize(("itl_missed", "late"), [(0.0, 0.008), (0.005, 0.003), (0.05, 0.002)])
def test_what_misses_its_itl_leaves_less_that_may_wait_too_long(itl_missed: float, late: float) -> None:
    ours = ChironSettings(miss_max=0.008, learning_s=5.0)
    view = model(fleet_of(3), arrivals=(arrival(997, 50),), itl_missed=itl_missed)
    _, state = decide_fleet(ours, {}, fleet(view, now_s=1000.0, since_s=5.0))
    _, state = decide_fleet(ours, state, fleet(view, now_s=1060.0, since_s=60.0))
    backtest = state["llama"].backtest
    assert backtest is not None
    assert backtest.question.miss_max == pytest.approx(late)


def test_a_few_requests_that_miss_their_itl_are_no_reason_yet() -> None:
    ours = ChironSettings(miss_max=0.008)
    _, state = decide_fleet(ours, {}, fleet(model(fleet_of(3)), now_s=1000.0, since_s=5.0))
    _, state = decide_fleet(ours, state, fleet(model(fleet_of(3), itl_missed=0.012), now_s=1005.0, since_s=5.0))
    assert late_max(ours, state["llama"]) == pytest.approx(0.0079)
