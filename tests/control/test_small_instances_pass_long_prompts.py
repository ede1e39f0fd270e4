"""Where kinds differ in KV capacity, a prompt that waits for a larger one is passed by those that fit a smaller one."""

from __future__ import annotations

import pytest

from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.registry import make_policy

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=60.0)
RUSH = RequestClass(name="rush", kind="interactive", ttft_s=1.0)
HASTY = RequestClass(name="hasty", kind="batch", deadline_s=5.0)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=3600.0)
SHORT, LONG = 100, 1500
gated = pytest.mark.parametrize("policy", ["chiron", "chiron-paper", "qlm"])


def kind(name: str, kv_capacity_tokens: int, most: int, seqs: int) -> InstanceKind:
    return InstanceKind(
        name=name,
        gpu="g",
        gpus=1,
        price_per_gpu_hour=1.0,
        kv_capacity_tokens=kv_capacity_tokens,
        max_num_seqs=seqs,
        max_instances=most,
    )


class World:
    """Fleet, engines and journal in one. One request runs on an instance at a time, or ``seqs``."""

    wants_events = False

    def __init__(self, policy: str, small: int, large: int = 1, seqs: int = 1) -> None:
        self.clock = VirtualClock()
        self.started: list[tuple[int, str]] = []
        self.evicted: list[Request] = []
        self.running: dict[int, Request] = {}
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self,
            journal=self,
            models=[
                ModelSpec(
                    name="m",
                    kinds=(kind("small", 1000, small, seqs), kind("large", 2000, large, seqs)),
                    min_instances=small + large,
                    max_instances=small + large,
                )
            ],
            classes=[CHAT, RUSH, HASTY, NIGHT],
            policy=make_policy(policy, None),
        )
        self.plane.request_initial("m", small + large)
        for instance in list(self.plane.instances.values()):
            self.plane.instance_ready(instance, self)

    def arrive(self, number: int, tokens: int, cls: RequestClass = CHAT) -> None:
        self.plane.submit(Request(number, "m", cls, self.clock.now_s, tokens))

    def finish(self, number: int) -> None:
        request = self.running.pop(number)
        self.plane.first_token(request)
        self.plane.finished(request)

    def start(self, request: Request) -> None:
        assert request.instance is not None
        self.running[request.id] = request
        self.started.append((request.id, request.instance.kind.name))

    def create(self, instance: Instance) -> None: ...
    def remove(self, instance: Instance) -> None: ...
    def evict(self, request: Request) -> None:
        self.evicted.append(request)

    def set_max_batch_size(self, max_batch_size: int) -> None: ...
    def decided(self, now_s: float, decision: Decision) -> None: ...
    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


@gated
def test_those_behind_it_go_to_a_small_instance_and_leave_it_the_large_one(policy: str) -> None:
    world = World(policy, small=1)
    world.arrive(1, LONG)
    world.arrive(2, LONG)
    world.arrive(3, SHORT)
    world.arrive(4, SHORT)
    assert world.started == [(1, "large"), (3, "small")]
    world.finish(1)
    assert world.started[2:] == [(2, "large")], "the short one behind it did not take its place"
    world.finish(3)
    world.finish(2)
    assert world.started[3:] == [(4, "small")]


@gated
def test_with_no_long_prompt_in_the_queue_short_ones_go_anywhere_in_their_order(policy: str) -> None:
    world = World(policy, small=1)
    for number in range(1, 6):
        world.arrive(number, SHORT)
    assert [number for number, _ in world.started] == [1, 2]
    for number in range(1, 6):
        world.finish(number)
    assert [number for number, _ in world.started] == [1, 2, 3, 4, 5]
    assert {name for _, name in world.started} == {"small", "large"}


@gated
def test_a_long_prompt_that_came_later_does_not_pass_a_short_one(policy: str) -> None:
    world = World(policy, small=1)
    world.arrive(1, SHORT)
    world.arrive(2, LONG)
    world.clock.run_until(1.0)
    world.arrive(3, SHORT)
    world.clock.run_until(2.0)
    world.arrive(4, LONG)
    world.finish(2)
    assert world.started == [(1, "small"), (2, "large"), (3, "large")]
    world.finish(3)
    assert world.started[3:] == [(4, "large")]


def test_batch_work_passes_an_interactive_prompt_and_a_longer_batch_prompt() -> None:
    world = World("chiron", small=1)
    world.arrive(1, LONG)
    world.arrive(2, LONG)
    world.arrive(3, LONG, NIGHT)
    world.arrive(4, SHORT, NIGHT)
    assert world.started == [(1, "large"), (4, "small")]
    world.finish(1)
    world.finish(4)
    assert world.started[2:] == [(2, "large")]
    world.finish(2)
    assert world.started[3:] == [(3, "large")]


