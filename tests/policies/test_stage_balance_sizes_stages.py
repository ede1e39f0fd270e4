"""``stage-balance`` gives each stage what the load needs, and no stage more."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.core.types import RequestClass
from chiron.policies.stages.balance import (
    BalanceState,
    StageBalanceSettings,
    decide_stages,
    due_rate,
    planned_load,
    size,
)
from chiron.policies.stages.queue_model import StageLoad, forecast, pass_s, round_of
from chiron.policies.views import PipelineView, StagePlan
from pipelines import chat_mix, pipeline_kind, pipeline_view, stage_kind, stage_view

EVEN = [stage_view(stage_kind(i)) for i in range(3)]
UNEVEN = [stage_view(stage_kind(i, slope_s=s)) for i, s in enumerate([0.0001, 0.0004, 0.0001])]
LOAD = StageLoad(rate=1.0, input_tokens=500.0, output_tokens=200.0, itl_s=0.08, ttft_s=1.6)


def plans(view: PipelineView, ticks: int = 1, **changes: float) -> tuple[StagePlan, ...]:
    state, decided = None, ()
    for k in range(ticks):
        at = replace(view, now_s=view.now_s + view.since_s * k)
        decided, state = decide_stages(StageBalanceSettings(**changes), state, at)
    return decided


def test_planned_step_times_are_joined_by_lines() -> None:
    stage = stage_kind(0, step_times=((1, 0.01), (11, 0.02), (21, 0.04)), context_token_s=0.001)
    assert [pass_s(stage, tokens) for tokens in (0.5, 1, 6, 11, 16, 31)] == pytest.approx(
        [0.01, 0.01, 0.015, 0.02, 0.03, 0.06]
    )
    assert pass_s(stage, 1, 5) == pytest.approx(0.015)


def test_a_round_is_the_longer_of_the_way_and_of_the_busiest_replica() -> None:
    slow = pipeline_kind(*(stage_kind(i, slope_s=0.0, base_s=0.01 * (1 + i % 2)) for i in range(4)), hop_s=0.001)
    one = round_of(slow, (1, 1, 1, 1), 8, 0, (1.0,) * 4)
    # Passes do not get shorter with fewer tokens here, so nothing is split: the way is 10 + 20 + 10 + 20 ms and 4 hops.
    assert (one.seconds, one.micro_batches) == (pytest.approx(0.064), 1)
    split = round_of(replace(slow, micro_batches_max=8), (1, 2, 1, 2), 8, 0, (1.0,) * 4)
    assert split.micro_batches == 2
    assert split.busy_s == pytest.approx((0.02, 0.02, 0.02, 0.02))
    assert split.seconds == pytest.approx(0.064)


def test_without_load_each_stage_has_its_minimum() -> None:
    assert [plan.replicas for plan in plans(pipeline_view(EVEN))] == [1, 1, 1]


def test_the_bottleneck_gets_replicas_and_the_others_do_not() -> None:
    decided = plans(pipeline_view(UNEVEN, arrival_rate=5.0))
    counts = [plan.replicas for plan in decided]
    assert counts[1] > max(counts[0], counts[2])
    assert decided[1].reason == "bottleneck"
    assert decided[1].numbers["itl_s"] <= 0.08


def test_memory_can_be_the_bottleneck() -> None:
    stages = [stage_view(stage_kind(i, kv_capacity_tokens=kv)) for i, kv in enumerate([100_000, 4_000, 100_000])]
    counts = [plan.replicas for plan in plans(pipeline_view(stages, arrival_rate=1.5))]
    assert counts[1] > 1
    assert counts[0] == counts[2] == 1


def test_what_was_given_and_is_not_needed_is_taken_back() -> None:
    stages = [stage_view(stage_kind(i, kv_capacity_tokens=kv)) for i, kv in enumerate([4_000, 100_000, 100_000])]
    found = size(pipeline_view(stages), replace(LOAD, rate=4.0), [1.0] * 3)
    for i in range(3):
        fewer = [count - (i == j) for j, count in enumerate(found.replicas)]
        assert not forecast(pipeline_view(stages).kind, fewer, replace(LOAD, rate=4.0), [1.0] * 3).fits


def test_an_slo_out_of_reach_is_said() -> None:
    stages = [stage_view(stage_kind(i, base_s=0.2, max_replicas=2)) for i in range(2)]
    assert {plan.reason for plan in plans(pipeline_view(stages, arrival_rate=1.0))} <= {"slo_out_of_reach", "enough"}


def test_requests_that_wait_are_load() -> None:
    idle = plans(pipeline_view(UNEVEN, arrival_rate=1.0))
    waiting = plans(pipeline_view(UNEVEN, arrival_rate=1.0, waiting=20))
    assert waiting[1].replicas > idle[1].replicas


def test_they_are_to_be_served_within_a_first_tokens_time() -> None:
    few, many = (plans(pipeline_view(EVEN, waiting=waiting)) for waiting in (0, 300))
    served_s = 0.8 * chat_mix().cls.ttft_s
    assert many[0].numbers["rate"] - few[0].numbers["rate"] == pytest.approx(300 / served_s)


def wanted_after(ready: list[int], planned: list[int]) -> int:
    """Of the first stage, once a tick of each of these has been."""
    state, wanted = None, 0
    for tick, (up, of) in enumerate(zip(ready, planned, strict=True)):
        stages = [stage_view(stage.kind, planned=of, ready=up) for stage in EVEN]
        view = replace(pipeline_view(stages), now_s=5.0 * tick, since_s=5.0)
        decided, state = decide_stages(StageBalanceSettings(), state, view)
        wanted = int(decided[0].numbers["wanted"])
    return wanted


def test_replicas_that_fail_are_made_up_for() -> None:
    """Every 100 s one of two is gone for a replica's start of 30 s."""
    failing = [1 if tick % 20 >= 14 else 2 for tick in range(240)]
    assert wanted_after(failing, [2] * 240) == 2
    assert wanted_after([2] * 240, [2] * 240) == 1
    # Once they no longer do, that is forgotten.
    assert wanted_after(failing + [2] * 600, [2] * 840) == 1


