"""QLM: request groups by deadline, pulled by engines with room; batch work makes way for those that are late."""

from __future__ import annotations

from typing import Any

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request, RequestClass
from chiron.policies.policy import Policy
from chiron.policies.rivals.schedulers.qlm import GroupOrder, Groups, QlmSettings, make_qlm, tokens_per_s, waiting_s
from chiron.policies.size import prefill_s
from chiron.policies.views import StepTimes
from policy_factory import CHAT, JOBS
from scenario_factory import PROFILE, kind_of

SLOW = RequestClass(name="slow", kind="interactive", ttft_s=60.0)


def test_a_group_waits_for_its_tokens_at_the_engines_speed() -> None:
    assert waiting_s(70, 100.0, 700.0) == 10.0  # The published table's 8B model.
    assert waiting_s(30, 100.0, 300.0) == 10.0  # Its 70B one.


def test_the_engines_speed_is_a_full_batch_over_its_step() -> None:
    learner = Learner((CHAT,))
    learner.usual.input_tokens, learner.usual.input_square, learner.usual.need_tokens = 400.0, 2e5, 600.0
    learner.step_times = StepTimes(
        fixed_s=0.01,
        per_sequence_s=1e-4,
        per_context_token_s=1e-6,
        per_prefill_token_s=1e-4,
        per_prefill_square_s=1e-7,
    )
    # Per sequence and step: 1e-4, a context of 500 tokens, and 0.04 + 0.02 s of prefill over 200 tokens.
    step_s = 0.01 + 100 * (1e-4 + 5e-4 + 3e-4)
    assert tokens_per_s(learner, 3, 100, 1_000_000) == pytest.approx(3 * 100 / step_s)
    by_kv = 0.95 * 25_000 / 500
    assert tokens_per_s(learner, 1, 100, 25_000) == pytest.approx(by_kv / (0.01 + by_kv * 9e-4))


class Model:
    """A policy's order and router over instances of a place or two."""

    def __init__(self, *instances: Instance, **changes: Any) -> None:
        policy: Policy = make_qlm(QlmSettings(**changes))
        self.learner = Learner((CHAT, SLOW, JOBS))
        assert policy.place is not None
        assert policy.order is not None
        self.router = policy.place(policy.settings, self.learner)
        self.order = policy.order(policy.settings, self.learner)
        for instance in instances:
            self.router.add(instance)

    def run(self, request: Request, instance: Instance) -> None:
        instance.requests[request.id] = request
        instance.sequences += 1
        if not request.interactive:
            instance.batch[request.id] = request
            instance.batch_sequences += 1
        self.router.changed(instance)

    def place(self, request: Request, waited_s: float = 0.0) -> tuple[int, list[int]] | None:
        placement = self.router.place(request, waited_s)
        return None if placement is None else (placement.instance.id, [victim.id for victim in placement.evict])


def instance(id: int, places: int) -> Instance:
    made = Instance(id, "m", kind_of(PROFILE, kv_capacity_tokens=1_000_000), "mixed", 0.0)
    made.max_batch_size = places
    return made


def request(id: int, cls: RequestClass = CHAT, arrival_s: float = 0.0, tokens: int = 10) -> Request:
    return Request(id, "m", cls, arrival_s, tokens)


def test_groups_go_by_deadline_and_inside_in_the_order_of_their_arrival() -> None:
    groups = Groups(QlmSettings().group_span_s)
    order = GroupOrder(groups)
    came = [
        request(1, JOBS, 0.0),  # Due at 3,600 s.
        request(2, SLOW, 30.0),  # At 90 s: the same 100 s as the next one.
        request(3, CHAT, 40.0),  # 45
        request(4, CHAT, 96.0),  # 101
        request(5, SLOW, 39.0),  # 99
    ]
    for each in came:
        order.add(each, each.arrival_s)
    assert [groups.size(each) for each in came] == [1, 2, 1, 1, 2]
    order.forget(came[4])
    came[4].outcome = "cancelled"
    assert groups.size(came[1]) == 1
    served = []
    while (head := order.head(100.0)) is not None:
        served.append(head.id)
        order.remove_head(head, 100.0)
    assert served == [2, 3, 4, 1]
    assert groups.size(came[0]) == 0


