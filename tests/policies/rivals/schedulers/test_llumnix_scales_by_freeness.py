"""Llumnix: its formulas against hand calculations, and its decisions on fleets made by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.core.types import Instance, InstanceKind
from chiron.policies.rivals.schedulers.llumnix import (
    Blocks,
    LlumnixSettings,
    blocks_of,
    decide_fleet,
    decide_migrations,
    dispatch_load,
    freeness,
    freeness_migrate,
    freeness_without,
)
from policy_factory import fleet, fleet_of, instance, model

DRY = LlumnixSettings(watermark=0.0)
"""No blocks kept back, so that figures are round."""

# Three instances of 1,000 blocks; free (120, 300, 700), running (20, 15, 6), the first has 4 waiting for 200 blocks.
THREE = (
    instance(1, kv_used_tokens=880 * 16, running=20, waiting=4, waiting_tokens=200 * 16),
    instance(2, kv_used_tokens=700 * 16, running=15),
    instance(3, kv_used_tokens=300 * 16, running=6),
)


def planned(settings: LlumnixSettings, *instances: Any, **changes: Any) -> tuple[int, str]:
    plans, _ = decide_fleet(settings, None, fleet(model(instances, **changes)))
    plan = plans["llama"]
    return plan.counts["mixed"], plan.reason


def test_freeness_of_one_instance() -> None:
    blocks = Blocks(total=1000, used=0, waiting_blocks=40, running=20, waiting=2)
    assert freeness(blocks, 0.01) == pytest.approx(950 / 22)  # 43.18
    assert freeness_migrate(blocks, 0.01) == pytest.approx(950 / 21)  # 45.24: all that waits counts as one


def test_freeness_of_no_request_is_infinite() -> None:
    empty = Blocks(total=1000)
    assert freeness(empty, 0.01) == freeness_migrate(empty, 0.01) == freeness_without(empty, 500, 0.01) == inf


def test_freeness_of_a_fleet_and_without_one() -> None:
    together = sum((blocks_of(i, 16) for i in THREE), Blocks())
    assert freeness(together, 0.0) == pytest.approx(920 / 45)  # 20.44
    assert freeness_without(together, 1000, 0.0) == pytest.approx(-80 / 42)  # -1.90
    assert freeness(together + Blocks(total=2000), 0.0) == pytest.approx(2920 / 45)  # 64.89


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [
        pytest.param(10, 60, (3, "steady"), id="between the thresholds"),
        pytest.param(60, 110, (5, "freeness_low"), id="two empty instances bring 20.44 to 64.89"),
        pytest.param(20.45, 60, (4, "freeness_low"), id="just below the threshold: one"),
        pytest.param(20.44, 60, (3, "steady"), id="just above it: none"),
        pytest.param(-50, -2, (2, "freeness_high"), id="-1.90 without one is above: one goes"),
        pytest.param(-50, -1.9, (3, "steady"), id="-1.90 is not above -1.9"),
    ],
)
def test_thresholds(up: float, down: float, expected: tuple[int, str]) -> None:
    settings = LlumnixSettings(watermark=0.0, scale_up_blocks=up, scale_down_blocks=down)
    assert planned(settings, *THREE) == expected


def test_an_idle_fleet_shrinks_by_one_at_a_time_down_to_its_least() -> None:
    assert planned(DRY, *fleet_of(5)) == (4, "freeness_high")
    assert planned(DRY, *fleet_of(2), min_instances=2)[0] == 2
    assert planned(DRY, *fleet_of(1), min_instances=0)[0] == 1


def test_no_second_instance_leaves_while_one_drains() -> None:
    assert planned(DRY, *fleet_of(4), instance(9, state="draining", running=3)) == (4, "steady")


@pytest.mark.parametrize(
    ("while_starting", "starting", "expected"),
    [
        pytest.param("count", 2, (5, "steady"), id="two that start are enough"),
        pytest.param("count", 1, (5, "freeness_low"), id="one that starts is not"),
        pytest.param("hold", 1, (4, "hold_while_starting"), id="as the artifact: wait for it"),
    ],
)
def test_instances_that_start(while_starting: Any, starting: int, expected: tuple[int, str]) -> None:
    settings = LlumnixSettings(watermark=0.0, scale_up_blocks=60, scale_down_blocks=110, while_starting=while_starting)
    coming = fleet_of(starting, first=8, state="starting", sample_age_s=inf)
    assert planned(settings, *THREE, *coming) == expected


def test_growth_stops_at_the_bound() -> None:
    full = fleet_of(3, kv_used_tokens=16_000, running=100, waiting=500, waiting_tokens=500 * 800)
    assert planned(DRY, *full, max_instances=6) == (6, "freeness_low")


@pytest.mark.parametrize(
    "instances",
    [
        pytest.param((*fleet_of(3), instance(7, sample_age_s=60.0)), id="one scrape is old"),
        pytest.param((), id="nothing is ready"),
    ],
)
def test_missing_metrics_hold(instances: tuple[Any, ...]) -> None:
    count = len(instances)
    assert planned(DRY, *instances) == (count, "metrics_missing")


def test_an_instance_not_yet_scraped_counts_as_empty() -> None:
    assert planned(DRY, *THREE, instance(4, age_s=0.5, sample_age_s=inf))[1] == "steady"


def moves(settings: LlumnixSettings, *instances: Any) -> list[tuple[int, int]]:
    migrations, _ = decide_migrations(settings, None, fleet(model(instances)))
    return [(m.source, m.destination) for m in migrations]


def test_migration_pairs_the_fullest_with_the_emptiest() -> None:
    tight = instance(1, kv_used_tokens=15_900, running=10)
    tighter = instance(2, kv_used_tokens=15_999, running=10)
    half = instance(3, kv_used_tokens=8_000, running=10)
    free = instance(4, kv_used_tokens=1_600, running=2)
    assert moves(DRY, tight, tighter, half, free) == [(2, 4), (1, 3)]
    assert moves(DRY, tight, tighter, free) == [(2, 4)]
    assert moves(DRY, half, free) == []


def test_a_draining_instance_is_emptied_first_and_takes_nothing() -> None:
    settings = replace(DRY, drain_moves=2)
    draining = instance(1, state="draining", running=1)
    tight = instance(2, kv_used_tokens=15_999, running=10)
    assert moves(settings, tight, draining, instance(3), instance(4, running=1)) == [(1, 3), (1, 3), (2, 4)]


def test_what_is_not_known_is_no_destination() -> None:
    tight = instance(1, kv_used_tokens=15_999, running=10)
    assert moves(DRY, tight, instance(2, sample_age_s=60.0), instance(3, state="starting")) == []


def test_dispatch_prefers_the_freer_instance() -> None:
    kind = InstanceKind(
        name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=16_000, max_num_seqs=256
    )
    one = Instance(1, "llama", kind, "mixed", 0.0)
    assert dispatch_load(one, 16, 0.0) == -inf
    one.requests = dict.fromkeys(range(10))  # type: ignore[misc]
    one.kv_reserved_tokens = 8_000
    assert dispatch_load(one, 16, 0.0) == pytest.approx(-50.0)  # 500 blocks for 10 requests
    one.kv_reserved_tokens = 20_000
    assert dispatch_load(one, 16, 0.0) > 0  # more is booked than there is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_up_blocks": 60.0}, "scale_up_blocks is 60.0; it must be below scale_down_blocks"),
        ({"watermark": 1.0}, "watermark is 1.0"),
        ({"interval_s": 0.0}, "interval_s is 0.0; it must be above 0"),
        ({"drain_moves": -1}, "drain_moves is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlumnixSettings(**changes)


loads = st.tuples(st.integers(0, 16_000), st.integers(0, 256), st.integers(0, 500))


@given(st.lists(loads, min_size=1, max_size=8), st.integers(0, 400), st.integers(0, 3))
def test_more_queue_never_means_fewer_instances(fleet_loads: list[tuple[int, int, int]], more: int, bound: int) -> None:
    def of(extra: int) -> int:
        instances = [
            instance(
                i,
                kv_used_tokens=used,
                running=running,
                waiting=waiting + (extra if i == 0 else 0),
                waiting_tokens=(waiting + (extra if i == 0 else 0)) * 480,
            )
            for i, (used, running, waiting) in enumerate(fleet_loads)
        ]
        return planned(LlumnixSettings(), *instances, max_instances=max(len(fleet_loads), 8 + bound))[0]

    before, after = of(0), of(more)
    assert after >= before
    assert 1 <= before <= max(len(fleet_loads), 8 + bound)
