"""A control plane that follows another one goes on with what runs: nothing lost, nothing doubled, nothing too full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from chiron.control.plane import ControlPlane
from chiron.control.takeover import SETTLE_S
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, ModelSpec, Request, Role
from chiron.engines.model import EngineModel, StepTable
from chiron.policies.chiron.global_loop import make_chiron
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.rivals.schedulers.niyama import NiyamaSettings, make_niyama
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from scenario_factory import CLASSES, PROFILE, kind_of

ROOMY = replace(PROFILE, kv_capacity_tokens=100_000, max_num_seqs=4)
SLOTS = 4
INSTANCES = 3
DIES_S, LEADS_S = 3.0, 3.5


class Leader:
    """Fleet, engines' commands and journal of one control plane; deaf once it is deposed."""

    wants_events = False

    def __init__(self, world: World, plan: Mapping[Role, int]) -> None:
        self.world = world
        self.plan = plan
        self.deposed = False
        self.totals: list[int] = []
        policy = replace(
            make_chiron(ChironSettings()), fleet=self.decide, fleet_period_s=1.0, batch_size=None, prepare=None
        )
        self.plane = ControlPlane(
            clock=world.clock,
            fleet=self,
            journal=self,
            ends=EndsOf(self),
            models=(ModelSpec(name="m0", kinds=(kind_of(ROOMY),), min_instances=1, max_instances=INSTANCES),),
            classes=CLASSES,
            policy=replace(policy, initial_max_batch_size=SLOTS),
        )

    def decide(self, settings: Any, state: Any, view: FleetView) -> tuple[FleetPlan, Any]:
        self.totals.append(sum(view.models[0].planned.values()))
        return {"m0": ModelPlan(counts=self.plan, reason="dictated")}, state

    def start(self, request: Request) -> None:
        if not self.deposed:
            assert request.instance is not None
            self.world.start(request, request.instance.id)

    def evict(self, request: Request) -> None:
        if not self.deposed:
            self.world.evict(request)

    def set_max_batch_size(self, max_batch_size: int) -> None: ...

    def create(self, instance: Instance) -> None: ...

    def remove(self, instance: Instance) -> None: ...

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None: ...

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


class EndsOf:
    """The ``Ends`` port."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    def ended(self, request: Request) -> None:
        if not self._leader.deposed:
            self._leader.world.ends[request.id] += 1


class World:
    """Engines and relays, which outlive their leaders. ``runs``: what relays know to run, with what they would tell."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.ends: Counter[int] = Counter()
        self.runs: dict[int, dict[str, Any]] = {}
        self.engines: dict[int, EngineModel] = {}
        self.requests: dict[int, Request] = {}
        """As its clients and relays have them; ``inner`` ones are the engines'."""
        self.inner: dict[int, Request] = {}
        self.leader: Leader | None = Leader(self, {"mixed": INSTANCES})
        self.leader.plane.adopt("m0", INSTANCES, self.engine_of)
        self.leader.plane.begin()
        self.most = 0

    def engine_of(self, instance: Instance) -> Leader:
        own = Instance(instance.id, instance.model, instance.kind, "mixed", 0.0)
        self.engines[instance.id] = EngineModel(
            clock=self.clock,
            instance=own,
            profile=replace(ROOMY, max_num_seqs=64),
            times=StepTable(ROOMY),
            listener=self,
            kv_seconds_per_token=0.0,
        )
        assert self.leader is not None
        return self.leader

    # -- relays ------------------------------------------------------------------------------------------------

    def submit(self, number: int, cls: int, tokens_out: int) -> None:
        request = Request(number, "m0", CLASSES[cls], self.clock.now_s, 8, tokens_out)
        self.requests[number] = request
        if self.leader is not None:
            self.leader.plane.submit(request)

    def start(self, request: Request, instance: int) -> None:
        inner = Request(request.id, "m0", request.cls, request.arrival_s, 8, request.payload)
        inner.tokens_done = request.tokens_done
        self.inner[request.id] = inner
        assert request.id not in self.runs, "it runs in one place"
        self.runs[request.id] = {
            "instance": instance,
            "epoch": request.epoch,
            "tokens_done": request.tokens_done,
            "dispatch_s": self.clock.now_s,
            "first_token_s": request.first_token_s,
        }
        self.most = max(self.most, Counter(run["instance"] for run in self.runs.values())[instance])
        self.engines[instance].start(inner)

    def evict(self, request: Request) -> None:
        run = self.runs.pop(request.id, None)
        if run is None:
            return
        inner = self.inner.pop(request.id)
        self.engines[run["instance"]].evict(inner)
        self.clock.call_at(self.clock.now_s, lambda: self.told("evicted", request))

    def told(self, what: str, request: Request) -> None:
        if self.leader is not None:
            getattr(self.leader.plane, what)(request)

    # -- engines -----------------------------------------------------------------------------------------------

    def first_token(self, inner: Request) -> None:
        if self.inner.get(inner.id) is inner:
            self.runs[inner.id]["first_token_s"] = self.clock.now_s
            self.told("first_token", self.requests[inner.id])

    def finished(self, inner: Request) -> None:
        if self.inner.pop(inner.id, None) is inner:
            del self.runs[inner.id]
            request = self.requests[inner.id]
            request.tokens_done = inner.tokens_done
            if self.leader is None or not request.submitted:
                self.ends[inner.id] += 1  # Its client has all of it, and nobody knows of it who had to be told.
                return
            self.told("finished", request)

    def evicted(self, inner: Request) -> None:
        """It was stopped, and its relay has forgotten it."""

    def refused(self, inner: Request, reason: str) -> None:
        raise AssertionError(reason)

    # -- the leader dies, and another one is told --------------------------------------------------------------

    def die(self) -> None:
        assert self.leader is not None
        self.leader.deposed = True
        self.leader = None
        for number, request in self.requests.items():
            # What relays tell of it later is a request that is new to whoever leads then.
            if not self.ends[number]:
                fresh = Request(number, "m0", request.cls, request.arrival_s, 8, request.payload)
                self.requests[number] = fresh

    def lead(self, plan: Mapping[Role, int], settle_s: float, *, found: bool = True) -> Leader:
        leader = self.leader = Leader(self, plan)
        leader.plane.take_over(settle_s)
        for number in self.engines:
            adopted = leader.plane.adopt_instance(
                "m0",
                ROOMY.name,
                "mixed",
                number=number,
                max_batch_size=SLOTS,
                attach=lambda instance: leader,
                found=found,
            )
            assert adopted is not None
            assert adopted.id == number
        leader.plane.begin()
        return leader

    def tell_running(self, numbers: list[int]) -> list[bool]:
        assert self.leader is not None
        plane, taken = self.leader.plane, []
        for number in numbers:
            run = dict(self.runs[number])
            instance = plane.instances[run.pop("instance")]
            taken.append(plane.adopt_running(instance, self.requests[number], **run))
        return taken

    def tell_waiting(self) -> None:
        assert self.leader is not None
        for number, request in self.requests.items():
            if not self.ends[number] and number not in self.runs and not request.submitted:
                self.leader.plane.submit(request)

    def counts(self) -> Counter[int]:
        return Counter(run["instance"] for run in self.runs.values())


