"""Dynamo's batch scheduling: the bound by deadlines, the floor that goes with the drain, and what is released."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request
from chiron.policies.rivals.scalers.dynamo_batch import (
    DynamoBatchSettings,
    Headroom,
    Job,
    decide_fleet,
    jobs_of,
    replica_floor,
    required,
)
from policy_factory import CHAT, JOBS, arrival, fleet, fleet_of, group, mix, model
from scenario_factory import PROFILE, kind_of

SETTINGS = DynamoBatchSettings(predictor="constant", end_s=30.0)


@pytest.mark.parametrize(
    ("jobs", "needed"),
    [
        ([], 0.0),
        ([(1000.0, 400.0)], 0.5),  # 400 in the 800 that are left
        ([(1000.0, 400.0), (600.0, 400.0)], 1.0),  # the nearer one, 400 in 400, asks for more than both
        ([(600.0, 100.0), (1000.0, 700.0)], 1.0),  # both together: 800 in 800
        ([(200.0, 1.0), (1000.0, 1.0)], inf),
        ([(inf, 5000.0), (1000.0, 80.0)], 0.1),  # without a deadline it asks for nothing
    ],
)
def test_the_bound_is_that_of_the_tightest_deadline_in_order(jobs: list[tuple[float, float]], needed: float) -> None:
    made = [Job(deadline_s=due_s, work_s=work_s) for due_s, work_s in jobs]
    assert required(made, 100.0, 100.0) == pytest.approx(needed)


@pytest.mark.parametrize(
    ("given", "floor", "drain"),
    [
        ({"needed": 3.0}, 5, 5.0),  # 5 + 3 at 2 each is 4; to drain what is spare of 5, all 5 stay
        ({"needed": 6.0}, 6, 5.0),
        ({"needed": 6.0, "works": False}, 6, 0.0),
        ({"needed": 0.0, "works": False}, 3, 0.0),
        ({"needed": 40.0}, 10, 5.0),
        ({"needed": inf}, 10, 5.0),
        ({"needed": 0.0, "ready": 0, "online": 0.0}, 1, 0.0),
        ({"needed": 0.0, "ready": 12, "online": 5.0}, 10, 15.0),  # the drain is what the floor can do
    ],
)
def test_the_floor_can_do_what_is_drained(given: dict[str, Any], floor: int, drain: float) -> None:
    usual: dict[str, Any] = {"online": 5.0, "safe": 2.0, "ready": 5, "works": True, "least": 1, "most": 10}
    assert replica_floor(**(usual | given)) == (floor, pytest.approx(drain))


def decided(*ticks: Any, settings: DynamoBatchSettings = SETTINGS) -> list[Any]:
    """Plans of ticks 5 s apart; an instance comes and goes with its plan."""
    state, made, current = None, [], 2
    for number, changes in enumerate(ticks):
        now_s = 1000.0 + 5.0 * number
        one = model(fleet_of(current), **changes)
        plans, state = decide_fleet(settings, state, fleet(one, now_s=now_s, since_s=5.0))
        current = plans["llama"].counts["mixed"]
        made.append(plans["llama"])
    return made


def test_batch_work_adds_what_its_deadline_needs_and_keeps_it_until_it_is_done() -> None:
    # 90 s of cold start and end leave 210 s.
    due = {"groups": (group(1300.0, 4000),), "cold_start_s": 60.0}
    before, some, more, after = decided({}, due, due | {"groups": (group(1300.0, 100),)}, {})
    assert before.counts["mixed"] == 2
    assert some.reason == "batch_deadlines"
    (job,) = jobs_of(model((), **due), 1005.0)
    assert some.numbers["required"] == pytest.approx(job.work_s / (1300.0 - 1005.0 - 90.0))
    assert 2 < some.counts["mixed"] < 50
    assert more.counts["mixed"] == some.counts["mixed"], "the fleet that drains it stays"
    assert after.counts["mixed"] == 2


def test_a_deadline_that_is_lost_asks_for_all() -> None:
    assert decided({"groups": (group(1050.0, 10),), "cold_start_s": 60.0})[0].counts["mixed"] == 50


def test_a_job_that_is_overdue_asks_for_no_floor_and_is_drained_from_what_is_ready() -> None:
    overdue = {"groups": (group(1000.0, 4000),), "running_batch": 100, "cold_start_s": 60.0}
    (late,) = decided(overdue)
    assert (late.counts["mixed"], late.numbers["required"]) == (2, 0.0)
    assert late.numbers["drain"] > 0.0
    due = {"groups": (group(1000.0, 4000), group(1300.0, 4000)), "cold_start_s": 60.0}
    (beside,), (alone,) = decided(due), decided({**due, "groups": due["groups"][1:]})
    assert beside.numbers["required"] == alone.numbers["required"] > 0.0


def test_what_runs_is_due_with_the_first_and_batch_work_is_no_demand_of_the_planner() -> None:
    one = model(fleet_of(2), groups=(group(1300.0, 10),), running_batch=5)
    queued, running = jobs_of(one, 1000.0)
    assert running.deadline_s == 1300.0
    assert running.work_s == pytest.approx(queued.work_s / 2)
    many = {"arrivals": (arrival(1000, 5000, JOBS),), "mixes": (mix(CHAT), mix(JOBS))}
    steps = [{} for _ in range(36)]
    plans = decided({}, many, *steps)
    assert [plan.counts["mixed"] for plan in plans] == [2] * len(plans)


# -- what is released ----------------------------------------------------------------------------------------------


def ready(count: int, **changes: Any) -> tuple[Headroom, list[Instance]]:
    router = Headroom(Learner((CHAT, JOBS)))
    kind = kind_of(PROFILE, **({"max_num_seqs": 1024} | changes))
    made = [Instance(id, "m", kind, "mixed", 0.0) for id in range(count)]
    for instance in made:
        router.add(instance)
    return router, made


def put(router: Headroom, request: Request) -> bool:
    placement = router.place(request, 0.0)
    if placement is None:
        return False
    instance = placement.instance
    instance.requests[request.id] = request
    if not request.interactive:
        instance.batch[request.id] = request
    instance.kv_reserved_tokens += placement.kv_tokens
    router.changed(instance)
    return True


def filled(router: Headroom, cls: Any, tokens: int, first: int) -> int:
    """How many of these are placed until one is refused, of at most 2,000."""
    return next(count for count in range(2000) if not put(router, Request(first + count, "m", cls, 0.0, tokens)))


def test_batch_work_is_released_until_a_step_would_break_the_slo_and_leaves_room_for_what_is_online() -> None:
    tight = replace(CHAT, itl_s=0.1)
    alone, _ = ready(2, kv_capacity_tokens=10_000_000)
    assert put(alone, Request(0, "m", tight, 0.0, 500))
    beside, _ = ready(2, kv_capacity_tokens=10_000_000)
    for number in range(40):
        assert put(beside, Request(number, "m", tight, 0.0, 500))
    spare, less = filled(alone, JOBS, 500, 1000), filled(beside, JOBS, 500, 1000)
    assert 40 < spare < 1000, spare
    assert less == pytest.approx(spare - 39, abs=4)  # both kinds cost a step nearly the same
    assert put(beside, Request(5000, "m", tight, 0.0, 500)), "interactive requests always go"


def test_kv_and_places_bound_it_where_no_slo_does() -> None:
    small, _ = ready(1, kv_capacity_tokens=20_000)
    assert 1500 * filled(small, JOBS, 1500, 0) < 0.95 * 20_000
    few, (one,) = ready(1, kv_capacity_tokens=10_000_000)
    one.max_batch_size = 7
    few.changed(one)
    assert filled(few, JOBS, 100, 0) == 7


def test_a_replica_that_leaves_takes_its_places_with_it() -> None:
    router, (one, two) = ready(2, kv_capacity_tokens=10_000_000)
    one.max_batch_size = two.max_batch_size = 5
    for each in (one, two):
        router.changed(each)
    assert filled(router, JOBS, 100, 0) == 10
    for each in (one, two):
        each.requests.clear()
        each.batch.clear()
        router.changed(each)
    router.remove(one)
    assert filled(router, JOBS, 100, 100) == 5


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"end_s is -1\.0; it must be 0 or more"):
        DynamoBatchSettings(end_s=-1.0)
    with pytest.raises(ValueError, match=r"load_sensitivity is 1\.5"):
        DynamoBatchSettings(load_sensitivity=1.5)
