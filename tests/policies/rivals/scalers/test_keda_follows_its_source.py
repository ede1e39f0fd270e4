"""KEDA with an HPA: totals over a target, the larger of two metrics, and the way to none and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.scalers.keda import KedaSettings, decide_fleet, wanted_pods
from policy_factory import fleet, fleet_of, model


@pytest.mark.parametrize(
    ("total", "target", "pods", "expected"),
    [
        pytest.param(37, 10, 3, 4, id="37 over 10"),
        pytest.param(32, 10, 3, 3, id="within tolerance"),
        pytest.param(33, 10, 3, 4, id="1.1 exactly is out of tolerance, in floats"),
        pytest.param(27, 10, 3, 3, id="0.9 exactly is within"),
        pytest.param(20, 10, 3, 2, id="fewer"),
        pytest.param(0, 10, 3, 0, id="none, which bounds forbid later"),
        pytest.param(5, 10, 0, 1, id="of none"),
    ],
)
def test_wanted_pods(total: float, target: float, pods: int, expected: int) -> None:
    assert wanted_pods(KedaSettings(), total, target, pods) == expected


def plans(*ticks: tuple[Any, ...], **changes: Any) -> list[tuple[int, str]]:
    """Plans of ticks 15 s apart, each with these instances."""
    state, made, current = None, [], None
    for number, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        decided, state = decide_fleet(KedaSettings(), state, fleet(one, now_s=1000.0 + 15.0 * number))
        current = decided["llama"].counts["mixed"]
        made.append((current, decided["llama"].reason))
    return made


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"dispatched": 20}, 4, id="60 in flight over 16"),
        pytest.param({"dispatched": 16, "waiting": 2}, 6, id="6 wait, over 1 each"),
        pytest.param({"dispatched": 16, "waiting": 1}, 3, id="both on target"),
        pytest.param({"dispatched": 16, "waiting": 50}, 6, id="no more than twice the pods in 15 s"),
    ],
)
def test_the_larger_metric_counts(changes: dict[str, int], expected: int) -> None:
    assert plans(fleet_of(3, **changes))[0][0] == expected


def test_an_idle_fleet_shrinks_after_five_minutes_to_one_and_goes_if_it_may() -> None:
    busy, idle = fleet_of(4, dispatched=16), fleet_of(4)
    counts = [count for count, _ in plans(busy, *[idle] * 30)]
    assert counts.index(1) == 20
    assert counts[-1] == 1
    gone = plans(busy, *[idle] * 30, min_instances=0)
    assert (counts[19], gone[20]) == (4, (0, "cooled_down"))
    assert gone[-1] == (0, "idle")
    assert plans((), min_instances=0, waiting_interactive=3) == [(1, "activated")]


def test_missing_metrics_hold() -> None:
    assert plans(*[fleet_of(4, sample_age_s=100.0)] * 30) == [(4, "metrics_missing")] * 30


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="running_target is 0; it must be above 0"):
        KedaSettings(running_target=0)
