"""PolyServe: bins by ITL SLO, the most loaded server that still keeps it, tighter bins for looser requests."""

from __future__ import annotations

from typing import Any

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request, RequestClass
from chiron.policies.policy import Policy
from chiron.policies.rivals.schedulers.polyserve import PolyServeSettings, compose, keeps, make_polyserve, step_s
from chiron.policies.views import StepTimes
from policy_factory import JOBS
from scenario_factory import PROFILE, kind_of

FAST = RequestClass(name="fast", kind="interactive", ttft_s=1.0, itl_s=0.02)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.05)
TIMES = StepTimes(
    fixed_s=0.01, per_sequence_s=0.001, per_context_token_s=0.0, per_prefill_token_s=0.001, per_prefill_square_s=0.0
)


class Model:
    """Ten milliseconds a step, and one for each sequence: 10 of them take all of 20 ms, 40 all of 50 ms, and one less
    leaves something for prefill."""

    def __init__(self, *instances: Instance, **changes: Any) -> None:
        policy: Policy = make_polyserve(PolyServeSettings(margin=1.0, **changes))
        self.learner = Learner((FAST, CHAT, JOBS))
        self.learner.step_times = TIMES
        self.learner.prefill_token_s, self.learner.prefill_square_s = 0.001, 0.0
        assert policy.place is not None
        assert policy.order is not None
        self.router = policy.place(policy.settings, self.learner)
        self.order = policy.order(policy.settings, self.learner)
        for instance in instances:
            self.router.add(instance)
        self.instances = instances
        self._number = 1000

    def run(self, instance: Instance, cls: RequestClass, times: int = 1, *, prefill_s: float = 0.0) -> None:
        for _ in range(times):
            self._number += 1
            request = Request(self._number, "m", cls, 0.0, 1)
            instance.requests[request.id] = request
            instance.sequences += 1
            instance.prefill_backlog_s += prefill_s
            request.prefill_cost_s = prefill_s
            if request.interactive:
                instance.running_interactive += 1
            else:
                instance.batch[request.id] = request
                instance.batch_sequences += 1
            self.router.changed(instance)

    def empty(self, instance: Instance) -> None:
        instance.requests.clear()
        instance.batch.clear()
        instance.sequences = instance.batch_sequences = instance.running_interactive = 0
        self.router.changed(instance)

    def place(self, cls: RequestClass, waited_s: float = 0.0, tokens: int = 10) -> tuple[int, int] | None:
        """The instance, and how many are evicted there."""
        placement = self.router.place(Request(1, "m", cls, 0.0, tokens), waited_s)
        return None if placement is None else (placement.instance.id, len(placement.evict))

    def pump(self, *waiting: Request) -> list[tuple[int, int]]:
        """What the queue gives, and where it goes."""
        for request in waiting:
            self.order.add(request, 0.0)
        gone = []
        while (head := self.order.head(0.0)) is not None and (found := self.router.place(head, 0.0)) is not None:
            self.order.remove_head(head, 0.0)
            self.run(found.instance, {cls.name: cls for cls in (FAST, CHAT, JOBS)}[head.class_name])
            gone.append((head.id, found.instance.id))
        return gone


def instance(id: int) -> Instance:
    return Instance(id, "m", kind_of(PROFILE, kv_capacity_tokens=1_000_000, max_num_seqs=64), "mixed", 0.0)


def request(id: int, cls: RequestClass) -> Request:
    return Request(id, "m", cls, 0.0, 10)


@pytest.mark.parametrize(
    ("sequences", "prefill_s", "itl_s", "left_s", "kept"),
    [
        pytest.param(9, 0.0, 0.02, 1.0, True, id="10 + 9 ms"),
        pytest.param(10, 0.0, 0.02, 1.0, False, id="10 + 10 ms"),
        # Steps of 20 ms leave three fifths of 50 ms for prefill: 0.6 s of it in the next second.
        pytest.param(10, 0.59, 0.05, 1.0, True, id="prefill in time"),
        pytest.param(10, 0.61, 0.05, 1.0, False, id="prefill too late"),
        pytest.param(63, 1.0, float("inf"), 1.0, True, id="no ITL SLO"),
    ],
)
def test_a_server_keeps_both_slos_by_prediction(
    sequences: int, prefill_s: float, itl_s: float, left_s: float, kept: bool
) -> None:
    assert step_s(TIMES, sequences, 0.0) == pytest.approx(0.01 + 0.001 * sequences)
    assert keeps(TIMES, sequences, 0.0, prefill_s, itl_s, left_s) is kept