def busy() -> World:
    """More than there is room for, of all classes, and the leader has just died."""
    world, draw = World(), Random(5)
    for number in range(40):
        world.clock.run_until(number * 0.05)
        world.submit(number, draw.choice((0, 0, 1, 2, 2)), draw.randint(20, 200))
    world.clock.run_until(DIES_S)
    assert world.counts() == dict.fromkeys(world.engines, SLOTS)
    world.die()
    for number in (100, 101):
        world.submit(number, 0, 30)
    world.clock.run_until(LEADS_S)
    return world


def watch(world: World, end_s: float) -> None:
    """Go on, and count after each timer."""
    while (due_s := world.clock.next_s()) is not None and due_s <= end_s:
        world.clock.step()
        if world.leader is not None and not world.leader.plane.settling:
            counts = world.counts()
            for number, instance in world.leader.plane.instances.items():
                held = {n for n, run in world.runs.items() if run["instance"] == number}
                assert set(instance.requests) | set(instance.evicting) >= held
                assert counts[number] <= SLOTS
    world.clock.run_until(end_s)


def test_what_runs_goes_on_and_what_waits_runs_and_each_ends_once() -> None:
    world = busy()
    before = {number: run["epoch"] for number, run in world.runs.items()}
    leader = world.lead({"mixed": INSTANCES}, settle_s=SETTLE_S)
    running = sorted(world.runs)
    assert world.tell_running(running[::2]) == [True] * len(running[::2])
    world.tell_waiting()
    watch(world, LEADS_S + 0.2)
    late = [number for number in running[1::2] if number in world.runs]
    assert all(world.tell_running(late))
    for number in world.runs:
        assert world.requests[number].epoch == before[number], "its relay knows it by this"
    leader.plane.told_all()
    assert not leader.plane.settling

    watch(world, 120.0)

    assert set(world.ends) == set(world.requests)
    assert set(world.ends.values()) == {1}
    assert leader.plane.open_requests == 0
    assert world.most <= SLOTS
    for instance in leader.plane.instances.values():
        assert (instance.sequences, instance.kv_reserved_tokens, instance.running_interactive) == (0, 0, 0)
        assert instance.prefill_backlog_s == 0.0