def test_a_long_prompt_finds_the_large_instance_behind_any_number_of_small_ones() -> None:
    world = World("chiron", small=20)
    world.arrive(1, LONG)
    world.arrive(2, LONG, NIGHT)
    assert world.started == [(1, "large")]
    world.finish(1)
    assert world.started == [(1, "large"), (2, "large")]


def test_long_batch_work_that_makes_way_before_it_began_is_held_again() -> None:
    world = World("chiron", small=1)
    world.arrive(1, LONG, NIGHT)
    world.arrive(2, LONG)
    world.arrive(3, SHORT)
    assert [request.id for request in world.evicted] == [1]
    world.plane.evicted(world.evicted[0])
    assert world.started == [(1, "large"), (2, "large"), (3, "small")]
    assert [request.id for request in world.plane.models["m"].batch] == [1]


def test_batch_work_makes_no_way_where_the_prompt_that_waits_cannot_go() -> None:
    world = World("chiron", small=1, large=0)
    world.arrive(1, LONG)
    world.clock.run_until(30.0)
    world.arrive(2, SHORT, NIGHT)
    world.arrive(3, LONG)
    assert (world.started, world.evicted) == ([(2, "small")], [])


def test_what_engines_tell_of_their_kv_counts_from_then_on() -> None:
    world = World("chiron", small=1)
    small, large = world.plane.instances.values()
    world.plane.capacity_told(small, 2000)
    world.plane.capacity_told(large, 1000)
    world.arrive(1, LONG)
    world.arrive(2, LONG)
    world.arrive(3, SHORT)
    assert world.started == [(1, "small"), (3, "large")]
    world.finish(3)
    world.arrive(4, SHORT)
    world.finish(1)
    assert world.started[2:] == [(4, "large"), (2, "small")]


def test_one_that_ended_in_the_queue_is_in_nobodys_way_and_all_are_counted() -> None:
    world = World("chiron", small=1)
    for number, tokens in enumerate((LONG, LONG, LONG, SHORT, SHORT), start=1):
        world.arrive(number, tokens)
    waiting = world.plane.models["m"].waiting
    assert (len(waiting), sorted(request.id for request in waiting)) == (3, [2, 3, 5])
    world.plane.cancel(next(request for request in waiting if request.id == 2))
    world.finish(1)
    assert world.started == [(1, "large"), (4, "small"), (3, "large")]
    assert [request.id for request in waiting] == [5]
    assert waiting.oldest_arrival_s() == 0.0


def test_one_for_which_nothing_is_kept_any_more_goes_there_at_once() -> None:
    world = World("chiron", small=0, seqs=2)
    world.plane.capacity_told(next(iter(world.plane.instances.values())), 8000)
    for number in range(100):  # Now it is known that they are of common size.
        world.arrive(number, SHORT)
        world.finish(number)
    for number, tokens in ((100, 5000), (101, 5000), (102, SHORT)):
        world.arrive(number, tokens)
    assert [number for number, _ in world.started[100:]] == [100]
    world.plane.cancel(next(request for request in world.plane.models["m"].waiting if request.id == 101))
    assert [number for number, _ in world.started[100:]] == [100, 102]


def test_an_instance_that_is_smaller_than_others_of_its_kind_counts_as_it_is() -> None:
    world = World("chiron", small=0, large=2)
    less, _ = world.plane.instances.values()
    world.plane.capacity_told(less, 1000)
    world.arrive(1, LONG)
    world.arrive(2, LONG)
    world.clock.run_until(30.0)
    world.arrive(3, SHORT, NIGHT)
    world.arrive(4, LONG)
    assert [number for number, _ in world.started] == [1, 3]
    assert world.evicted == [], "what runs there is in no long prompt's way"


def test_a_kind_without_an_instance_is_as_large_as_it_is_configured() -> None:
    world = World("chiron", small=1, large=0)
    world.plane.capacity_told(next(iter(world.plane.instances.values())), 900)
    world.arrive(1, LONG)
    assert [request.id for request in world.plane.models["m"].waiting] == [1]
    assert world.plane.kv_capacity_tokens("m") == 2000


