"""Laws 1, 2, 5 and 7 while engines, fleets and clients tell anything, late, twice, out of turn or not at all.

The engines here are letters in a drawer: whatever could ever be told of any placement may be told at any time, as a
network of relays could. What stands between it and the control plane is as thin as it can be: it drops what is told of
an earlier placement than the present one, by ``Request.epoch``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chiron.control.eviction import ANSWER_MAX_S
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, ModelSpec, Request, Sample
from chiron.policies.chiron.global_loop import make_chiron
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from effort import examples
from scenario_factory import CLASSES, PROFILE, kind_of

SLOTS = 2
TOLD = ("first_token", "prefilled", "finished", "evicted", "lost", "refused", "failed")
ROOMY = replace(PROFILE, kv_capacity_tokens=100_000, max_num_seqs=SLOTS)
number = st.integers(min_value=0, max_value=10**6)


class Told:
    """A fleet, its engines, and clients, of whom nothing comes but what a test says."""

    wants_events = True

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.plan = 2
        self.instances: list[Instance] = []
        self.removed: list[Instance] = []
        self.requests: list[Request] = []
        self.placements: list[tuple[Request, int]] = []
        self.ends: Counter[int] = Counter()
        self.evicted_interactive = 0
        policy = replace(make_chiron(ChironSettings()), fleet=self.decide, fleet_period_s=5.0, batch_size=None)
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self,
            journal=self,
            ends=EndsOf(self),
            models=(ModelSpec(name="m0", kinds=(kind_of(ROOMY),), min_instances=0, max_instances=3),),
            classes=CLASSES,
            policy=replace(policy, drain_timeout_s=20.0, initial_max_batch_size=SLOTS),
        )
        self.plane.adopt("m0", 2, self.attach)
        self.plane.begin()

    def decide(self, settings: Any, state: Any, view: FleetView) -> tuple[FleetPlan, Any]:
        return {"m0": ModelPlan(counts={"mixed": self.plan}, reason="dictated")}, state

    def attach(self, instance: Instance) -> Told:
        self.instances.append(instance)
        return self

    # -- the Engine, Fleet and Journal ports ---------------------------------------------

    def start(self, request: Request) -> None:
        instance = request.instance
        assert instance is not None
        assert instance.state == "ready"
        self.placements.append((request, request.epoch))

    def evict(self, request: Request) -> None:
        self.evicted_interactive += request.interactive and request.outcome is None

    def set_max_batch_size(self, max_batch_size: int) -> None:
        pass

    def create(self, instance: Instance) -> None:
        self.instances.append(instance)

    def remove(self, instance: Instance) -> None:
        assert instance.state == "gone"
        assert not instance.requests
        assert not instance.evicting
        self.removed.append(instance)

    def decided(self, now_s: float, decision: Decision) -> None:
        pass

    def ended(self, request: Request) -> None:
        pass

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        pass

    # -- what is told --------------------------------------------------------------------

    def tell(self, what: str, request: Request, epoch: int) -> None:
        if request.epoch != epoch:
            return
        if what in ("finished", "evicted") and request.outcome is None:
            request.tokens_done = 5
        more = ("as it said",) if what in ("refused", "failed") else ()
        getattr(self.plane, what)(request, *more)

    def submit(self, cls: int) -> Request:
        request = Request(len(self.requests), "m0", CLASSES[cls], self.clock.now_s, 8)
        self.requests.append(request)
        self.plane.submit(request)
        return request


class EndsOf:
    """The ``Ends`` port."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def ended(self, request: Request) -> None:
        self._told.ends[request.id] += 1


def sample_of(instance: Instance, taken_s: float, steps: int) -> Sample:
    zero = dict.fromkeys(("waiting", "waiting_tokens", "head_tokens", "kv_used_tokens", "preemptions"), 0)
    return Sample(
        instance_id=instance.id,
        taken_s=taken_s,
        running=1,
        steps=steps,
        busy_s=0.02 * steps,
        decode_tokens=steps,
        prefill_tokens=0,
        context_tokens=10.0 * steps,
        **zero,
    )