def test_nothing_is_dispatched_to_what_may_be_full_and_nothing_shrinks_until_all_is_told() -> None:
    world = busy()
    leader = world.lead({"mixed": 1}, settle_s=2.0)
    running = set(world.runs)
    world.tell_waiting()
    for instance in leader.plane.instances.values():
        leader.plane.avoid(instance, 0.1)

    watch(world, LEADS_S + 1.9)
    assert set(world.runs) <= running, "nobody has said what runs"
    assert [i.state for i in leader.plane.instances.values()] == ["ready"] * INSTANCES
    assert leader.totals == [INSTANCES]

    assert all(world.tell_running(sorted(world.runs)))
    watch(world, LEADS_S + 2.5)
    assert set(world.runs) - running, "what waited runs, once the time is over"
    watch(world, 120.0)
    assert set(world.ends.values()) == {1}
    assert len(leader.plane.instances) == 1, "then it shrinks"


def test_what_is_told_after_the_settling_time_is_taken_in_and_nothing_new_comes_until_there_is_room() -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES}, settle_s=0.1)
    running = sorted(world.runs)
    world.tell_waiting()
    world.clock.run_until(LEADS_S + 0.2)
    overfull = world.counts()
    assert max(overfull.values()) > SLOTS, "nobody had said what runs"

    assert all(world.tell_running([number for number in running if number in world.runs]))
    for number, instance in leader.plane.instances.items():
        assert instance.sequences == overfull[number]
    began = set(world.runs)
    while max(world.counts().values()) > SLOTS:
        assert world.clock.step()
        assert all(world.counts()[world.runs[n]["instance"]] <= SLOTS for n in set(world.runs) - began)
        began |= set(world.runs)
    world.clock.run_until(120.0)
    assert set(world.ends.values()) == {1}


@pytest.mark.parametrize("drained", [False, True])
def test_what_its_fleet_has_not_found_is_counted_and_gets_nothing_new(*, drained: bool) -> None:
    world = World()
    world.submit(1, 0, 400)
    world.clock.run_until(1.0)
    world.die()
    leader = world.lead({"mixed": INSTANCES}, 60.0, found=False)
    assert world.tell_running([1]) == [True]
    leader.plane.told_all()
    instances = list(leader.plane.instances.values())
    if drained:
        for instance in instances:
            leader.plane.instance_leaving(instance)
    world.submit(2, 0, 4)
    world.clock.run_until(3.0)
    assert list(world.runs) == [1], "what runs is booked, and nothing comes to it"
    assert sum(len(instance.requests) for instance in instances) == 1
    for instance in instances:
        leader.plane.instance_ready(instance, leader)
        leader.plane.instance_ready(instance, leader)
    assert (2 in world.runs) is not drained
    world.clock.run_until(3.0 if drained else 60.0)
    assert world.ends[2] == (not drained)


def test_one_that_is_to_leave_is_drained_when_all_that_runs_there_is_told() -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES - 1}, settle_s=SETTLE_S)
    number, instance = min(leader.plane.instances.items())
    leader.plane.instance_leaving(instance)
    assert leader.plane.instances.get(number) is instance, "nobody has said yet what runs there"
    running = set(world.runs)
    assert all(world.tell_running(sorted(running)))
    leader.plane.told_all()
    world.tell_waiting()
    while any(run["instance"] == number for run in world.runs.values()):
        assert leader.plane.instances[number].state == "draining"
        assert world.clock.step()
        assert {n for n, run in world.runs.items() if run["instance"] == number} <= running, "nothing new"
    world.clock.run_until(120.0)
    assert number not in leader.plane.instances
    assert set(world.ends.values()) == {1}


def test_an_instance_that_has_failed_is_not_taken_over_again() -> None:
    world = busy()
    plane = world.lead({"mixed": INSTANCES}, settle_s=1.0).plane
    assert world.leader is not None
    leader = world.leader
    number, instance = min(plane.instances.items())
    plane.instance_failed(instance)
    again = plane.adopt_instance(
        "m0", ROOMY.name, "mixed", number=number, max_batch_size=SLOTS, attach=lambda instance: leader
    )
    assert again is None
    assert number not in plane.instances


def test_what_a_fleet_finds_takes_no_number_that_may_still_be_told() -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES}, settle_s=1.0)
    plane = leader.plane
    plane.instance_failed(plane.instances[max(plane.instances)])
    plane.models["m0"].planned = {"mixed": INSTANCES - 1}  # So that there is room for one.
    numbers = set(plane.instances)
    plane.kinds_found({ROOMY.name: 1})
    assert set(plane.instances) == numbers
    told = max(numbers) + 2
    adopted = plane.adopt_instance(
        "m0", ROOMY.name, "mixed", number=told, max_batch_size=SLOTS, attach=lambda instance: leader
    )
    assert adopted is not None
    plane.instance_failed(adopted)
    plane.models["m0"].planned = {"mixed": INSTANCES - 1}
    plane.told_all()
    plane.kinds_found({ROOMY.name: 1})
    assert set(plane.instances) > numbers
    assert max(plane.instances) > told


