"""AIBrix's autoscaler: rates and tolerances, two metrics over a window, and the least of five minutes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.aibrix import AibrixSettings, decide_fleet, desired_pods
from policy_factory import fleet, fleet_of, model


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        pytest.param(200, 8, id="twice the target"),
        pytest.param(300, 8, id="no more than twice the pods"),
        pytest.param(40, 2, id="ceil 1.6, and no less than half"),
        pytest.param(105, 4, id="within tolerance"),
        pytest.param(111, 5, id="out of it"),
        pytest.param(10, 2, id="no less than half"),
        pytest.param(80, 4, id="0.8 is within the sample's tolerance"),
        pytest.param(70, 3, id="0.7 is not"),
    ],
)
def test_desired_pods(mean: float, expected: int) -> None:
    assert desired_pods(AibrixSettings(), mean, 100.0, 4) == expected


def plans(*ticks: tuple[Any, ...], **changes: Any) -> list[tuple[int, str]]:
    """Plans of ticks 10 s apart, each with these instances."""
    state, made, current = None, [], None
    for number, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        decided, state = decide_fleet(AibrixSettings(), state, fleet(one, now_s=1000.0 + 10.0 * number))
        current = decided["llama"].counts["mixed"]
        made.append((current, decided["llama"].reason))
    return made


def test_the_larger_of_two_metrics_counts() -> None:
    assert plans(fleet_of(4, kv_used_tokens=12_000))[0] == (6, "metric_above_target")  # 0.75 of 16,000
    assert plans(fleet_of(4, kv_used_tokens=8_000, waiting=150))[0] == (6, "metric_above_target")
    assert plans(fleet_of(4, kv_used_tokens=8_000))[0] == (4, "steady")


def test_means_are_over_their_window() -> None:
    full, half = fleet_of(4, kv_used_tokens=16_000), fleet_of(4, kv_used_tokens=8_000)
    assert [count for count, _ in plans(half, half, full, full)] == [4, 4, 6, 10]  # 0.67, then 0.83


def test_a_fall_takes_the_least_of_five_minutes() -> None:
    """A moment without load is remembered when the load falls a little: where Kubernetes would hold, this hurries."""
    none, most = fleet_of(8), fleet_of(8, kv_used_tokens=6_000)
    state, view = None, fleet(model(none), now_s=1000.0)
    decided, state = decide_fleet(AibrixSettings(), state, view)
    assert decided["llama"].counts["mixed"] == 4
    for now_s, expected in ((1040.0, 4), (1340.0, 6)):
        decided, _ = decide_fleet(AibrixSettings(), state, fleet(model(most), now_s=now_s))
        assert decided["llama"].counts["mixed"] == expected


def test_missing_metrics_hold() -> None:
    assert plans(*[fleet_of(4, sample_age_s=100.0)] * 30) == [(4, "metrics_missing")] * 30


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rate_up is 1\.0; it must be above 1"):
        AibrixSettings(rate_up=1.0)
