"""chiron-paper: Algorithm 1 on a toy engine, IBP and BBP on fleets made by hand, and laws over random ones."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.core.types import Role
from chiron.policies.chiron.paper import (
    ChironPaperSettings,
    LocalState,
    decide_batch_size,
    decide_fleet,
    initial_roles,
    spare_share,
    spike_ratio,
)
from chiron.policies.views import FleetView, ModelPlan, ModelView
from policy_factory import CHAT, JOBS, arrival, fleet, fleet_of, group, instance, local, mix, model

PAPER = ChironPaperSettings()

# -- local -----------------------------------------------------------------------------------------------------------


def sizes(settings: ChironPaperSettings, start: int, moves: int) -> list[int]:
    """B over the moves of a saturated toy engine whose step takes 0.02 + 0.0004 B: the SLO of 0.2 s is met to 450."""
    state, size, seen = None, start, [start]
    for i in range(moves):
        step_s = 0.02 + 0.0004 * size
        view = local(
            now_s=1000.0 + 10.0 * i, max_batch_size=size, dispatched=size, itl_s=step_s, throughput=size / step_s
        )
        decision, state = decide_batch_size(settings, state, view)
        size = size if decision is None else decision.max_batch_size
        seen.append(size)
    return seen


def test_batch_size_reaches_the_slo_in_a_few_moves() -> None:
    seen = sizes(PAPER, 8, 12)
    assert next(i for i, size in enumerate(seen) if size >= 0.95 * 450) <= 9
    assert max(seen) <= 450 * 1.05


def test_batch_size_stays_near_the_slo() -> None:
    assert 430 <= min(sizes(PAPER, 440, 60)) <= max(sizes(PAPER, 440, 60)) <= 450


def test_the_throughput_term_taken_literally_collapses() -> None:
    literal = ChironPaperSettings(
        throughput_needs_binding=False, throughput_after_increase=False, throughput_needs_loss=False
    )
    assert sizes(literal, 8, 100)[-1] < 45


@pytest.mark.parametrize(
    ("view", "state", "expected"),
    [
        pytest.param(local(itl_s=0.1), None, (96, "backpressure_below_1"), id="BP 0.5: half of 128, half of 64"),
        pytest.param(local(itl_s=0.16), None, (72, "backpressure_below_1"), id="BP 0.8"),
        pytest.param(local(itl_s=0.01), None, (160, "backpressure_below_1"), id="BP 0.05 counts as 0.25"),
        pytest.param(local(itl_s=0.2), None, (32, "itl_above_slo"), id="BP 1 is a violation"),
        pytest.param(local(itl_s=0.4, max_batch_size=1, dispatched=1), None, None, id="never below 1"),
        pytest.param(local(itl_s=0.1, max_num_seqs=80), None, (80, "backpressure_below_1"), id="the engine's most"),
        pytest.param(local(itl_s=0.1, at_cap=False, dispatched=20), None, None, id="a cap that binds not grows not"),
        pytest.param(local(itl_s=0.4, dispatched=90), None, None, id="halved lately: wait until they have left"),
        pytest.param(local(itl_s=0.4, at_cap=False, dispatched=20), None, (32, "itl_above_slo"), id="a cap too high"),
        pytest.param(local(itl_s=nan), None, None, id="idle: nothing is known"),
        pytest.param(local(itl_slo_s=inf), None, (160, "backpressure_below_1"), id="no SLO: BP 0"),
        pytest.param(local(itl_s=0.1), LocalState(moved_s=996.0), None, id="moved 4 s ago"),
        pytest.param(
            local(itl_s=0.1, throughput=900.0),
            LocalState(moved_s=900.0, throughput=1200.0, increased=True),
            (32, "throughput_fell"),
            id="an increase cost throughput",
        ),
        pytest.param(
            local(itl_s=0.1, throughput=1180.0),
            LocalState(moved_s=900.0, throughput=1200.0, increased=True),
            (96, "backpressure_below_1"),
            id="... within the tolerance",
        ),
        pytest.param(
            local(itl_s=0.1, throughput=900.0),
            LocalState(moved_s=900.0, throughput=1200.0, increased=False),
            (96, "backpressure_below_1"),
            id="a halving cost throughput: expected",
        ),
    ],
)
def test_algorithm_1(view: Any, state: LocalState | None, expected: tuple[int, str] | None) -> None:
    decision, _ = decide_batch_size(PAPER, state, view)
    assert (None if decision is None else (decision.max_batch_size, decision.reason)) == expected


@given(st.floats(1e-4, 10.0), st.integers(1, 4096), st.integers(0, 5000), st.floats(0.0, 1e5), st.floats(0.0, 1e5))
def test_batch_sizes_stay_within_bounds(itl_s: float, size: int, running: int, before: float, now: float) -> None:
    view = local(itl_s=itl_s, max_batch_size=size, dispatched=running, at_cap=running >= size, throughput=now)
    state = LocalState(moved_s=0.0, throughput=before, increased=True)
    decision, _ = decide_batch_size(PAPER, state, view)
    if decision is not None:
        assert 1 <= decision.max_batch_size <= 4096
        assert (decision.max_batch_size < size) == (decision.numbers["bp"] >= 1.0)


# -- global, interactive ---------------------------------------------------------------------------------------------


def plan(settings: ChironPaperSettings, view: FleetView) -> ModelPlan:
    return decide_fleet(settings, None, view)[0]["llama"]


def counts(settings: ChironPaperSettings, one: ModelView) -> tuple[int, int, int]:
    made = plan(settings, fleet(one)).counts
    return made["interactive"], made["mixed"], made["batch"]


def busy(number: int, **changes: Any) -> tuple[Any, ...]:
    return fleet_of(number, dispatched=5, dispatched_interactive=5, **changes)


@pytest.mark.parametrize(
    ("theta", "active", "idle", "expected"),
    [
        pytest.param(1 / 3, 2, 4, 6, id="2 of 6 are busy: as it should be"),
        pytest.param(1 / 3, 3, 3, 9, id="3 of 6: up"),
        pytest.param(0.5, 3, 3, 6, id="half"),
        pytest.param(0.37, 1, 1, 3, id="1/0.37 = 2.7"),
        pytest.param(1.0, 3, 0, 3, id="no over-provisioning"),
        pytest.param(0.1, 4, 4, 30, id="bounds: 40 wanted, 30 allowed"),
    ],
)
def test_ibp_sizes_the_fleet(theta: float, active: int, idle: int, expected: int) -> None:
    one = model((*busy(active), *fleet_of(idle, first=50)), max_instances=30)
    made = plan(ChironPaperSettings(theta=theta), fleet(one))
    assert sum(made.counts.values()) == expected
    assert made.ibp == pytest.approx(active / (active + idle))
    assert made.ibp_target == theta


def test_batch_work_makes_no_instance_busy() -> None:
    one = model((*busy(1), *fleet_of(2, first=50, dispatched=200), instance(60, role="batch", dispatched=200)))
    assert plan(PAPER, fleet(one)).ibp == pytest.approx(1 / 3)


def test_one_pool_grows_and_the_other_keeps_its_size() -> None:
    one = model((*busy(2, role="interactive"), *busy(2, first=10)))
    assert counts(PAPER, one) == (2, 10, 0)
    assert counts(ChironPaperSettings(grow="interactive"), one) == (10, 2, 0)


@pytest.mark.parametrize(
    ("grow", "expected"),
    [("mixed", [(2, 4), (1, 1), (2, 6)]), ("interactive", [(2, 4), (0, 2), (4, 4)])],
)
def test_the_pool_that_does_not_grow_returns_to_its_size(grow: Any, expected: list[tuple[int, int]]) -> None:
    settings = ChironPaperSettings(theta=1.0, shrink_after_s=0.0, grow=grow)
    state, splits = None, []
    planned: dict[Role, int] = {"interactive": 2, "mixed": 4, "batch": 0}
    for active in (6, 2, 8):
        one = model((*busy(active), *fleet_of(10 - active, first=50)), planned=planned)
        plans, state = decide_fleet(settings, state, fleet(one))
        planned = dict(plans["llama"].counts)
        splits.append((planned["interactive"], planned["mixed"]))
    assert splits == expected


def test_the_fleet_shrinks_to_the_most_of_the_last_minute() -> None:
    state, totals = None, []
    for i in range(10):
        one = model(
            (*busy(3 if i == 0 else 1), *fleet_of(9, first=50)),
            planned={"interactive": 0, "mixed": 12 if i < 8 else 9, "batch": 0},
        )
        plans, state = decide_fleet(PAPER, state, fleet(one, now_s=1000.0 + 10.0 * i))
        totals.append(sum(plans["llama"].counts.values()))
    # 9 were wanted at first and 3 since; the size found, 12, is on record too.
    assert totals[:6] == [12] * 6
    assert totals[6:] == [3, 3, 3, 3]


def test_an_empty_fleet_starts_for_whoever_waits() -> None:
    assert counts(PAPER, model((), min_instances=0)) == (0, 0, 0)
    assert counts(PAPER, model((), min_instances=0, waiting_interactive=3)) == (0, 1, 0)


def test_every_model_is_sized_by_itself() -> None:
    view = fleet(model(busy(2)), replace(model(fleet_of(1)), name="other"))
    plans, _ = decide_fleet(PAPER, None, view)
    assert {name: sum(p.counts.values()) for name, p in plans.items()} == {"llama": 6, "other": 1}


@pytest.mark.parametrize(("count", "interactive"), [(0, 0), (1, 0), (2, 1), (3, 1), (9, 3), (24, 8)])
def test_initial_roles_keep_a_mixed_instance(count: int, interactive: int) -> None:
    assert initial_roles(PAPER, count) == {"interactive": interactive, "mixed": count - interactive, "batch": 0}
    assert initial_roles(ChironPaperSettings(interactive_share=1.0), 4)["mixed"] == 1


def test_spike_ratio_compares_neighbouring_windows() -> None:
    steady = np.full(1000, 4.0)
    assert spike_ratio(steady, 60, 0.99) == 1.0
    spiky = steady.copy()
    spiky[300:360] = spiky[700:760] = 12.0
    assert spike_ratio(spiky, 60, 1.0) == pytest.approx(3.0)
    assert spike_ratio(np.zeros(1000), 60, 0.99) == 1.0


def test_theta_follows_from_the_history_of_arrivals() -> None:
    settings = ChironPaperSettings(theta_from_history=True, spike_quantile=1.0, theta=0.5)
    state, thetas = None, []
    for tick in range(1, 121):
        second = 10 * (tick - 1)
        rate = 30 if 600 <= second < 660 else 10
        arrivals = (*(arrival(second + i, rate) for i in range(10)), arrival(second, 999, JOBS))
        one = model(busy(2), arrivals=arrivals, cold_start_s=60.0)
        plans, state = decide_fleet(settings, state, fleet(one, now_s=10.0 * tick, since_s=10.0))
        thetas.append(plans["llama"].ibp_target)
    assert thetas[0] == 0.5  # ten cold starts have not passed
    assert thetas[59] == 0.9  # a steady rate: 1, bounded
    assert thetas[-1] == pytest.approx(1 / 3)


# -- global, batch ---------------------------------------------------------------------------------------------------


def queued(*groups: Any, **changes: Any) -> ModelView:
    return model((*busy(1), *fleet_of(2, first=50)), groups=groups, kv_capacity_tokens=400_000, **changes)


def test_a_backlog_with_time_adds_nothing() -> None:
    made = plan(PAPER, fleet(queued(group(20_000.0, 5_000))))
    assert made.counts["batch"] == 0
    assert made.bbp == 0


def test_a_deadline_that_would_be_missed_adds_batch_instances() -> None:
    made = plan(PAPER, fleet(queued(group(1400.0, 20_000))))
    assert made.counts["batch"] >= 1
    assert made.bbp == 1
    assert made.reason == "bbp_above_0"


def test_bbp_counts_the_groups_that_would_be_late() -> None:
    made = plan(PAPER, fleet(queued(group(1300.0, 10), group(1400.0, 20_000), group(90_000.0, 10))))
    assert made.bbp == 1
    made = plan(PAPER, fleet(queued(group(1400.0, 20_000), group(1500.0, 20_000), group(90_000.0, 10))))
    assert made.bbp == 2


def test_batch_instances_all_go_with_the_last_queued_request() -> None:
    live = (*busy(1), *fleet_of(3, first=50, role="batch", dispatched=100))
    assert counts(PAPER, model(live))[2] == 0
    kept = model(live, groups=(group(90_000.0, 10),), kv_capacity_tokens=400_000)
    assert counts(PAPER, kept)[2] == 3


def test_spare_share_is_what_interactive_requests_leave() -> None:
    assert spare_share(instance(max_batch_size=100, dispatched=80, dispatched_interactive=25)) == 0.75
    assert spare_share(instance(max_batch_size=10, dispatched=30, dispatched_interactive=30)) == 0.0


def test_classes_of_batch_work_are_estimated_together() -> None:
    other = replace(JOBS, name="more")
    mixes = (mix(CHAT), mix(JOBS, output_tokens=100.0), mix(other, output_tokens=900.0, finished=300))
    few = plan(PAPER, fleet(queued(group(1200.0, 20_000, output_tokens=2e6), mixes=mixes[:2])))
    many = plan(PAPER, fleet(queued(group(1200.0, 20_000, output_tokens=1.4e7), mixes=mixes)))
    assert few.counts["batch"] < many.counts["batch"]


@given(
    st.integers(1, 100_000), st.integers(1, 100_000), st.floats(0.0, 7200.0), st.floats(0.0, 7200.0), st.integers(0, 8)
)
def test_more_queue_or_less_time_never_means_fewer(
    requests: int, more: int, left_s: float, longer_s: float, present: int
) -> None:
    def of(size: int, time_s: float) -> int:
        live = (*busy(1), *fleet_of(present, first=50, role="batch", dispatched=9))
        one = model(live, groups=(group(1000.0 + time_s, size),), kv_capacity_tokens=400_000, max_instances=30)
        return counts(PAPER, one)[2]

    assert present <= of(requests, left_s) <= of(requests + more, left_s) <= 30
    assert of(requests, left_s + longer_s) <= of(requests, left_s)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["interactive", "mixed"])), min_size=1, max_size=12))
def test_scrapes_play_no_part_in_the_fleet(fleet_made: list[tuple[bool, Any]]) -> None:
    # Busy or not is the control plane's own knowledge: no missing metric can shrink the fleet.
    fresh = [
        instance(i, role=role, dispatched=int(on), dispatched_interactive=int(on))
        for i, (on, role) in enumerate(fleet_made)
    ]
    stale = [one._replace(sample_age_s=inf, running=0, itl_s=nan) for one in fresh]
    assert counts(PAPER, model(fresh)) == counts(PAPER, model(stale))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 40), st.integers(0, 3))
def test_more_busy_never_means_fewer(active: int, more: int, most: int, least: int) -> None:
    def of(number: int) -> int:
        live = (*busy(number), *fleet_of(24 - number, first=50))
        one = model(
            live,
            min_instances=min(least, most),
            max_instances=most,
            planned={"interactive": 0, "mixed": min(24, most), "batch": 0},
        )
        return sum(counts(PAPER, one))

    assert min(least, most) <= of(active) <= of(active + more) <= most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 0.0}, "theta is 0.0; it must be above 0 and at most 1"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"tick_s": 0.0}, "tick_s is 0.0; it must be above 0"),
        ({"shrink_after_s": -1.0}, "shrink_after_s is -1.0; it must be 0 or more"),
        ({"interactive_share": 2.0}, "interactive_share is 2.0; it must lie in 0..1"),
        ({"theta_min": 0.95}, "theta_min is 0.95; it must be at most theta_max"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChironPaperSettings(**changes)