def test_the_engine_with_the_fewest_pulls_while_it_has_a_place() -> None:
    one, two = instance(1, 2), instance(2, 2)
    model = Model(one, two)
    placed = []
    for id in range(4):
        found = model.router.place(request(id), 0.0)
        assert found is not None
        placed.append(found.instance.id)
        model.run(request(id), found.instance)
    assert placed == [1, 2, 1, 2]
    assert model.place(request(9)) is None


def test_batch_work_makes_way_once_the_group_would_be_late() -> None:
    few, most = instance(1, 2), instance(2, 3)
    model = Model(few, most)
    model.run(request(1), few)
    for id, where in ((2, few), (3, most), (4, most), (5, most)):
        model.run(request(id, JOBS), where)
    late = request(10)
    # Five places of 200 tokens each: one of its own, and the four that hold places before it.
    in_time_s = 5.0 - 5 * each_s(model, 2, 3) - prefill_s(model.learner, 10)
    assert model.place(late, in_time_s - 0.001) is None, "there is time"
    assert model.place(late, in_time_s + 0.001) == (2, [5]), "the last that came, where most of it runs"
    hasty = RequestClass(name="jobs", kind="batch", ttft_s=1.0)
    assert model.place(request(11, hasty), 4.999) is None, "batch work evicts nothing"
    kept = Model(few, most, evicts=False)
    assert kept.place(late, 4.999) is None


def test_a_longer_group_is_late_sooner() -> None:
    only = instance(1, 1)
    model = Model(only)
    model.run(request(1, JOBS), only)
    for id in range(10, 30):
        model.order.add(request(id), 0.0)
    in_time_s = 5.0 - 21 * each_s(model, 1, 1) - prefill_s(model.learner, 10)
    assert model.place(request(10), in_time_s - 0.001) is None
    assert model.place(request(10), in_time_s + 0.001) == (1, [1])


def test_a_queue_of_batch_work_makes_an_interactive_group_late_at_once() -> None:
    only = instance(1, 50)
    model = Model(only)
    for id in range(50):
        model.run(request(id, JOBS), only)
    for id in range(100, 1100):
        model.order.add(request(id, JOBS), 0.0)
    assert 50 * each_s(model, 1, 50) < 5.0 < 1050 * each_s(model, 1, 50)
    assert model.place(request(2000)) == (1, [49])
    while (head := model.order.head(0.0)) is not None:
        model.order.remove_head(head, 0.0)
    assert model.place(request(2000)) is None, "what runs alone is over in time"
    model.router.remove(only)
    model.router.add(only)
    assert model.place(request(2000)) is None, "and is counted once"


def each_s(model: Model, instances: int, places: int) -> float:
    """What one more request before it takes of its time."""
    speed = tokens_per_s(model.learner, instances, places, 1_000_000)
    return waiting_s(1, model.learner.expected_output["chat"], speed)


def test_interactive_work_is_never_evicted() -> None:
    only = instance(1, 1)
    model = Model(only)
    model.run(request(1), only)
    assert model.place(request(2), 100.0) is None


def test_one_that_left_pulls_nothing_and_one_that_comes_back_does() -> None:
    only = instance(1, 1)
    model = Model(only)
    model.router.remove(only)
    assert model.place(request(1)) is None
    model.router.add(only)
    assert model.place(request(1)) == (1, [])


def test_an_idle_engine_that_is_too_small_for_one_still_takes_another() -> None:
    small = Instance(1, "m", kind_of(PROFILE), "mixed", 0.0)
    model = Model(small)
    assert model.place(request(1, tokens=200)) is None
    assert model.place(request(2, tokens=199)) == (1, []), "alone, if its prompt fits"


def test_a_busy_engine_that_is_too_small_for_one_still_takes_another() -> None:
    engines = [instance(id, 2) for id in range(1, 4)]
    model = Model(*engines)
    for each in engines:
        each.kv_reserved_tokens = 500_000
        model.run(request(each.id), each)
    long, short = request(10, JOBS, tokens=600_000), request(11, tokens=200)
    assert model.place(long) is None
    assert model.place(request(13, JOBS, tokens=500_000)) is None
    assert model.place(short) == (1, [])
    assert model.place(long) is None
    model.run(short, engines[0])
    assert model.place(request(12, tokens=200)) == (2, [])
    engines[1].kv_reserved_tokens = 0
    model.router.changed(engines[1])
    assert model.place(long) == (2, []), "asked again once something left"
    model.router.remove(engines[2])
    model.run(request(14), engines[1])
    assert model.place(request(15, tokens=200)) is None, "neither full ones nor one that left"
