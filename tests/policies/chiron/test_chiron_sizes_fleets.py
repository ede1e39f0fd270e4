"""The global loop of ``chiron``: tables, and laws over random loads."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.policies.capacity import capacity, work_s
from chiron.policies.chiron.global_loop import decide_fleet, share_gpus
from chiron.policies.chiron.load import first_memory, interactive_capacity, surging_to
from chiron.policies.chiron.load_history import presumed
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.headroom import CONSTANT, Headroom, Rule, choose_headroom, followed, window_mean
from chiron.policies.views import ArrivalView, ModelPlan, StepTimes
from effort import examples
from policy_factory import CHAT, JOBS, arrival, fleet, group, instance, mix, model

TIMES = StepTimes(
    fixed_s=0.01,
    per_sequence_s=1e-4,
    per_context_token_s=0.0,
    per_prefill_token_s=1e-4,
    per_prefill_square_s=0.0,
)


def test_capacity_is_what_the_formula_says() -> None:
    chat = replace(mix(CHAT), input_tokens=1000.0, input_square=1e6, output_tokens=100.0)
    # w = 1e-4*1000 + 100*1e-4 = 0.11 s; s = 1.1 ms; B = (0.12 - 0.01)/0.0011 = 100; D = 0.12.
    assert work_s(TIMES, chat) == pytest.approx(0.11)
    found = capacity(TIMES, [(1.0, chat)], itl_target_s=0.12, kv_capacity_tokens=1e9, max_num_seqs=1024)
    assert found.batch_size == pytest.approx(100.0)
    assert found.step_s == pytest.approx(0.12)
    assert found.work_rate == pytest.approx(1 - 0.01 / 0.12)


@pytest.mark.parametrize(
    ("kv", "seqs", "batch"),
    [(1e9, 50, 50.0), (0.5 * 1100 * 100, 1024, 47.5)],
    ids=["the engine's own limit", "KV, at 95 % of it"],
)
def test_capacity_is_limited_by_what_binds(kv: float, seqs: int, batch: float) -> None:
    chat = replace(mix(CHAT), input_tokens=1000.0, input_square=1e6, output_tokens=100.0)
    found = capacity(TIMES, [(1.0, chat)], itl_target_s=0.12, kv_capacity_tokens=kv, max_num_seqs=seqs)
    assert found.batch_size == pytest.approx(batch)


def choose(load: np.ndarray, *rules: Rule, cold_start_s: float = 60.0, slack_s: float = 2.0, miss_max: float = 0.005):
    counts = np.ceil(load)[None, :]
    return choose_headroom(
        load, counts, [slack_s], rules, cold_start_s=cold_start_s, tick_s=5.0, miss_max=miss_max, floor=1, ceiling=100
    )


def test_steady_load_needs_little_headroom() -> None:
    found = choose(np.full(1800, 7.6), Rule(window_s=60, settle_s=60))
    assert found.instances == 8.0


def test_spikes_faster_than_a_start_must_be_there_beforehand() -> None:
    load = np.full(3600, 4.0)
    for start in range(300, 3600, 360):
        load[start : start + 60] = 12.0
    slow = choose(load, Rule(window_s=60, settle_s=60), cold_start_s=60.0)
    fast = choose(load, Rule(window_s=15, settle_s=60), cold_start_s=0.0)
    assert slow.h > 2.0, "nothing that follows a minute late can do with less"
    assert fast.instances < slow.instances


def test_bursts_without_memory_end_with_a_constant_fleet() -> None:
    draw = np.random.default_rng(1)
    load = np.where(draw.random(3600) < 0.02, 40.0, 1.0)
    rules = [CONSTANT, *(Rule(window_s=w, settle_s=s) for w in (15, 60, 600) for s in (60, 300))]
    found = choose(load, *rules)
    assert found.instances <= min(choose(load, rule).instances for rule in rules) * 1.03 + 1e-9


def test_a_ramp_is_followed_rather_than_covered_for_ever() -> None:
    load = np.linspace(1.0, 30.0, 3600)
    found = choose(load, CONSTANT, Rule(window_s=60, settle_s=60))
    assert found.rule != CONSTANT
    assert found.instances < 20.0


@pytest.mark.parametrize(("window_s", "mean"), [(0, 0.0), (1, 3.0), (2, 2.0), (3, 1.5), (100, 1.5)])
def test_a_mean_is_of_the_last_seconds_and_of_none_it_is_nothing(window_s: int, mean: float) -> None:
    assert window_mean(np.array([0.5, 1.0, 3.0]), window_s) == mean


def test_what_is_followed_now_is_the_largest_window_mean_of_the_settling_time() -> None:
    load = np.concatenate((np.full(300, 2.0), np.full(60, 9.0), np.full(100, 2.0)))
    assert followed(load, Rule(window_s=60, settle_s=300), 5.0) == pytest.approx(9.0)
    assert followed(load, Rule(window_s=60, settle_s=30), 5.0) < 4.0
    assert followed(load, CONSTANT, 5.0) == 1.0


def arrivals(now_s: float, requests: int, tick_s: float = 5.0) -> tuple[ArrivalView, ...]:
    """``requests`` chat prompts of 500 tokens, spread over the seconds of a tick."""
    seconds = int(tick_s)
    each = [requests // seconds + (1 if i < requests % seconds else 0) for i in range(seconds)]
    return tuple(
        ArrivalView(second=int(now_s - tick_s) + i, cls=CHAT, requests=n, input_tokens=500.0 * n, input_square=4e5 * n)
        for i, n in enumerate(each)
        if n
    )


def drive(loads: list[int], hold_s: float = 60.0, **changes: object) -> list[tuple[float, int]]:
    """The plans (time, instances) of a fleet that follows its plan at once, for a load per tick."""
    ours = ChironSettings(hold_s=hold_s, learning_s=60.0, prior_s=60)
    count, state, plans = 4, None, []
    for tick, requests in enumerate(loads):
        now_s = 5.0 * (tick + 1)
        view = fleet(
            model([instance(id=i) for i in range(count)], arrivals=arrivals(now_s, requests), **changes),
            now_s=now_s,
            since_s=5.0,
        )
        plan, state = decide_fleet(ours, state, view)
        count = sum(plan["llama"].counts.values())
        plans.append((now_s, count))
    return plans


@pytest.mark.parametrize("tick_s", [0.5, 5.0])
def test_nothing_need_be_presumed_of_the_time_before(tick_s: float) -> None:
    ours = ChironSettings(prior_s=0, tick_s=tick_s)
    state = None
    for tick in range(1, 1 + int(15 / tick_s)):
        now_s = tick * tick_s
        view = model(
            [instance(id=0)],
            arrivals=(arrival(int(now_s - tick_s), 500),),
            waiting_interactive=900,
            waiting_input_tokens=45e4,
        )
        plan, state = decide_fleet(ours, state, fleet(view, now_s=now_s, since_s=tick_s))
        assert 1 <= plan["llama"].counts["mixed"] <= 50
    assert plan["llama"].counts["mixed"] > 1


@settings(max_examples=examples(40))
@given(st.lists(st.integers(0, 400), min_size=20, max_size=80))
def test_plans_stay_in_bounds_and_never_turn_back_within_the_hold(loads: list[int]) -> None:
    plans = drive(loads)
    last_change_s, direction, before = -inf, 0, 4
    for now_s, count in plans:
        assert 1 <= count <= 50
        if count != before:
            turn = 1 if count > before else -1
            assert turn == direction or now_s - last_change_s >= 60.0 or direction == 0
            last_change_s, direction, before = now_s, turn, count


@pytest.mark.slow
def test_more_load_never_means_fewer_instances() -> None:
    finals = [drive([requests] * 200)[-1][1] for requests in (0, 50, 100, 200, 400)]
    assert finals == sorted(finals)
    assert finals[0] == 1
    assert finals[-1] > 3


def test_a_model_scales_to_zero_and_back_only_when_asked() -> None:
    assert drive([50] * 20 + [0] * 200, min_instances=0)[-1][1] == 0
    assert drive([0] * 200 + [1], min_instances=0)[-1][1] == 1, "one small request is enough"


@pytest.mark.slow
def test_bursts_that_are_over_bring_nobody_back() -> None:
    """While their history fades, rules change; none of them may start instances for traffic that is not there."""
    draws = Random(1)
    bursts = [draws.choice([0, 0, 0, 0, 300]) for _ in range(240)]
    silence = [count for _, count in drive(bursts + [0] * 800, min_instances=0)[240:]]
    assert silence[0] > 1
    assert silence == sorted(silence, reverse=True)
    assert silence[-1] == 0


@pytest.mark.parametrize(("least", "left"), [(0, 0), (1, 3)])
def test_a_fleet_that_does_not_follow_the_load_goes_too_where_it_may_be_empty(least: int, left: int) -> None:
    ours = ChironSettings(prior_s=60)
    three = model([instance(id=i) for i in range(3)], min_instances=least)
    memory = first_memory(ours, three, 0.0)
    idle = replace(memory, history=presumed(0.0, np.zeros(600), len(memory.counts)))
    state = {three.name: replace(idle, headroom=Headroom(rule=CONSTANT, h=3.0, instances=3.0))}
    for tick in range(40):
        now_s = 600.0 + 5.0 * tick
        plan, state = decide_fleet(ours, state, fleet(three, now_s=now_s, since_s=5.0))
    assert sum(plan[three.name].counts.values()) == left


def test_a_fleet_that_nobody_has_heard_of_does_not_shrink() -> None:
    silent = drive([0] * 200)
    assert silent[-1][1] == 1
    ours = ChironSettings(learning_s=60.0, prior_s=60)
    state = None
    for tick in range(200):
        now_s = 5.0 * (tick + 1)
        deaf = [instance(id=i, sample_age_s=100.0) for i in range(4)]
        plan, state = decide_fleet(ours, state, fleet(model(deaf), now_s=now_s, since_s=5.0))
        assert sum(plan["llama"].counts.values()) == 4
    assert plan["llama"].reason == "stale_metrics"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utilisation": 7}, "utilisation is 7; it must be above 0 and at most 1"),
        ({"tick_s": 0.0}, "tick_s is 0.0; it must be above 0"),
        ({"hold_s": -1.0}, "hold_s is -1.0; it must be 0 or more"),
        ({"over_steady": 0.5}, "over_steady is 0.5; it must be 0, or 1 or more"),
        ({"surge_slack": -1.0}, "surge_slack is -1.0; it must be 0 or more"),
        ({"deadline_margin": 1.0}, "deadline_margin is 1.0; it must be 0 or more and below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChironSettings(**changes)


def growth_in_a_burst(cold_start_s: float, waiting: int) -> int:
    """Instances wanted ten seconds into a burst of eight times what the fleet of two was made for."""
    few, many = 250, 2000
    count, state, planned = 2, None, 0
    for tick, requests in enumerate([few] * 24 + [many] * 2):
        now_s = 5.0 * (tick + 1)
        queue = {
            "waiting_interactive": waiting,
            "waiting_input_tokens": 500 * waiting,
            "waiting_input_square": 4e5 * waiting,
        }
        view = fleet(
            model(
                [instance(id=i) for i in range(count)],
                arrivals=arrivals(now_s, requests),
                cold_start_s=cold_start_s,
                **(queue if requests == many else {}),
            ),
            now_s=now_s,
            since_s=5.0,
        )
        plan, state = decide_fleet(ChironSettings(prior_s=60), state, view)
        planned = sum(plan["llama"].counts.values())
    return planned


def test_a_burst_that_queues_and_has_lasted_as_long_as_a_start_is_met_at_once() -> None:
    assert growth_in_a_burst(5.0, waiting=0) == growth_in_a_burst(60.0, waiting=0), "who has room waits for the mean"
    assert growth_in_a_burst(5.0, waiting=400) > 1.5 * growth_in_a_burst(5.0, waiting=0)
    assert growth_in_a_burst(60.0, waiting=400) < growth_in_a_burst(5.0, waiting=400), "over before a start is"


@pytest.mark.parametrize("cold_start_s", [0.1, 0.9, 1.0, 2.0])
def test_a_queue_asks_for_what_comes_now_however_short_starts_and_ticks_are(cold_start_s: float) -> None:
    ours = ChironSettings(tick_s=0.5)
    queued = model(
        [instance()],
        cold_start_s=cold_start_s,
        waiting_interactive=1,
        waiting_input_tokens=1.0,
        waiting_input_square=1.0,
    )
    load = np.concatenate((np.full(3000, 9.0), np.full(600, 0.5)))
    memory = replace(first_memory(ours, queued, 0.0), history=presumed(0.0, load, 1))
    serving = interactive_capacity(ours, queued, memory)
    assert surging_to(ours, memory, queued, serving) < 1.5


def planned_in_a_spike(spike: int, *, seconds: int = 10, waiting: int = 400, slack: float = 2.0) -> int:
    """Instances wanted so long into a spike that came from nowhere, where a start takes a minute."""
    count, state, planned = 2, None, 0
    ticks = seconds // 5
    for tick, requests in enumerate([250] * 120 + [spike] * ticks):
        now_s = 5.0 * (tick + 1)
        queue = {"waiting_interactive": waiting, "waiting_input_tokens": 500 * waiting, "waiting_input_square": 4e5}
        view = fleet(
            model(
                [instance(id=i) for i in range(count)],
                arrivals=arrivals(now_s, requests),
                cold_start_s=60.0,
                **(queue if tick >= 120 and waiting else {}),
            ),
            now_s=now_s,
            since_s=5.0,
        )
        plan, state = decide_fleet(ChironSettings(prior_s=60, surge_slack=slack), state, view)
        planned = sum(plan["llama"].counts.values())
        count = planned if tick < 120 else count
    return planned


def test_a_spike_that_will_outlast_all_patience_is_answered_before_it_has_lasted() -> None:
    waited = planned_in_a_spike(2000, slack=0.0)
    assert planned_in_a_spike(2000) > 1.5 * waited
    assert planned_in_a_spike(20_000) == planned_in_a_spike(40_000), "ten seconds say little: thrice the busiest minute"
    assert planned_in_a_spike(300) == planned_in_a_spike(300, slack=0.0), "who waits will have been served by then"
    assert planned_in_a_spike(2000, waiting=0) == planned_in_a_spike(2000, waiting=0, slack=0.0), "nobody waits"


def test_a_backlog_alone_adds_nothing_but_a_deadline_does() -> None:
    ours = ChironSettings()

    def planned(deadline_s: float) -> tuple[int, float]:
        queued = group(deadline_s=deadline_s, requests=4000)
        view = fleet(model([instance(id=i) for i in range(4)], groups=(queued,)), now_s=1000.0, since_s=5.0)
        plan, _ = decide_fleet(ours, None, view)
        return plan["llama"].counts["batch"], plan["llama"].bbp

    assert planned(1e6) == (0, 0.0)
    batch, bbp = planned(1100.0)
    assert batch > 0
    assert bbp == 1.0


@pytest.mark.parametrize(
    ("present", "refused_by", "added"),
    [
        (1, {}, 6),
        (1, {"gpus_max": {"A100": 3.0}}, 2),
        (1, {"gpus_max": {"A100": 1.0}}, 0),
        (1, {"max_instances": 4}, 3),
        (1, {"last_direction": -1, "last_change_s": 995.0}, 0),
        (3, {"last_direction": -1, "last_change_s": 995.0}, 2),
    ],
)
def test_only_what_came_for_batch_is_remembered_as_there(present: int, refused_by: dict[str, Any], added: int) -> None:
    """What was refused is no reason to start as many for what is left of the work later."""
    ours = ChironSettings()
    bounds = {name: value for name, value in refused_by.items() if name == "max_instances"}
    queued = group(deadline_s=1200.0, requests=4000)
    one = model([instance(id=i) for i in range(present)], groups=(queued,), **bounds)
    recent = {name: value for name, value in refused_by.items() if name.startswith("last")}
    memory = replace(first_memory(ours, one, 0.0), **recent)
    view = replace(fleet(one, now_s=1000.0, since_s=5.0), gpus_max=refused_by.get("gpus_max", {}))
    plan, after = decide_fleet(ours, {one.name: memory}, view)
    assert (plan[one.name].counts["batch"], after[one.name].extra) == (added, added)


def test_models_that_share_gpus_give_up_batch_first_and_shrink_nobody() -> None:
    ours = ChironSettings()
    one = model([instance(id=i) for i in range(4)], name="a")
    two = model([instance(id=i) for i in range(4)], name="b")
    view = replace(fleet(one, two), gpus_max={"A100": 10.0})
    memories = {m.name: first_memory(ours, m, 0.0) for m in (one, two)}

    def shared(a: dict[str, int], b: dict[str, int]):
        plans = {
            "a": ModelPlan(counts={"interactive": 0, **a}, reason="interactive_load"),
            "b": ModelPlan(counts={"interactive": 0, **b}, reason="interactive_load"),
        }
        after = {name: replace(memories[name], extra=plan.counts["batch"]) for name, plan in plans.items()}
        return share_gpus(ours, plans, memories, after, view)

    plans, _ = shared({"mixed": 4, "batch": 4}, {"mixed": 6, "batch": 0})
    assert plans["a"].counts == {"interactive": 0, "mixed": 4, "batch": 0}
    assert plans["b"].counts["mixed"] == 6
    plans, _ = shared({"mixed": 9, "batch": 0}, {"mixed": 9, "batch": 0})
    assert (plans["a"].counts["mixed"], plans["b"].counts["mixed"]) == (5, 5)
    assert plans["a"].reason == "gpu_limit"
    plans, after = shared({"mixed": 2, "batch": 2}, {"mixed": 8, "batch": 0})
    assert plans["a"].counts["batch"] == 0, "batch instances give way to another model's interactive growth"
    assert plans["b"].counts["mixed"] == 8
    assert after["a"].last_direction == -1, "and it is remembered as a change"
    assert JOBS.kind == "batch"


@pytest.mark.parametrize(
    ("mixed", "batch", "added", "left"),
    [
        (4, 0, 0, (4, 0)),
        (2, 2, 0, (2, 2)),  # Kept apart.
        (2, 2, 2, (2, 0)),  # Added for batch work.
        (1, 3, 2, (1, 1)),  # One kept apart.
        (4, 0, 2, (4, 0)),  # Wanted for batch work, beyond the most that there may be.
    ],
)
def test_instances_kept_apart_for_batch_work_are_a_share_like_any_other(
    mixed: int, batch: int, added: int, left: tuple[int, int]
) -> None:
    ours = ChironSettings()
    one, two = model([instance(id=i) for i in range(4)], name="a"), model([], name="b")
    view = replace(fleet(one, two), gpus_max={"A100": 8.0})
    before = {m.name: first_memory(ours, m, 0.0) for m in (one, two)}
    plans = {
        "a": ModelPlan(counts={"interactive": 0, "mixed": mixed, "batch": batch}, reason="steady"),
        "b": ModelPlan(counts={"interactive": 0, "mixed": 8, "batch": 0}, reason="interactive_load"),
    }
    shared, _ = share_gpus(ours, plans, before, {**before, "a": replace(before["a"], extra=added)}, view)
    assert (shared["a"].counts["mixed"], shared["a"].counts["batch"]) == left
    assert shared["b"].counts["mixed"] == 8 - sum(left)


@pytest.mark.parametrize(
    ("present", "wanted", "limit", "expected"),
    [
        ((7, 1), (20, 2), 8, (6, 2)),  # The overload of one takes nothing of what the other may count on.
        ((7, 1), (20, 6), 8, (4, 4)),  # Both want more than half.
        ((7, 1), (20, 1), 8, (7, 1)),
        ((4, 4), (20, 20), 8, (4, 4)),
        ((7, 1), (20, 2), 10, (8, 2)),
    ],
)
def test_one_models_overload_is_not_another_s(
    present: tuple[int, int], wanted: tuple[int, int], limit: int, expected: tuple[int, int]
) -> None:
    ours = ChironSettings()
    models = [
        model([instance(id=i) for i in range(count)], name=name, planned={"mixed": count, "interactive": 0, "batch": 0})
        for name, count in zip("ab", present, strict=True)
    ]
    view = replace(fleet(*models, now_s=1000.0), gpus_max={"A100": float(limit)})
    plans = {
        name: ModelPlan(counts={"interactive": 0, "mixed": count, "batch": 0}, reason="interactive_load")
        for name, count in zip("ab", wanted, strict=True)
    }
    memories = {m.name: first_memory(ours, m, 0.0) for m in models}
    shared, after = share_gpus(ours, plans, memories, memories, view)
    assert (shared["a"].counts["mixed"], shared["b"].counts["mixed"]) == expected
    if expected[0] < present[0]:
        assert after["a"].last_direction == -1, "it is remembered as a change"
    held = {**memories, "a": replace(memories["a"], last_change_s=990.0, last_direction=1)}
    shared, _ = share_gpus(ours, plans, held, held, view)
    assert shared["a"].counts["mixed"] >= present[0], "who has just grown keeps it for a while"
