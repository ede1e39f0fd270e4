"""HPA: the algorithm's steps against hand calculations, and laws over random fleets."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.policies.rivals.scalers.hpa import (
    HpaKvSettings,
    HpaSettings,
    decide_fleet,
    desired_pods,
    rate_limited,
    stabilised,
)
from policy_factory import fleet, fleet_of, instance, model

TEN = HpaSettings(target=10.0)


@pytest.mark.parametrize(
    ("metrics", "missing", "unready", "current", "expected"),
    [
        pytest.param([15] * 5, 0, 0, 5, 8, id="ratio 1.5 of 5: ceil 7.5"),
        pytest.param([10.9] * 5, 0, 0, 5, 5, id="within tolerance"),
        pytest.param([11] * 5, 0, 0, 5, 6, id="1.1 exactly is out of tolerance in floats"),
        pytest.param([9] * 5, 0, 0, 5, 5, id="0.9 exactly is within"),
        pytest.param([8.9] * 5, 0, 0, 5, 5, id="out of tolerance, but ceil 4.45 is 5"),
        pytest.param([5] * 4, 0, 0, 4, 2, id="half"),
        pytest.param([0] * 4, 0, 0, 4, 0, id="nothing waits: to zero, which bounds forbid later"),
        pytest.param([], 3, 2, 3, None, id="no metric says nothing"),
        pytest.param([5] * 2, 2, 0, 4, 3, id="shrinking: missing count as on target, 0.75 of 4"),
        pytest.param([5] * 1, 9, 0, 10, 10, id="shrinking with most missing: 0.95, within tolerance"),
        pytest.param([30] * 2, 2, 0, 4, 6, id="growing: missing count as 0, 1.5 of 4"),
        pytest.param([30] * 2, 4, 0, 6, 6, id="growing with most missing: 1.0, keep"),
        pytest.param([30] * 2, 8, 0, 10, 10, id="growing turns to shrinking: keep"),
        pytest.param([30] * 2, 0, 2, 4, 6, id="growing: those that start count as 0"),
        pytest.param([30] * 2, 0, 4, 6, 6, id="growing with enough on their way: keep"),
        pytest.param([5] * 4, 0, 6, 10, 2, id="shrinking: those that start are not counted"),
        pytest.param([20] * 2, 0, 0, 7, 4, id="fewer pods than planned are there: 2 of 2"),
    ],
)
def test_desired_pods(metrics: list[float], missing: int, unready: int, current: int, expected: int | None) -> None:
    assert desired_pods(TEN, metrics, missing=missing, unready=unready, current=current) == expected


@pytest.mark.parametrize(
    ("wanted", "current", "expected"),
    [
        pytest.param([(1000, 3)], 5, 3, id="nothing else on record: shrink"),
        pytest.param([(701, 5), (1000, 3)], 5, 5, id="5 was wanted 299 s ago"),
        pytest.param([(700, 5), (1000, 3)], 5, 3, id="5 was wanted 300 s ago: forgotten"),
        pytest.param([(800, 4), (900, 3), (1000, 2)], 6, 4, id="to the most of the window"),
        pytest.param([(999, 3), (1000, 8)], 5, 8, id="grow at once"),
        pytest.param([(800, 9), (1000, 4)], 5, 5, id="more than there is now is no reason to grow"),
    ],
)
def test_stabilisation(wanted: list[tuple[float, int]], current: int, expected: int) -> None:
    assert stabilised(HpaSettings(), wanted, current, 1000.0) == expected


def test_growth_can_be_stabilised_too() -> None:
    settings = HpaSettings(stabilise_up_s=60.0)
    assert stabilised(settings, [(950, 4), (1000, 8)], 3, 1000.0) == 4
    assert stabilised(settings, [(930, 4), (1000, 8)], 3, 1000.0) == 8


@pytest.mark.parametrize(
    ("wanted", "current", "changes", "expected"),
    [
        pytest.param(50, 1, [], 5, id="4 pods"),
        pytest.param(50, 5, [4], 5, id="all 4 were added in this period: wait"),
        pytest.param(50, 5, [], 10, id="100 %"),
        pytest.param(50, 10, [], 20, id="100 % again"),
        pytest.param(3, 2, [], 3, id="no more than wanted"),
        pytest.param(0, 10, [], 0, id="shrink at any rate"),
        pytest.param(50, 6, [-4], 20, id="what was removed in this period comes back: 2 times 10"),
    ],
)
def test_rates(wanted: int, current: int, changes: list[int], expected: int) -> None:
    assert rate_limited(HpaSettings(), wanted, current, changes) == expected


def test_a_slower_rate_down() -> None:
    settings = HpaSettings(down_percent=10.0)
    assert rate_limited(settings, 0, 20, []) == 18
    assert rate_limited(settings, 0, 18, [-2]) == 18
    assert rate_limited(replace(settings, down_percent=0.0), 0, 20, []) == 20


def run(settings: HpaSettings, *ticks: tuple[Any, ...], **changes: Any) -> list[tuple[int, str]]:
    """Plans of ticks 15 s apart, each with these instances."""
    state, plans, current = None, [], None
    for i, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        view = fleet(one, now_s=15.0 * (i + 1))
        decided, state = decide_fleet(settings, state, view)
        current = decided["llama"].counts["mixed"]
        plans.append((current, decided["llama"].reason))
    return plans


def test_a_queue_grows_the_fleet_within_the_rates() -> None:
    busy = fleet_of(2, waiting=500)
    assert run(HpaSettings(), busy, busy, busy) == [
        (6, "metric_above_target"),
        (12, "metric_above_target"),
        (24, "metric_above_target"),
    ]


def test_an_idle_fleet_shrinks_after_five_minutes_and_keeps_one() -> None:
    idle = fleet_of(4)
    plans = run(HpaSettings(), *[idle] * 25, min_instances=0)
    assert plans[:20] == [(4, "stabilise_down")] * 20
    assert plans[20] == (1, "metric_below_target")
    assert plans[-1] == (1, "stabilise_down")


def test_kv_usage_is_a_share() -> None:
    used = fleet_of(4, kv_used_tokens=14_000)  # 0.875 of 16,000: 1.25 of the target
    assert run(HpaKvSettings(), used) == [(5, "metric_above_target")]
    assert run(HpaKvSettings(target=0.875), used) == [(4, "within_tolerance")]


@pytest.mark.parametrize(
    "instances",
    [
        pytest.param(fleet_of(4, sample_age_s=100.0), id="all scrapes are old"),
        pytest.param(fleet_of(4, state="starting", sample_age_s=inf), id="nothing is ready"),
    ],
)
def test_missing_metrics_hold(instances: tuple[Any, ...]) -> None:
    assert run(HpaSettings(), *[instances] * 30) == [(4, "metrics_missing")] * 30


def test_bounds_hold() -> None:
    assert run(HpaSettings(), fleet_of(4, waiting=900), max_instances=5)[0][0] == 5
    assert run(HpaSettings(stabilise_down_s=0.0), fleet_of(4), min_instances=3)[0][0] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.0}, "target is 0.0; it must be above 0"),
        ({"tolerance": -0.1}, "tolerance is -0.1; it must be 0 or more"),
        ({"down_percent": 101.0}, "down_percent is 101.0; it must lie in 0..100"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HpaSettings(**changes)


queues = st.lists(st.integers(0, 200), min_size=1, max_size=10)


@given(queues, st.integers(1, 500), st.integers(0, 5))
def test_more_queue_never_means_fewer_instances(waiting: list[int], more: int, starting: int) -> None:
    def of(extra: int) -> int:
        instances = [instance(i, waiting=n + (extra if i == 0 else 0)) for i, n in enumerate(waiting)]
        coming = fleet_of(starting, first=90, state="starting", sample_age_s=inf)
        return run(HpaSettings(stabilise_down_s=0.0), (*instances, *coming))[0][0]

    assert 1 <= of(0) <= of(more) <= 50


@given(queues, st.data())
def test_a_metric_that_goes_missing_never_shrinks_the_fleet_further(waiting: list[int], data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.integers(0, len(waiting) - 1)))
    settings = HpaSettings(stabilise_down_s=0.0)
    complete = [instance(i, waiting=n) for i, n in enumerate(waiting)]
    # Shrinking, what is missing counts as on target: at least the lost ones stay.
    partial = [one._replace(sample_age_s=inf) if i in lost else one for i, one in enumerate(complete)]
    assert run(settings, tuple(partial))[0][0] >= min(len(lost), len(waiting))
    if all(n == 0 for n in waiting):
        assert run(settings, tuple(partial))[0][0] >= run(settings, tuple(complete))[0][0]
