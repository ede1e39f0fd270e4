"""llm-d's Workload Variant Autoscaler: what is spare, what tokens demand, and the HPA behind both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.policies.rivals.scalers.wva import (
    WvaSettings,
    WvaTokensSettings,
    by_saturation,
    by_tokens,
    decide_fleet,
    sequence_tokens,
)
from policy_factory import CHAT, fleet, fleet_of, mix, model

SATURATION, TOKENS = WvaSettings(), WvaTokensSettings()
AT_ONCE = {"stabilise_up_s": 0.0, "stabilise_down_s": 0.0}


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param([(0.4, 1.0)] * 3, -1, id="two would have 0.6 and 1.5"),
        pytest.param([(0.5, 1.0)] * 3, 0, id="two would have 0.75, and 0.05 spare"),
        pytest.param([(0.1, 1.5)] * 3, 0, id="two would have 2.25 waiting, and 2.75 spare"),
        pytest.param([(0.71, 0.0)] * 3, 1, id="0.09 spare"),
        pytest.param([(0.2, 2.5)] * 3, 1, id="2.5 spare in the queue"),
        pytest.param([(0.85, 0.0)] * 3, 1, id="all are saturated by KV"),
        pytest.param([(0.1, 5.0)] * 3, 1, id="all are saturated by their queues"),
        pytest.param([(0.1, 0.0)], 0, id="the last one stays"),
        pytest.param([(0.1, 0.0), (0.9, 0.0)], 0, id="only one has something spare"),
        pytest.param([(0.3, 0.0), (0.3, 0.0), (0.9, 0.0)], -1, id="the saturated one does not count"),
    ],
)
def test_by_saturation(loads: list[tuple[float, float]], expected: int) -> None:
    assert by_saturation(SATURATION, loads) == expected


@pytest.mark.parametrize(
    ("demand", "ready", "starting", "expected"),
    [
        pytest.param(90_000, 4, 0, 1, id="5,882 are missing"),
        pytest.param(90_000, 3, 1, 1, id="one that starts counts as supply"),
        pytest.param(90_000, 4, 1, 0, id="and is enough"),
        pytest.param(40_000, 4, 0, -1, id="42,857 are spare"),
        pytest.param(40_000, 3, 1, 0, id="17,857 are spare of those that are ready"),
        pytest.param(75_000, 4, 0, 0, id="neither"),
    ],
)
def test_by_tokens(demand: float, ready: int, starting: int, expected: int) -> None:
    assert by_tokens(TOKENS, demand, 25_000.0, ready=ready, starting=starting) == expected


def test_tokens_of_the_sequences_that_run_at_once() -> None:
    assert sequence_tokens(TOKENS, 1000.0, 200.0) == 281_600.0  # 256 sequences of 1,100
    assert sequence_tokens(TOKENS, 8000.0, 100.0) == pytest.approx(8192 * 100 / 8100 * 8050)


def plans(settings: WvaSettings, *ticks: tuple[Any, ...], **changes: Any) -> list[int]:
    """Plans of ticks 15 s apart, each with these instances."""
    state, made, current = None, [], None
    for number, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        decided, state = decide_fleet(settings, state, fleet(one, now_s=1000.0 + 15.0 * number))
        current = decided["llama"].counts["mixed"]
        made.append(current)
    return made


def test_the_most_of_a_minute_counts() -> None:
    quiet, full = fleet_of(3, kv_used_tokens=3_200), fleet_of(3, kv_used_tokens=12_000)
    settings = replace(SATURATION, **AT_ONCE)
    assert plans(settings, full) == [4]
    assert plans(settings, quiet, quiet) == [2, 2]  # the second waits for what was planned
    assert plans(settings, full, *[fleet_of(4, kv_used_tokens=3_200)] * 4) == [4, 4, 4, 4, 3]


def test_nothing_changes_while_instances_start() -> None:
    starting = (*fleet_of(2, kv_used_tokens=15_000), *fleet_of(1, 3, state="starting", sample_age_s=1e9))
    assert plans(replace(SATURATION, **AT_ONCE), starting) == [3]


def test_the_hpa_waits_for_four_minutes_and_gives_ten_pods_in_150_s() -> None:
    full = fleet_of(3, kv_used_tokens=12_000)
    assert plans(SATURATION, *[full] * 17)[-2:] == [3, 4]
    heavy = fleet_of(20, kv_used_tokens=16_000, waiting=50)
    chat = (mix(CHAT, input_tokens=1000.0),)
    assert plans(replace(TOKENS, **AT_ONCE), heavy, heavy, mixes=chat) == [30, 30]


def test_a_saturated_replica_shows_what_it_can_hold() -> None:
    """Its KV is little used while others wait: batch size is the limit, and tokens in use are the capacity."""
    settings = replace(TOKENS, **AT_ONCE)
    full = fleet_of(4, kv_used_tokens=4_000, waiting=5)
    calm = fleet_of(4, kv_used_tokens=4_000)
    state: Any = None
    decided, state = decide_fleet(settings, state, fleet(model(full), now_s=1000.0))
    assert decided["llama"].numbers["capacity"] == 4_000.0
    decided, _ = decide_fleet(settings, state, fleet(model(calm), now_s=1100.0))
    assert decided["llama"].numbers["capacity"] == 4_000.0
    decided, _ = decide_fleet(settings, None, fleet(model(calm), now_s=1100.0))
    assert decided["llama"].numbers["capacity"] == 12_800.0  # 0.8 of the KV


def test_missing_metrics_hold() -> None:
    assert plans(SATURATION, *[fleet_of(4, sample_age_s=100.0)] * 3) == [4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_threshold": 1.5}, r"kv_threshold is 1\.5; it must be above 0 and at most 1"),
        ({"down_at": 0.9}, r"down_at is 0\.9; it must be above 0 and below up_at \(0\.85\), at most 1"),
        ({"up_pods": 0}, r"up_pods is 0; it must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SATURATION, **changes)