def test_what_cannot_be_is_not_taken_in() -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES}, settle_s=1.0)
    number = min(world.runs)
    run = dict(world.runs[number])
    instance = leader.plane.instances[run.pop("instance")]
    other = next(i for i in leader.plane.instances.values() if i is not instance)
    gone = Instance(99, "m0", instance.kind, "mixed", 0.0)
    double = Request(number, "m0", CLASSES[0], 0.0, 8, 20)

    assert not leader.plane.adopt_running(gone, world.requests[number], **run)
    assert leader.plane.adopt_running(instance, world.requests[number], **run)
    assert not leader.plane.adopt_running(instance, world.requests[number], **run), "told twice"
    assert not leader.plane.adopt_running(other, double, **run), "told by two"
    assert leader.plane.open_requests == 1
    for kind, taken in ((ROOMY.name, instance.id), ("no such kind", 50)):
        adopted = leader.plane.adopt_instance(
            "m0", kind, "mixed", number=taken, max_batch_size=SLOTS, attach=lambda instance: leader
        )
        assert adopted is None


def test_what_was_taken_over_and_never_ran_is_no_load() -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES}, settle_s=1.0)
    assert all(world.tell_running(sorted(world.runs)))
    leader.plane.told_all()
    state = leader.plane.models["m0"]

    for number in list(world.runs):
        leader.plane.failed(world.requests[number], "it says so")

    assert not [arrivals for arrivals in state.arrivals(world.clock.now_s) if arrivals.requests]


@pytest.mark.parametrize("fails", [True, False], ids=["while it settles", "afterwards"])
def test_an_instance_that_was_taken_over_may_fail(*, fails: bool) -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES}, settle_s=1.0)
    assert all(world.tell_running(sorted(world.runs)))
    if not fails:
        leader.plane.told_all()
    number = min(world.engines)
    lost = [n for n, run in world.runs.items() if run["instance"] == number]
    for each in lost:
        del world.runs[each], world.inner[each]
    world.engines.pop(number).fail()

    leader.plane.instance_failed(leader.plane.instances[number])
    leader.plane.told_all()
    world.clock.run_until(120.0)

    assert leader.plane.open_requests == 0
    assert all(world.ends[n] == 1 for n in lost)


def test_what_is_told_is_booked_as_it_runs_there() -> None:
    world = busy()
    leader = world.lead({"mixed": INSTANCES}, settle_s=1.0)
    (first, *_), instance = sorted(world.runs), leader.plane.instances[1]
    told = world.requests[first]

    assert leader.plane.adopt_running(instance, told, epoch=7, tokens_done=3, dispatch_s=2.0, first_token_s=2.5)

    assert (told.epoch, told.tokens_done, told.dispatch_s, told.first_token_s, told.ran) == (7, 3, 2.0, 2.5, True)
    assert instance.prefill_backlog_s == 0.0, "its prefill is over"
    fresh = Request(500, "m0", CLASSES[2], 1.0, 8, 20)
    assert leader.plane.adopt_running(instance, fresh, epoch=1, tokens_done=0, dispatch_s=-1.0, first_token_s=-1.0)
    assert (fresh.dispatch_s, fresh.ran) == (1.0, False)
    assert instance.prefill_backlog_s == fresh.prefill_cost_s > 0.0
    assert (instance.sequences, set(instance.requests)) == (2, {first, 500})


@pytest.mark.parametrize(
    ("factor", "initial", "up", "wanted"),
    [(0.5, 4, 2, 2), (0.5, 4, 0, 2), (2.0, 2, 1, 4), (2.0, 2, 4, 4), (1.0, 3, 1, 3)],
)
def test_a_policy_s_own_first_fleet_is_asked_for_once(factor: float, initial: int, up: int, wanted: int) -> None:
    """Some of it runs already: only the rest is missing, however the policy sizes it."""
    clock, leader = VirtualClock(), World().leader
    assert leader is not None
    plane = ControlPlane(
        clock=clock,
        fleet=leader,
        journal=leader,
        ends=EndsOf(leader),
        models=(ModelSpec(name="m0", kinds=(kind_of(ROOMY),), min_instances=1, max_instances=8),),
        classes=CLASSES,
        policy=make_niyama(NiyamaSettings(fleet_factor=factor)),
    )
    plane.take_over(1.0)
    for number in range(1, up + 1):
        plane.adopt_instance(
            "m0", ROOMY.name, "mixed", number=number, max_batch_size=SLOTS, attach=lambda instance: leader, found=True
        )
    plane.request_initial("m0", initial)
    plane.begin()
    clock.run_until(2.0)
    assert sum(plane.models["m0"].planned.values()) == wanted
    assert len(plane.instances) == wanted