def test_a_new_instance_counts_with_what_it_has_and_not_with_what_the_last_one_had() -> None:
    world = World("chiron", small=1)
    small, _ = world.plane.instances.values()
    world.plane.capacity_told(small, 400)
    world.plane.instance_failed(small)
    world.plane.instance_ready(next(i for i in world.plane.instances.values() if i.state == "starting"), world)
    world.arrive(1, LONG)
    world.arrive(2, LONG)
    world.arrive(3, 500)
    assert world.started == [(1, "large"), (3, "small")]


def test_a_larger_instance_that_is_gone_counts_no_more() -> None:
    world = World("chiron", small=2)
    more, _, _ = world.plane.instances.values()
    world.plane.capacity_told(more, 2000)
    world.plane.instance_failed(more)
    for number, tokens in ((1, LONG), (2, LONG), (3, SHORT)):
        world.arrive(number, tokens)
    assert world.started == [(1, "large"), (3, "small")]


@pytest.mark.parametrize("cls", [CHAT, NIGHT], ids=["interactive", "batch"])
def test_a_prompt_for_which_no_instance_is_large_enough_any_more_is_rejected(cls: RequestClass) -> None:
    world = World("chiron", small=1, large=2)
    _, more, less = world.plane.instances.values()
    state = world.plane.models["m"]
    world.plane.capacity_told(less, 900)
    world.arrive(1, LONG)
    world.arrive(2, LONG, cls)
    (waits,) = (*state.waiting, *state.batch)
    state.planned = {**state.planned, "mixed": 2}
    world.plane.cancel(world.running.pop(1))
    world.plane.instance_failed(more)
    assert (waits.outcome, world.plane.open_requests) == ("rejected", 0)
    assert not state.waiting.count + state.batch.count


@gated
def test_what_waits_while_capacities_are_told_has_its_place_by_what_was_told(policy: str) -> None:
    world = World(policy, small=1)
    small, _ = world.plane.instances.values()
    world.plane.capacity_told(small, 2000)
    for number, tokens in ((1, LONG), (2, LONG), (3, LONG), (4, SHORT), (5, SHORT)):
        world.arrive(number, tokens)
    world.plane.capacity_told(small, 1000)
    world.finish(next(number for number, name in world.started if name == "small"))
    assert world.started[2:] == [(4, "small")], "three does not fit there any more"
    assert len(world.plane.models["m"].waiting) == 2


def test_batch_work_that_is_held_while_capacities_are_told_has_its_place_by_what_was_told() -> None:
    world = World("chiron", small=1)
    small, _ = world.plane.instances.values()
    world.plane.capacity_told(small, 2000)
    for number, tokens in ((1, LONG), (2, LONG), (3, LONG), (4, SHORT)):
        world.arrive(number, tokens, NIGHT)
    world.plane.capacity_told(small, 1000)
    world.finish(next(number for number, name in world.started if name == "small"))
    assert world.started[2:] == [(4, "small")]


def with_a_lost_short_prompt() -> World:
    """Both instances are taken; a short prompt waits that cannot be in time any more."""
    world = World("chiron", small=1)
    world.arrive(1, LONG)
    world.arrive(2, SHORT)
    world.arrive(3, SHORT, RUSH)
    world.clock.run_until(10.0)
    return world


def test_long_prompts_that_may_be_in_time_go_before_short_ones_that_are_lost_but_for_a_turn_in_forty() -> None:
    world = with_a_lost_short_prompt()
    longs = range(4, 50)
    for number in longs:
        world.arrive(number, LONG)
    for number in [1, *longs]:
        if world.started[-1][0] == 3:
            break
        world.finish(number)
    assert world.started[2:] == [*((number, "large") for number in longs[:40]), (3, "large")]


def test_batch_work_at_risk_goes_before_what_is_lost_where_a_long_prompt_waits_for_another_instance() -> None:
    world = with_a_lost_short_prompt()
    world.plane.models["m"].batch_at_risk = True
    world.arrive(4, LONG)
    world.arrive(5, SHORT, NIGHT)
    world.finish(2)
    assert world.started[2:] == [(5, "small")]


def test_long_batch_work_that_may_be_done_in_time_goes_before_short_work_that_is_lost() -> None:
    world = World("chiron", small=1)
    world.arrive(1, LONG, NIGHT)
    world.arrive(2, SHORT, NIGHT)
    world.arrive(3, SHORT, HASTY)
    world.clock.run_until(10.0)
    for number in range(4, 50):
        world.arrive(number, LONG, NIGHT)
    for number in [1, *range(4, 50)]:
        if world.started[-1][0] == 3:
            break
        world.finish(number)
    assert world.started[2:] == [*((number, "large") for number in range(4, 42)), (3, "large")]