class Anything(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.told = Told()

    @rule(cls=st.integers(min_value=0, max_value=len(CLASSES) - 1), times=st.integers(min_value=1, max_value=4))
    def submit(self, cls: int, times: int) -> None:
        for _ in range(times):
            self.told.submit(cls)

    @precondition(lambda self: self.told.requests)
    @rule(at=number, how=st.sampled_from(("submit", "cancel", "cut_off")))
    def client(self, at: int, how: str) -> None:
        getattr(self.told.plane, how)(self.told.requests[at % len(self.told.requests)])

    @precondition(lambda self: self.told.placements)
    @rule(at=number, what=st.sampled_from(TOLD))
    def any_placement(self, at: int, what: str) -> None:
        self.told.tell(what, *self.told.placements[at % len(self.told.placements)])

    @precondition(lambda self: self.told.placements)
    @rule(back=st.integers(min_value=1, max_value=4), what=st.sampled_from(TOLD), times=st.sampled_from((1, 1, 2)))
    def recent_placement(self, back: int, what: str, times: int) -> None:
        for _ in range(times):
            self.told.tell(what, *self.told.placements[-min(back, len(self.told.placements))])

    @rule()
    def never_submitted(self) -> None:
        self.told.plane.cancel(Request(10**6, "m0", CLASSES[0], self.told.clock.now_s, 8))

    @rule(at=number, ready=st.booleans())
    def fleet(self, at: int, ready: bool) -> None:
        instance = self.told.instances[at % len(self.told.instances)]
        if ready:
            self.told.plane.instance_ready(instance, self.told)
        else:
            self.told.plane.instance_failed(instance)

    @rule(at=number, late_s=st.sampled_from((0.0, 3.0)), steps=st.integers(min_value=0, max_value=100))
    def scrape(self, at: int, late_s: float, steps: int) -> None:
        instance = self.told.instances[at % len(self.told.instances)]
        sample = sample_of(instance, self.told.clock.now_s - late_s, steps)
        self.told.plane.sampled([sample, sample])
        self.told.plane.capacity_told(instance, 50_000)

    @rule(plan=st.integers(min_value=0, max_value=3))
    def replan(self, plan: int) -> None:
        self.told.plan = plan

    @rule(by_s=st.sampled_from((0.0, 1.0, 7.0, 30.0)))
    def wait(self, by_s: float) -> None:
        self.told.clock.run_until(self.told.clock.now_s + by_s)

    @invariant()
    def holds(self) -> None:
        check(self.told)

    def teardown(self) -> None:
        if hasattr(self, "told"):
            drains(self.told)


def check(told: Told) -> None:
    plane = told.plane
    state = plane.models["m0"]
    waiting = Counter(request.id for request in (*state.waiting, *state.batch))
    placed: Counter[int] = Counter()
    for instance in plane.instances.values():
        placed.update([*instance.requests, *(r.id for r in instance.evicting.values() if r.outcome is None)])
        inside = instance.requests.values()
        assert instance.sequences == len(inside) <= instance.max_batch_size
        assert instance.running_interactive == sum(r.interactive for r in inside)
        assert set(instance.batch) == {r.id for r in inside if not r.interactive}
        assert instance.kv_reserved_tokens == sum(r.reserved_tokens for r in inside)
        assert instance.prefill_backlog_s == pytest.approx(sum(r.prefill_cost_s for r in inside), abs=1e-6)
        assert not set(instance.requests) & set(instance.evicting)
    for request in told.requests:
        ended = request.outcome is not None
        assert told.ends[request.id] == ended
        assert waiting[request.id] + placed[request.id] == (not ended), "it is in one place, or over"
        if request.outcome == "finished":
            assert request.arrival_s <= request.dispatch_s <= request.first_token_s <= request.finish_s
    assert plane.open_requests == len(told.requests) - told.ends.total()
    assert len(waiting) == len(state.waiting) + state.batch.count
    assert told.evicted_interactive == 0


def drains(told: Told) -> None:
    """Clients give up what never comes, and no plan keeps an instance: whatever was told, none stays."""
    told.plan = 0
    for request in told.requests:
        told.plane.cut_off(request)
    told.clock.run_until(told.clock.now_s + ANSWER_MAX_S + 3 * 5.0)
    check(told)
    assert told.plane.open_requests == 0
    assert not told.plane.instances
    assert len({instance.id for instance in told.removed}) == len(told.removed), "removed once"


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=examples(45), stateful_step_count=40)


def test_an_answer_without_a_first_token_is_late_if_it_ends_late() -> None:
    told = Told()
    request = told.submit(0)
    told.clock.run_until(3.0)

    told.tell("finished", request, request.epoch)

    assert (request.outcome, request.first_token_s) == ("finished", 3.0)
    assert told.plane.models["m0"].missed == 1, "its TTFT SLO is one second"


def test_an_earlier_run_is_told_from_the_present_one() -> None:
    told = Told()
    request = told.submit(2)
    first = request.epoch
    told.tell("lost", request, first)
    assert request.epoch == first + 1, "it runs again"

    told.tell("finished", request, first)
    told.tell("first_token", request, first)

    assert (request.outcome, request.first_token_s) == (None, -1.0)
    told.tell("finished", request, request.epoch)
    assert request.outcome == "finished"


def test_what_cannot_be_is_counted_and_changes_nothing() -> None:
    told = Told()
    request = told.submit(0)
    told.tell("finished", request, request.epoch)

    for what in TOLD:
        told.tell(what, request, request.epoch)
    told.plane.submit(request)

    assert request.outcome == "finished"
    assert told.plane.refused_events == len(TOLD)  # All but ``prefilled``, which is a guess, and the second ``submit``.
    check(told)


def test_what_is_told_of_an_instance_that_is_gone_is_dropped() -> None:
    told = Told()
    told.plan = 0
    told.clock.run_until(30.0)
    gone = told.instances[0]
    assert gone in told.removed

    told.plane.instance_ready(gone, told)
    told.plane.instance_failed(gone)
    told.plane.capacity_told(gone, 50)
    told.plane.avoid(gone, 1.0)
    told.plane.sampled([sample_of(gone, 30.0, 5)])

    assert not told.plane.instances
    assert told.plane.models["m0"].kv_capacity_tokens == ROOMY.kv_capacity_tokens
    assert told.plane.refused_events == 3


def test_a_sample_that_was_overtaken_is_dropped() -> None:
    told = Told()
    instance = told.instances[0]
    told.clock.run_until(3.0)

    for taken_s, steps in ((1.0, 10), (3.0, 30), (2.0, 20), (3.0, 30)):
        told.plane.sampled([sample_of(instance, taken_s, steps)])

    assert instance.sample is not None
    assert instance.previous_sample is not None
    assert (instance.previous_sample.taken_s, instance.sample.taken_s) == (1.0, 3.0)