def test_the_most_loaded_server_that_keeps_the_slo_gets_it() -> None:
    full, half, few = instance(1), instance(2), instance(3)
    model = Model(full, half, few)
    model.run(full, CHAT, 40)
    model.run(half, CHAT, 30)
    model.run(few, CHAT, 5)
    assert model.place(CHAT) == (2, 0)
    model.run(half, CHAT, 10)
    assert model.place(CHAT) == (3, 0)
    model.empty(full)
    assert model.place(CHAT) == (3, 0), "an idle one is the last resort"
    model.run(few, CHAT, 35)
    assert model.place(CHAT) == (1, 0)


def test_looser_requests_may_use_tighter_servers_and_never_the_reverse() -> None:
    fast, chat = instance(1), instance(2)
    model = Model(fast, chat)
    model.run(fast, FAST, 8)
    model.run(chat, CHAT, 38)
    assert model.place(CHAT) == (2, 0)
    model.run(chat, CHAT)
    assert model.place(CHAT) == (1, 0), "its own are full"
    model.run(fast, CHAT)
    assert model.place(CHAT) is None, "nine are what 20 ms allow there"
    assert model.place(FAST) is None
    model.empty(fast)
    model.run(fast, CHAT, 5)
    assert model.place(FAST) is None, "idle since, it has joined the looser bin"


def test_a_server_whose_prefill_would_be_late_is_passed_over() -> None:
    busy, other = instance(1), instance(2)
    model = Model(busy, other)
    model.run(busy, CHAT, 10)
    model.run(other, CHAT, 5)
    assert model.place(CHAT) == (1, 0)
    model.run(busy, CHAT, prefill_s=3.0)
    assert model.place(CHAT) == (2, 0)
    assert model.place(CHAT, waited_s=6.0) == (1, 0), "late whatever happens: the ITL alone counts"


def test_batch_work_fills_what_is_left_and_makes_way() -> None:
    one, two = instance(1), instance(2)
    model = Model(one, two)
    model.run(one, CHAT, 38)
    assert model.place(JOBS) == (1, 0)
    model.run(one, JOBS, 2)
    model.run(two, JOBS, 64)
    assert model.place(JOBS) is None
    assert model.place(CHAT) == (2, 26), "one and the 38 that are left are 39"
    one.index = two.index = None
    assert Model(one, two, evicts=False).place(CHAT) is None


def test_whoever_found_no_room_is_asked_again_when_a_server_changed_or_it_is_late() -> None:
    only = instance(1)
    model = Model(only)
    model.run(only, CHAT, 5, prefill_s=1.0)
    waits = request(1, CHAT)
    assert model.router.place(waits, 0.0) is None
    assert model.router.place(waits, 1.0) is None
    assert model.router.place(waits, 5.0) is not None, "late whatever happens: the ITL alone counts"
    assert model.router.place(waits, 1.0) is None
    only.prefill_backlog_s = 0.0
    model.router.changed(only)
    assert model.router.place(waits, 1.0) is not None


def test_batch_work_makes_no_way_for_a_tighter_bin_beside_interactive_requests() -> None:
    only = instance(1)
    model = Model(only)
    model.run(only, CHAT, 5)
    model.run(only, JOBS, 34)
    assert model.place(CHAT) == (1, 1)
    assert model.place(FAST) is None


def test_batch_prompts_that_wait_make_way_too() -> None:
    only = instance(1)
    model = Model(only)
    model.run(only, CHAT)
    model.run(only, JOBS, 3, prefill_s=2.0)
    assert model.place(CHAT) == (1, 2), "2 s of prefill are in time, 4 are not"


