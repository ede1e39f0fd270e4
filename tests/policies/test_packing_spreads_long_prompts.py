"""Dispatch of prompts longer than a step may be, beside requests whose answers may be short."""

from __future__ import annotations

from math import inf

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, InstanceKind, Request, RequestClass
from chiron.policies.routers.packing import PackingRouter, PackingSettings

KIND = InstanceKind(name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=256)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.1)
JOBS = RequestClass(name="jobs", kind="batch")
NOW_S = 100.0
LONG, SHORT = 20_000, 500
"""1.2 s of prefill, as a learner that has seen nothing takes it to be, and 0.03 s."""


def fleet(young: list[int], *, limit_s: float = 2.0, from_share: float = 0.003) -> tuple[PackingRouter, list[Instance]]:
    """Instances that run so many young requests each."""
    learner = Learner((CHAT, JOBS))
    learner.ttft_min_s = CHAT.ttft_s
    learner.itl_missed = 0.01
    router = PackingRouter(PackingSettings(), learner, spreads_long=from_share)
    instances = [Instance(n, "m", KIND, "mixed", 0.0) for n in range(1, len(young) + 1)]
    for instance, count in zip(instances, young, strict=True):
        instance.state = "ready"
        instance.prefill_limit_s = limit_s
        runs(instance, 3, first_token_s=NOW_S - 30.0)
        runs(instance, count, first_token_s=NOW_S - 1.0)
        router.add(instance)
    return router, instances


def runs(instance: Instance, count: int, *, first_token_s: float, cls: RequestClass = CHAT) -> None:
    for _ in range(count):
        request = Request(len(instance.requests) + 1000 * instance.id, "m", cls, 0.0, SHORT)
        request.first_token_s = first_token_s
        instance.requests[request.id] = request
        instance.sequences += 1
        instance.running_interactive += cls.interactive


def place(router: PackingRouter, tokens: int) -> int | None:
    placement = router.place(Request(1, "m", CHAT, NOW_S, tokens), 0.0)
    return None if placement is None else placement.instance.id


def test_a_long_prompt_goes_where_the_fewest_answers_may_be_short() -> None:
    router, _ = fleet([5, 2, 7])
    assert place(router, LONG) == 2
    assert place(router, SHORT) == 1, "all others are packed"


def test_of_those_with_as_few_it_goes_to_the_one_that_packing_fills_last() -> None:
    router, _ = fleet([2, 5, 2])
    assert place(router, LONG) == 3


def test_one_that_has_no_first_token_yet_is_young_and_batch_work_is_not() -> None:
    router, (one, two) = fleet([1, 0])
    runs(two, 2, first_token_s=-1.0)
    assert place(router, LONG) == 1
    router, (one, two) = fleet([1, 0])
    runs(two, 2, first_token_s=-1.0, cls=JOBS)
    assert place(router, LONG) == 2
    assert one.prefill_limit_s < inf


def test_an_instance_without_room_or_that_takes_no_work_is_passed_over() -> None:
    router, (_, two, three) = fleet([5, 2, 0])
    three.prefill_backlog_s = 2.0
    assert place(router, LONG) == 2
    router.remove(two)
    assert place(router, LONG) == 1
    router.add(two)
    assert place(router, LONG) == 2


@pytest.mark.parametrize(
    ("full", "batch", "expected"),
    [
        pytest.param(40, 0, 2, id="past some that are full"),
        pytest.param(100, 0, 1, id="packed, rather than past as many as there may be"),
        pytest.param(40, 300, 2, id="those for batch work are not looked at"),
    ],
)
def test_only_so_many_instances_are_looked_at(full: int, batch: int, expected: int) -> None:
    router, instances = fleet([5, 0] + [0] * (full + batch))
    for instance in instances[2 : 2 + full]:
        instance.prefill_backlog_s = 2.0
        router.changed(instance)
    for instance in instances[2 + full :]:
        instance.role = "batch"
        router.changed(instance)
    assert place(router, LONG) == expected


@pytest.mark.parametrize("limit_s", [inf, 2.0])
def test_where_steps_are_short_anyway_it_is_packed(limit_s: float) -> None:
    router, _ = fleet([5, 2, 7], limit_s=limit_s)
    assert place(router, LONG) == (1 if limit_s == inf else 2)


def test_it_begins_with_missed_slos_and_ends_once_few_are_left() -> None:
    router, _ = fleet([5, 2, 7])
    estimates = router._estimates
    for missed, expected in ((0.002, 1), (0.004, 2), (0.002, 2), (0.0009, 1), (0.002, 1)):
        estimates.itl_missed = missed
        assert place(router, LONG) == expected, missed
    never, _ = fleet([5, 2, 7], from_share=inf)
    assert place(never, LONG) == 1
