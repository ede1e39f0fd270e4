"""llm-d's scaling on SLOs: the formula, the HPA's rates and windows, and the latencies that it is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.scalers.llmd import (
    LlmdSloSettings,
    decide_fleet,
    desired_pods,
    quantile,
    rate_limited,
    saturation,
)
from policy_factory import CHAT, fleet, fleet_of, instance, mix, model

DEFAULT = LlmdSloSettings()


@pytest.mark.parametrize(
    ("s", "planned", "ready", "expected"),
    [
        pytest.param(0.7, 4, 4, 6, id="4 and ceil 1.09"),
        pytest.param(1.1, 4, 4, 8, id="twice the threshold doubles"),
        pytest.param(2.0, 3, 3, 11, id="3 and ceil 7.9"),
        pytest.param(1.1, 8, 4, 8, id="half of it still starts: what is there will do"),
        pytest.param(0.7, 8, 4, 8, id="with credit 0.35: no less than there is"),
        pytest.param(1.1, 4, 0, 8, id="no credit when none is ready"),
        pytest.param(0.55, 4, 4, 4, id="at the upper threshold"),
        pytest.param(0.4, 4, 4, 4, id="at the lower threshold"),
        pytest.param(0.3, 8, 8, 6, id="8 less floor 2.0"),
        pytest.param(0.39, 8, 8, 8, id="8 less floor 0.2"),
        pytest.param(0.0, 8, 8, 0, id="idle, which bounds forbid later"),
        pytest.param(0.1, 8, 4, 2, id="no credit on the way down"),
    ],
)
def test_desired_pods(s: float, planned: int, ready: int, expected: int) -> None:
    assert desired_pods(DEFAULT, s, planned, ready) == expected


@pytest.mark.parametrize(
    ("wanted", "current", "changes", "expected"),
    [
        pytest.param(50, 2, [], 6, id="4 pods"),
        pytest.param(50, 10, [], 20, id="100 %"),
        pytest.param(50, 6, [(950.0, 4)], 6, id="4 were added in the last minute: wait"),
        pytest.param(50, 6, [(930.0, 4)], 12, id="more than a minute ago"),
        pytest.param(1, 6, [], 5, id="one pod"),
        pytest.param(1, 5, [(900.0, -1)], 5, id="one left within two minutes"),
        pytest.param(1, 5, [(870.0, -1)], 4, id="more than two minutes ago"),
    ],
)
def test_rates(wanted: int, current: int, changes: list[tuple[float, int]], expected: int) -> None:
    assert rate_limited(DEFAULT, wanted, current, changes, 1000.0) == expected


def test_a_quantile_is_weighted() -> None:
    assert quantile([(1.0, 90), (5.0, 10)], 0.9) == 1.0
    assert quantile([(1.0, 89), (5.0, 11)], 0.9) == 5.0
    assert quantile([(1.0, 0)], 0.9) == quantile([], 0.9) == 0.0


def of(*instances: Any, **changes: Any) -> float:
    chat = mix(CHAT, input_tokens=500.0, input_square=500.0**2)  # TTFT 5 s, ITL 0.2 s; prompts of one length.
    return saturation(replace(model(instances), mixes=(chat,)), instances)


def test_latencies_are_the_tail_over_instances_and_the_worse_counts() -> None:
    assert of(instance(dispatched=10, itl_s=0.1)) == pytest.approx(0.5)
    assert of(*fleet_of(9, dispatched=10, itl_s=0.05), instance(10, dispatched=10, itl_s=0.19)) == pytest.approx(0.25)
    assert of(*fleet_of(8, dispatched=10, itl_s=0.05), instance(9, dispatched=10, itl_s=0.19)) == pytest.approx(0.95)
    # 50,000 tokens wait at 60 us each, and 500 of its own with their square.
    queue = instance(dispatched=10, itl_s=0.05, waiting_tokens=50_000)
    assert of(queue) == pytest.approx((50_500 * 6e-5 + 500**2 * 1.5e-9) / 5.0)
    # 40 wait for slots of 100 that run for 200 steps of 50 ms.
    assert of(instance(dispatched=10, itl_s=0.05, waiting=40, running=100)) == pytest.approx(4.0 / 5.0)
    assert of(instance(dispatched=0, itl_s=0.19)) == 0.0


def plans(*ticks: tuple[Any, ...], **changes: Any) -> list[tuple[int, str]]:
    """Plans of ticks 15 s apart, each with these instances."""
    state, made, current = None, [], None
    for number, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        decided, state = decide_fleet(DEFAULT, state, fleet(one, now_s=1000.0 + 15.0 * number))
        current = decided["llama"].counts["mixed"]
        made.append((current, decided["llama"].reason))
    return made


def test_it_grows_once_half_a_minute_agrees_and_shrinks_one_by_one_after_three() -> None:
    slow, fast = fleet_of(4, dispatched=9, itl_s=0.15), fleet_of(4, dispatched=9, itl_s=0.01)
    grown = [count for count, _ in plans(*[slow] * 4)]
    assert grown[:3] == [4, 4, 6]
    shrunk = [count for count, _ in plans(*[fast] * 40)]
    assert [shrunk.index(count) for count in (3, 2, 1)] == [12, 20, 28]
    assert shrunk[-1] == 1


def test_missing_metrics_hold() -> None:
    assert plans(*[fleet_of(4, sample_age_s=100.0)] * 30) == [(4, "metrics_missing")] * 30


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"up_at is 0\.3; it must lie between down_at \(0\.4\) and clamp \(2\.0\)"):
        LlmdSloSettings(up_at=0.3)
