"""Law 9: a plan is not turned back within its hold time and stays within bounds; missing metrics never shrink it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.policies.chiron.global_loop import decide_fleet
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.registry import make_policy
from chiron.policies.views import ModelView
from chiron.sim.setup import Setup
from chiron.telemetry.summary import reversals
from effort import examples
from policy_factory import arrival, fleet, fleet_of, group, model
from policy_names import every
from scenario_factory import run, setups

TICK_S = 5.0
FAST = ChironSettings(tick_s=TICK_S, learning_s=60.0, backtest_s=15.0, memory_s=600, prior_s=60, settles_s=(10, 60))
SIMPLE = replace(FAST, adapt_headroom=False)


def days(seed: int, ticks: int) -> Iterator[dict[str, object]]:
    """What changes from tick to tick: load that jumps, drifts and bursts; queues; batch groups; cold starts."""
    draw = Random(seed)
    level = draw.choice((0.0, 2.0, 20.0))
    cold_start_s = draw.choice((15.0, 60.0))
    for tick in range(1, ticks + 1):
        move = draw.random()
        if move < 0.06:
            level = draw.choice((0.0, 0.0, 2.0, 10.0, 40.0))
        elif move < 0.5:
            level *= draw.uniform(0.7, 1.4)
        now_s = tick * TICK_S
        waiting = 50 if draw.random() < 0.05 else 0
        jobs = 2000 if draw.random() < 0.05 else 0
        yield {
            "arrivals": tuple(
                arrival(int(now_s - TICK_S) + second, requests)
                for second in range(int(TICK_S))
                if (requests := int(draw.expovariate(1.0) * level)) > 0
            ),
            "waiting_interactive": waiting,
            "waiting_input_tokens": 500.0 * waiting,
            "waiting_input_square": 4e5 * waiting,
            "groups": (group(now_s + draw.uniform(-60, 1800), jobs),) if jobs else (),
            "attained": draw.choice((0, 100)),
            "missed": 10 if draw.random() < 0.05 else 0,
            "cold_start_s": cold_start_s,
        }


def planned_totals(seed: int, ticks: int, *, least: int, most: int, blind_every: int = 3) -> Sequence[int]:
    """Total instances planned at each tick; the fleet is the plan at once. Every so many ticks it is asked
    without scrapes, too."""
    state = None
    total = max(1, least)
    totals = [total]
    settings = FAST if seed % 2 else SIMPLE
    for tick, change in enumerate(days(seed, ticks), 1):
        view = replace(model(fleet_of(total), min_instances=least, max_instances=most), **change)  # type: ignore[arg-type]
        now = {"now_s": tick * TICK_S, "since_s": TICK_S}
        before, before_total = state, total
        plans, state = decide_fleet(settings, before, fleet(view, **now))
        (plan,) = plans.values()
        assert min(plan.counts.values()) >= 0
        total = sum(plan.counts.values())
        if tick % blind_every == 0:
            blind = replace(view, instances=fleet_of(before_total, sample_age_s=inf, itl_s=nan))
            unseen, _ = decide_fleet(settings, before, fleet(blind, **now))
            assert sum(unseen["llama"].counts.values()) >= total, "missing scrapes shrink the plan"
        totals.append(total)
    return totals


def changes(totals: Sequence[int]) -> list[tuple[float, str, int, int]]:
    pairs = enumerate(pairwise(totals), 1)
    return [(tick * TICK_S, "m", before, after) for tick, (before, after) in pairs if before != after]


@given(st.integers(0, 1_000_000), st.integers(0, 2), st.sampled_from((3, 12, 50)))
@settings(max_examples=examples(40))
def test_chiron_never_turns_back_within_its_hold_nor_shrinks_for_want_of_scrapes(
    seed: int, least: int, most: int
) -> None:
    totals = planned_totals(seed, 120, least=least, most=most)
    assert all(least <= total <= most for total in totals)
    assert reversals(changes(totals), FAST.hold_s) == 0


@pytest.mark.slow
def test_the_random_days_do_make_the_fleet_turn() -> None:
    turns = [
        sum((a[3] > a[2]) != (b[3] > b[2]) for a, b in pairwise(made))
        for made in (changes(planned_totals(seed, 120, least=0, most=50, blind_every=1000)) for seed in range(6))
    ]
    assert sum(turns) > len(turns) // 2


@pytest.mark.parametrize("name", every())
def test_no_policy_shrinks_a_fleet_on_stale_metrics(name: str) -> None:
    """Five minutes of sound scrapes of busy instances; then scrapes stop, and the last one found them idle."""
    policy = make_policy(name)
    period_s = policy.fleet_period_s
    state = None
    total = 6
    for tick in range(1, int(900 / period_s) + 1):
        now_s = tick * period_s
        age_s = 0.5 if now_s <= 300.0 else now_s - 260.0
        seconds = range(int(now_s - period_s), int(now_s))
        view = replace(busy_model(total, age_s), arrivals=tuple(arrival(second, 40) for second in seconds))
        plans, state = policy.fleet(policy.settings, state, fleet(view, now_s=now_s, since_s=period_s))
        (plan,) = plans.values()
        before, total = total, sum(plan.counts.values())
        if age_s > 1.0:
            assert total >= before, f"{plan.reason} at {now_s} s"


def busy_model(count: int, age_s: float) -> ModelView:
    """Busy by the control plane's own books. A scrape older than a second says idle."""
    seen: dict[str, Any] = {"dispatched": 60, "dispatched_interactive": 60, "sample_age_s": age_s}
    if age_s > 1.0:
        seen |= {"running": 0, "kv_used_tokens": 0, "itl_s": nan}
    else:
        seen |= {"running": 60, "kv_used_tokens": 9_000}
    return model(fleet_of(count, **seen))


@given(setups("chiron"))
@settings(
    max_examples=examples(80),
)
def test_simulated_chiron_never_turns_back_within_its_hold(setup: Setup) -> None:
    """Nor where models share too few GPUs."""
    done = run(setup)
    assert reversals(done.simulation.recorder.plan_changes, setup.settings.hold_s) == 0
