"""AIBrix's autoscalers: rates and tolerances, two metrics over a window, the least of five minutes; panic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.scalers.aibrix import (
    AibrixKpaSettings,
    AibrixSettings,
    decide_fleet,
    decide_kpa,
    desired_pods,
    kpa_pods,
)
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


KPA = AibrixKpaSettings()


@pytest.mark.parametrize(
    ("settings", "mean", "pods", "expected"),
    [
        pytest.param(KPA, 0.8, 5, 8, id="ceil 1.6 x 5"),
        pytest.param(KPA, 0.9, 2, 4, id="no more than twice"),
        pytest.param(KPA, 0.54, 5, 5, id="within tolerance"),
        pytest.param(KPA, 0.1, 8, 4, id="no less than half"),
        pytest.param(KPA, 0.1, 5, 2, id="half of 5, rounded down"),
        pytest.param(replace(KPA, literal=True), 0.8, 5, 2, id="as written: one pod's mean is the total"),
    ],
)
def test_kpa_pods(settings: AibrixKpaSettings, mean: float, pods: int, expected: int) -> None:
    assert kpa_pods(settings, mean, pods) == expected


def kpa_plans(settings: AibrixKpaSettings, used: list[float], every_s: float = 10.0) -> list[tuple[int, str]]:
    """Plans of ticks at which this share of KV is in use on as many instances as were planned."""
    state, made, current = None, [], 4
    for number, share in enumerate(used):
        instances = fleet_of(current, kv_used_tokens=round(share * 16_000))
        decided, state = decide_kpa(settings, state, fleet(model(instances), now_s=1000.0 + every_s * number))
        current = decided["llama"].counts["mixed"]
        made.append((current, decided["llama"].reason))
    return made


def test_a_panic_only_grows_and_ends_a_stable_window_after_its_last_reason() -> None:
    quiet, burst = [0.2] * 12, [0.9] * 6
    made = kpa_plans(KPA, [*quiet, *burst, *[0.9] * 2, *[0.05] * 45])
    reasons = [reason for _, reason in made]
    counts = [count for count, _ in made]
    first, last = reasons.index("panic"), len(reasons) - 1 - reasons[::-1].index("panic")
    assert counts[first : last + 1] == sorted(counts[first : last + 1])
    assert 10.0 * (last - first) >= KPA.stable_window_s
    assert counts[-1] < counts[last]


def test_a_literal_panic_is_never_forgotten() -> None:
    used = [*[0.2] * 12, *[0.9] * 8, *[0.05] * 45, *[0.9] * 8]
    meant, literal = (kpa_plans(replace(KPA, literal=flag), used) for flag in (False, True))
    assert min(count for count, _ in meant) < 4
    assert literal != meant


def test_a_fall_waits_for_the_most_of_its_delay() -> None:
    made = kpa_plans(replace(KPA, panic_threshold=100.0), [0.5] * 19 + [0.1] * 60)
    counts = [count for count, _ in made]
    assert counts[19 + 17] == 4  # the stable mean falls out of tolerance within seconds, and the delay is 180 s
    assert counts[-1] < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"panic_window_s": 200.0}, r"panic_window_s is 200\.0; it must be at most stable_window_s \(180\.0\)"),
        ({"rate_down": 1.0}, r"rate_down is 1\.0; it must be above 1"),
    ],
)
def test_kpa_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(KPA, **changes)