def test_a_stage_that_grows_for_failures_alone_says_so() -> None:
    state = BalanceState(factors=(1.0,) * 3, lost=10.0, lived_s=3000.0)
    decided, _ = decide_stages(StageBalanceSettings(), state, pipeline_view(EVEN))
    assert {(plan.replicas, plan.reason, plan.numbers["spares"]) for plan in decided} == {(2, "replicas_fail", 1.0)}


def test_a_replica_that_the_plan_gave_up_has_not_failed() -> None:
    shrinking = [1 if tick % 20 >= 14 else 2 for tick in range(240)]
    assert wanted_after(shrinking, shrinking) == 1


def test_a_pass_as_planned_corrects_nothing_whatever_of_it_are_prompts() -> None:
    """Contexts are read for the tokens of answers, here 200 of each 700; what prompts read is in the time of a pass."""
    times = tuple((tokens, 0.005 + 0.0001 * tokens) for tokens in (1, 64, 512, 2048))
    kind = stage_kind(0, step_times=times, context_token_s=1e-6)
    took_s = pass_s(kind, 70.0, 20.0 * 1000.0)
    stage = stage_view(kind, step_s=took_s, batch_tokens=70.0)
    _, state = decide_stages(StageBalanceSettings(), None, pipeline_view([stage], context_tokens=1000.0))
    assert state.factors == (pytest.approx(1.0),)


BATCH = RequestClass(name="batch", kind="batch", deadline_s=36_000.0)
MIXED = (chat_mix(), chat_mix(cls=BATCH, input_tokens=2000.0))


