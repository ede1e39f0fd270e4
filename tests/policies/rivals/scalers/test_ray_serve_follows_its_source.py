"""Ray Serve: replicas for ongoing requests, decisions that last, and two choices at random."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request
from chiron.policies.rivals.scalers.ray_serve import RayServeSettings, TwoChoices, decide_fleet, desired_replicas
from policy_factory import CHAT, fleet, fleet_of, model
from scenario_factory import PROFILE, kind_of

TWO = RayServeSettings(target_ongoing=2.0)


@pytest.mark.parametrize(
    ("total", "running", "changes", "expected"),
    [
        pytest.param(10, 2, {}, 5, id="ratio 2.5 of 2"),
        pytest.param(4, 2, {}, 2, id="on target"),
        pytest.param(5, 2, {}, 3, id="ceil 2.5"),
        pytest.param(0, 4, {}, 0, id="none, which bounds forbid later"),
        pytest.param(10, 2, {"upscale_factor": 0.5}, 4, id="half of what is missing: ceil 3.5"),
        pytest.param(4, 4, {"downscale_factor": 0.5}, 3, id="half of what is idle"),
        pytest.param(2, 2, {"downscale_factor": 0.2}, 1, id="rounded back to 2: one less"),
    ],
)
def test_desired_replicas(total: float, running: int, changes: dict[str, float], expected: int) -> None:
    assert desired_replicas(replace(TWO, **changes), total, running) == expected


def plans(*ticks: tuple[Any, ...], settings: RayServeSettings = TWO, **changes: Any) -> list[tuple[int, str]]:
    """Plans of ticks 1 s apart, each with these instances."""
    state, made, current = None, [], None
    for number, instances in enumerate(ticks):
        one = model(instances, **changes)
        if current is not None:
            one = replace(one, planned={"interactive": 0, "mixed": current, "batch": 0})
        decided, state = decide_fleet(settings, state, fleet(one, now_s=1000.0 + number))
        current = decided["llama"].counts["mixed"]
        made.append((current, decided["llama"].reason))
    return made


def test_more_replicas_come_once_they_have_been_desired_for_half_a_minute() -> None:
    counts = [count for count, _ in plans(*[fleet_of(2, dispatched=5)] * 35)]
    assert counts.index(5) == 30
    busy, idle = fleet_of(2, dispatched=5), fleet_of(2)
    paused = plans(*[busy] * 20, idle, *[busy] * 30, settings=replace(TWO, look_back_s=1.0))
    assert {count for count, _ in paused} == {2}, "after a break it begins anew"


def test_fewer_replicas_come_after_ten_minutes() -> None:
    counts = [count for count, _ in plans(*[fleet_of(4, dispatched=1)] * 602)]
    assert counts.index(2) == 600


def test_the_first_replica_comes_at_once() -> None:
    assert plans((), min_instances=0, waiting_interactive=3) == [(1, "first_replica")]
    assert plans((), min_instances=0) == [(0, "nothing_runs")]


def instances(count: int) -> list[Instance]:
    return [Instance(number, "m", kind_of(PROFILE), "mixed", 0.0) for number in range(count)]


def request(id: int, tokens: int = 10) -> Request:
    return Request(id, "m", CHAT, 0.0, tokens)


def load(instance: Instance, requests: int) -> None:
    for number in range(requests):
        instance.requests[10_000 + number] = request(10_000 + number)


def test_of_two_the_one_with_fewer_requests_and_each_as_often() -> None:
    router, fleet_now = TwoChoices(RayServeSettings(), Learner((CHAT,))), instances(4)
    for instance, requests in zip(fleet_now, (0, 1, 2, 3), strict=True):
        load(instance, requests)
        router.add(instance)
    chosen = Counter()
    for id in range(3000):
        placement = router.place(request(id), 0.0)
        assert placement is not None
        chosen[placement.instance.id] += 1
    # Of the six pairs three have the emptiest, two the next, one the next; nobody takes the fullest.
    assert [round(chosen[n] / 500) for n in range(4)] == [3, 2, 1, 0]


def test_a_full_one_takes_no_more_and_one_that_left_takes_nothing() -> None:
    router, (full, room, gone) = TwoChoices(RayServeSettings(max_ongoing=2), Learner((CHAT,))), instances(3)
    for instance in (gone, full, room):
        router.add(instance)
    load(full, 2)
    router.remove(gone)
    router.remove(gone)
    found = [router.place(request(id), 0.0) for id in range(50)]
    assert {placement.instance.id for placement in found if placement is not None} == {room.id}
    load(room, 2)
    assert [router.place(request(id), 1.0) for id in range(50)] == [None] * 50
    router.remove(full)
    router.remove(room)
    assert router.place(request(1), 0.0) is None


def test_a_prompt_that_fits_nowhere_waits() -> None:
    router, (one,) = TwoChoices(RayServeSettings(), Learner((CHAT,))), instances(1)
    router.add(one)
    assert router.place(request(1, tokens=PROFILE.kv_capacity_tokens), 0.0) is None
    assert router.place(request(1, tokens=PROFILE.kv_capacity_tokens - 1), 0.0) is not None