def test_a_server_that_batch_work_made_way_on_is_in_the_bin_of_whom_it_was_for() -> None:
    only = instance(1)
    model = Model(only)
    model.run(only, JOBS, 30)
    assert model.place(FAST) == (1, 22)
    model.run(only, FAST)
    for request in list(only.batch.values())[8:]:
        del only.batch[request.id], only.requests[request.id]
    only.sequences, only.batch_sequences = 9, 8
    model.router.changed(only)
    assert model.place(JOBS) is None, "nine are what 20 ms allow"


def test_whoever_turned_the_smallest_away_is_asked_again_once_its_load_changed() -> None:
    only = instance(1)
    model = Model(only)
    model.run(only, CHAT, 39)
    assert model.place(CHAT) is None
    only.requests.popitem()
    only.sequences -= 1
    model.router.changed(only)
    assert model.place(CHAT) == (1, 0)


def test_a_bin_without_room_holds_up_no_other() -> None:
    model = Model(instance(1), instance(2))
    model.run(model.instances[0], CHAT, 20)
    model.run(model.instances[1], CHAT, 30)
    fast, chats = request(1, FAST), [request(id, CHAT) for id in range(2, 5)]
    assert model.pump(fast, *chats, request(9, JOBS)) == [(2, 2), (3, 2), (4, 2), (9, 2)]
    assert model.order.head(0.0) is fast
    assert list(model.order) == [fast]


def test_a_bin_without_servers_gets_the_emptiest_of_a_looser_one() -> None:
    few, most = instance(1), instance(2)
    model = Model(few, most)
    model.run(few, CHAT, 5)
    model.run(most, CHAT, 39)
    assert model.place(CHAT) == (1, 0)
    assert model.pump(request(1, FAST)) == []
    assert model.place(CHAT) is None, "it takes nothing more"
    assert model.place(JOBS) is None
    model.run(few, JOBS)
    assert model.place(CHAT) is None, "nor where batch work could make way"
    model.empty(few)
    assert model.pump(request(2, CHAT)) == [(1, 1), (2, 1)], "once it is idle, the first has it; looser ones may join"
    assert model.place(FAST) == (1, 0)


def test_no_more_than_one_server_is_emptied_for_a_bin() -> None:
    few, most = instance(1), instance(2)
    model = Model(few, most)
    model.run(few, CHAT, 5)
    model.run(most, CHAT, 6)
    assert [model.place(FAST), model.place(FAST)] == [None, None]
    assert model.place(CHAT) == (2, 0)
    model.router.remove(few)
    assert model.place(FAST) is None
    assert model.place(CHAT) is None, "another when that one has left"
    model.router.add(few)
    assert model.place(CHAT) == (1, 0)


def test_what_passes_takes_no_room_that_others_wait_for() -> None:
    fast, chat = instance(1), instance(2)
    model = Model(fast, chat)
    model.run(fast, FAST, 5, prefill_s=0.1)
    model.run(chat, CHAT, 39)
    assert model.place(CHAT) == (1, 0)
    assert model.place(FAST) is None, "its prefill would be late"
    assert model.pump(request(1, FAST), request(2, CHAT)) == []
    assert model.pump(request(3, JOBS)) == []


def test_batch_work_stays_where_there_is_room_beside_it() -> None:
    for evicts in (True, False):
        only = instance(1)
        model = Model(only, evicts=evicts)
        model.run(only, JOBS)
        assert model.place(FAST) == (1, 0)


def test_steps_are_chunked_by_slack_unless_it_is_turned_off() -> None:
    assert make_polyserve(PolyServeSettings()).compose is not None
    assert make_polyserve(PolyServeSettings(chunks=False)).compose is None


@pytest.mark.parametrize(("relegates", "expected"), [(True, 2), (False, 1)])
def test_a_prompt_that_would_be_late_waits_behind_the_others(relegates: bool, expected: int) -> None:
    composer = compose(PolyServeSettings(relegates=relegates), Learner((CHAT, JOBS)))
    composer.add(Request(1, "m", CHAT, 0.0, 100), 100, False)
    composer.add(Request(2, "m", CHAT, 3.0, 100), 100, False)
    head = composer.head(6.0, False)
    assert head is not None
    assert head.id == expected
