"""A request for several choices takes as many places as the engine runs sequences for it."""

from __future__ import annotations

from chiron.control.booking import book, leave
from chiron.control.model import ModelState
from chiron.core.types import Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.gateway.relay.body import places
from chiron.policies.registry import make_policy

KIND = InstanceKind(name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=8)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0)
JOBS = RequestClass(name="jobs", kind="batch")


def model(count: int = 1) -> tuple[ModelState, list[Instance]]:
    state = ModelState(ModelSpec(name="m", kinds=(KIND,)), (CHAT, JOBS), make_policy("chiron"))
    instances = [Instance(n, "m", KIND, "mixed", 0.0) for n in range(1, count + 1)]
    for instance in instances:
        instance.state = "ready"
        state.router.add(instance)
    return state, instances


def run(state: ModelState, number: int, *, choices: int = 1, cls: RequestClass = CHAT) -> Request:
    """Dispatched, its prefill over."""
    request = Request(number, "m", cls, 0.0, 10)
    request.sequences = choices
    placement = state.router.place(request, 0.0)
    assert placement is not None
    placement.prefill_s = 0.0
    book(request, placement)
    state.router.changed(placement.instance)
    return request


def several(choices: int) -> Request:
    request = Request(99, "m", CHAT, 0.0, 10)
    request.sequences = choices
    return request


def test_choices_take_places_and_give_them_back() -> None:
    state, (one,) = model()
    four = run(state, 1, choices=4)
    run(state, 2)
    assert one.sequences == 5
    assert state.router.place(several(4), 0.0) is None
    assert state.router.place(several(3), 0.0) is not None
    assert leave(state, four) is one
    assert one.sequences == 1
    assert state.router.place(several(4), 0.0) is not None


def test_one_that_finds_no_room_does_not_hide_the_instance_from_smaller_ones() -> None:
    state, (one, two) = model(2)
    for number in range(6):
        run(state, number)
    found = state.router.place(several(4), 0.0)
    assert found is not None
    assert found.instance is two
    found = state.router.place(several(1), 0.0)
    assert found is not None
    assert found.instance is one


def test_kv_is_booked_for_each_choice_and_for_the_prompt_once() -> None:
    state, _ = model()
    one, four = (state.router.place(several(choices), 0.0) for choices in (1, 4))
    assert one is not None
    assert four is not None
    assert four.kv_tokens - 10 == 4 * (one.kv_tokens - 10)


def test_more_choices_than_an_engine_has_places_run_alone() -> None:
    state, (one,) = model()
    assert state.router.place(several(20), 0.0) is not None
    run(state, 1)
    assert state.router.place(several(20), 0.0) is None
    assert one.sequences == 1


def test_batch_work_makes_way_for_as_many_places_as_are_needed() -> None:
    state, (one,) = model()
    jobs = [run(state, number, cls=JOBS) for number in range(7)]
    found = state.router.place(several(4), 0.0)
    assert found is not None
    assert found.instance is one
    assert found.evict == tuple(reversed(jobs[4:]))


def test_a_request_for_very_many_choices_does_not_wait_for_an_empty_instance() -> None:
    state, (one,) = model()
    for number in range(4):
        run(state, number)
    assert state.router.place(several(10**6), 0.0) is None
    found = state.router.place(several(places(10**6)), 0.0)
    assert found is not None
    assert found.instance is one
