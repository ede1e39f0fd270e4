"""Over instances that stay anyway, interactive requests are spread by load; beyond those they are packed."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, InstanceKind, Request, RequestClass
from chiron.policies.routers.packing import PackingRouter, PackingSettings

KIND = InstanceKind(name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=4)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.1)
JOBS = RequestClass(name="jobs", kind="batch")


def fleet(count: int, *, over: int) -> tuple[PackingRouter, list[Instance]]:
    learner = Learner((CHAT, JOBS))
    learner.spread_over = over
    router = PackingRouter(PackingSettings(), learner)
    instances = [instance(number) for number in range(1, count + 1)]
    for each in instances:
        router.add(each)
    return router, instances


def instance(number: int) -> Instance:
    made = Instance(number, "m", KIND, "mixed", 0.0)
    made.state = "ready"
    return made


def runs(router: PackingRouter, count: int, *, cls: RequestClass = CHAT) -> list[int]:
    """Where so many requests go, one after another."""
    found = []
    for _ in range(count):
        placement = router.place(Request(1, "m", cls, 0.0, 500), 0.0)
        if placement is None:
            break
        placement.instance.sequences += 1
        router.changed(placement.instance)
        found.append(placement.instance.id)
    return found


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        pytest.param(0, [1, 1, 1, 1, 2, 2, 2, 2], id="packed"),
        pytest.param(3, [1, 2, 3, 1, 2, 3, 1, 2], id="spread"),
        pytest.param(5, [1, 2, 3, 1, 2, 3, 1, 2], id="over those that there are"),
        pytest.param(2, [1, 2, 1, 2, 1, 2, 1, 2, 3, 3, 3, 3], id="packed on what is beyond"),
    ],
)
def test_requests_go_to_the_least_loaded_of_those_that_stay(over: int, expected: list[int]) -> None:
    router, _ = fleet(3, over=over)
    assert runs(router, len(expected)) == expected


def test_prefill_that_waits_is_load() -> None:
    router, (one, two) = fleet(2, over=2)
    one.prefill_backlog_s = 0.5
    two.sequences = 2
    router.changed(one)
    router.changed(two)
    assert runs(router, 1) == [2]


def test_of_one_that_is_full_nobody_waits() -> None:
    router, (one, two) = fleet(2, over=2)
    one.max_batch_size, two.sequences = 1, 3
    one.sequences = 1
    router.changed(one)
    router.changed(two)
    assert runs(router, 2) == [2]


def test_instances_come_and_go() -> None:
    router, (one, *_) = fleet(3, over=2)
    assert runs(router, 2) == [1, 2]
    router.remove(one)
    assert runs(router, 2) == [3, 2]
    router.add(one)
    assert runs(router, 3) == [1, 1, 2], "the first two by rank again"
    router._estimates.spread_over = 3
    assert runs(router, 1) == [3]
    router._estimates.spread_over = 0
    assert runs(router, 1) == [1], "packed"


def test_batch_work_goes_to_the_last_as_ever() -> None:
    router, _ = fleet(3, over=3)
    assert runs(router, 2, cls=JOBS) == [3, 3]


def test_batch_instances_are_left_alone_where_the_plan_became_smaller() -> None:
    router, _ = fleet(2, over=3)
    batch = instance(3)
    batch.role = "batch"
    router.add(batch)
    assert runs(router, 8) == [1, 2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("each_s", [inf, nan, 1e300, -1.0])
def test_whatever_was_learned_of_steps_requests_are_spread(each_s: float) -> None:
    router, _ = fleet(3, over=3)
    estimates = router._estimates
    estimates.step_times = replace(estimates.step_times, per_sequence_s=each_s, per_context_token_s=each_s)
    assert runs(router, 6) == [1, 2, 3, 1, 2, 3]


def test_changes_leave_no_trail() -> None:
    router, (one, two) = fleet(2, over=2)
    runs(router, 1)
    for _ in range(10_000):
        router.changed(one)
        router.changed(two)
    assert len(router._least._heap) <= 64
