"""Knative's autoscaler: pods for two windows, panic, and the way to zero, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.scalers.knative import PANIC_OVER, KnativeSettings, Memory, decide_fleet, desired_pods
from policy_factory import fleet, fleet_of, model

DEFAULT = KnativeSettings()


@pytest.mark.parametrize(
    ("ready", "stable", "panic", "expected", "panics"),
    [
        pytest.param(2, 100, 300, 5, True, id="5 pods for the panic window are 2.5 times the ready ones"),
        pytest.param(10, 70, 70, 5, False, id="no less than half of the ready pods"),
        pytest.param(3, 140, 350, 2, False, id="5 for the panic window are less than twice 3"),
        pytest.param(3, 140, 351, 6, True, id="6 are twice 3"),
        pytest.param(0, 0, 0, 0, False, id="nothing for nothing"),
        pytest.param(1, 0, 0, 0, False, id="half of one pod is none"),
        pytest.param(0, 71, 71, 2, True, id="none ready counts as one"),
        pytest.param(4, 600, 100, 9, False, id="the stable window alone"),
    ],
)
def test_desired_pods(ready: int, stable: float, panic: float, expected: int, panics: bool) -> None:
    count, memory = desired_pods(DEFAULT, Memory(), stable=stable, panic=panic, ready=ready, now_s=100.0)
    assert (count, memory.panic_s != PANIC_OVER) == (expected, panics)


def test_a_panic_never_shrinks_and_ends_a_stable_window_after_its_last_reason() -> None:
    _, memory = desired_pods(DEFAULT, Memory(), stable=100, panic=300, ready=2, now_s=100.0)
    held, memory = desired_pods(DEFAULT, memory, stable=100, panic=70, ready=5, now_s=160.0)
    assert held == 5
    after, memory = desired_pods(DEFAULT, memory, stable=100, panic=70, ready=5, now_s=160.5)
    assert (after, memory.panic_s) == (2, PANIC_OVER)


def test_scaling_down_can_be_delayed() -> None:
    settings = KnativeSettings(scale_down_delay_s=30.0)
    counts, memory = [], Memory()
    for now_s, stable in ((0.0, 280.0), (20.0, 140.0), (29.0, 140.0), (31.0, 140.0)):
        count, memory = desired_pods(settings, memory, stable=stable, panic=0.0, ready=4, now_s=now_s)
        counts.append(count)
    assert counts == [4, 4, 4, 2]


def plans(*ticks: tuple[Any, ...], every_s: float = 2.0, **changes: Any) -> list[tuple[int, str]]:
    state, made, current = None, [], None
    for number, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        decided, state = decide_fleet(DEFAULT, state, fleet(one, now_s=1000.0 + every_s * number))
        current = decided["llama"].counts["mixed"]
        made.append((current, decided["llama"].reason))
    return made


def test_averages_are_over_their_windows() -> None:
    busy, idle = fleet_of(2, dispatched=60), fleet_of(2, dispatched=30)
    made = plans(*[busy] * 30, *[idle] * 30)
    assert made[0] == made[29] == (2, "steady")  # 120 in flight
    assert [count for count, _ in made].index(1) == 30 + 24  # Of 30 samples 5 are of 120 and 25 of 60: 70.


def test_zero_takes_a_stable_window_and_the_grace_period() -> None:
    busy, idle = fleet_of(1, dispatched=1), fleet_of(1)
    counts = [count for count, _ in plans(busy, *[idle] * 60, min_instances=0)]
    assert counts.index(0) == 30 + 15
    assert 0 not in [count for count, _ in plans(busy, *[idle] * 60)], "bounds forbid it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.0}, "target is 0.0; it must be above 0"),
        ({"utilisation": 1.5}, "utilisation is 1.5; it must be above 0 and at most 1"),
        ({"max_down": 1.0}, "max_down is 1.0; it must be above 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnativeSettings(**changes)