@pytest.mark.parametrize(
    ("due", "rate"),
    [
        ((), 0.0),
        (((37_000.0, 3600.0),), 0.126),
        (((8_500.0, 900.0), (37_000.0, 1000.0)), 0.151),
        (((900.0, 5000.0), (37_000.0, 3600.0)), 0.126),
        (((1001.0, 150.0),), 10.0),
    ],
    ids=["none", "a day's", "the tightest of all", "late is late", "at once"],
)
def test_batch_work_is_the_rate_that_keeps_its_deadlines(due: tuple[tuple[float, float], ...], rate: float) -> None:
    view = pipeline_view(UNEVEN, batch_due=due, mixes=MIXED)
    assert due_rate(StageBalanceSettings(), view) == pytest.approx(rate, rel=0.01)


def test_a_job_that_is_due_tomorrow_moves_no_stage() -> None:
    chat = pipeline_view(UNEVEN, arrival_rate=1.0, mixes=MIXED)
    job = replace(chat, waiting=5000, batch_due=((87_400.0, 5000.0),))
    urgent = replace(job, batch_due=((2_000.0, 5000.0),))
    assert [p.replicas for p in plans(job)] == [p.replicas for p in plans(chat)]
    assert plans(urgent)[1].replicas > plans(job)[1].replicas


def test_lengths_are_those_of_what_makes_the_load() -> None:
    both = pipeline_view(UNEVEN, arrival_rate=3.0, batch_due=((2_000.0, 2000.0),), mixes=MIXED)
    cases = {500.0: replace(both, batch_due=()), 2000.0: replace(both, arrival_rate=0.0)}
    for tokens, view in cases.items():
        state = BalanceState(arrivals=((1000.0, 5.0, 5.0 * view.arrival_rate),), factors=(1.0,) * 3)
        load = planned_load(StageBalanceSettings(), state, view)
        assert load is not None
        assert load.input_tokens == pytest.approx(tokens)


def test_it_shrinks_only_after_the_hold_and_never_without_metrics() -> None:
    big = [stage_view(each.kind, planned=4) for each in EVEN]
    idle = pipeline_view(big)
    busy = pipeline_view(UNEVEN, arrival_rate=5.0)
    _, state = decide_stages(StageBalanceSettings(hold_s=60, look_back_s=0), None, busy)
    for age_s, now_s, reason in ((0.2, 1030.0, "enough"), (20.0, 1200.0, "metrics_missing")):
        view = replace(idle, now_s=now_s, sample_age_s=age_s, stages=tuple(replace(s, planned=2) for s in big))
        decided, _ = decide_stages(StageBalanceSettings(hold_s=60, look_back_s=0), state, view)
        assert (decided[1].replicas, decided[1].reason) == (2, reason)
    decided, _ = decide_stages(StageBalanceSettings(hold_s=60, look_back_s=0), state, replace(idle, now_s=1200.0))
    assert [plan.replicas for plan in decided] == [1, 1, 1]
    assert decided[0].reason == "latency_allows_fewer"


def test_slower_passes_than_planned_need_more_replicas() -> None:
    measured = [replace(each, step_s=0.06, batch_tokens=64.0) for each in EVEN]
    view = pipeline_view(measured, arrival_rate=6.0)
    assert sum(p.replicas for p in plans(view, ticks=40)) > sum(
        p.replicas for p in plans(pipeline_view(EVEN, arrival_rate=6.0), ticks=40)
    )


@settings(max_examples=25)
@given(
    rate=st.floats(0.1, 12.0),
    slopes=st.lists(st.sampled_from([0.0001, 0.0002, 0.0004]), min_size=2, max_size=3),
)
def test_it_needs_hardly_more_than_the_best_of_all_plans(rate: float, slopes: list[float]) -> None:
    kinds = [stage_kind(i, slope_s=s, max_replicas=4) for i, s in enumerate(slopes)]
    view = pipeline_view([stage_view(kind) for kind in kinds])
    load = replace(LOAD, rate=rate)
    factors = [1.0] * len(kinds)
    fitting = [
        sum(counts)
        for counts in product(range(1, 5), repeat=len(kinds))
        if forecast(view.kind, counts, load, factors).fits
    ]
    found = size(view, load, factors)
    if fitting:
        assert found.forecast.fits
        assert sum(found.replicas) <= min(fitting) + 1
    else:
        assert not found.forecast.fits
