"""A round of scrapes of many instances does not hold up a request that arrives meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from chiron.control import scrapes
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, ModelSpec, Request, Sample
from chiron.policies.chiron.global_loop import make_chiron
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.views import FleetPlan, FleetView, LocalDecision, LocalView, ModelPlan
from scenario_factory import CLASSES, PROFILE, kind_of

ROOMY = replace(PROFILE, kv_capacity_tokens=100_000)


class Many:
    """A control plane over ``count`` instances that do nothing; ``retuned`` has the time at which each was looked at by
    the local loop."""

    wants_events = False

    def __init__(self, count: int) -> None:
        self.clock = VirtualClock()
        self.retuned: list[float] = []
        self.started: list[tuple[float, Request]] = []
        base = make_chiron(ChironSettings())
        policy = replace(base, fleet=self.decide, batch_size=self.look, prepare=None)
        self.count = count
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self,
            journal=self,
            models=(ModelSpec(name="m0", kinds=(kind_of(ROOMY),), max_instances=count),),
            classes=CLASSES,
            policy=policy,
        )
        self.plane.adopt("m0", count, lambda instance: self)
        self.retuned.clear()

    def decide(self, settings: Any, state: Any, view: FleetView) -> tuple[FleetPlan, Any]:
        return {"m0": ModelPlan(counts={"mixed": self.count}, reason="dictated")}, state

    def look(self, settings: Any, state: Any, view: LocalView) -> tuple[LocalDecision | None, Any]:
        self.retuned.append(view.now_s)
        return None, state

    def start(self, request: Request) -> None:
        self.started.append((self.clock.now_s, request))

    def evict(self, request: Request) -> None: ...

    def set_max_batch_size(self, max_batch_size: int) -> None: ...

    def create(self, instance: Instance) -> None: ...

    def remove(self, instance: Instance) -> None: ...

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None: ...

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...

    def scrape(self, steps: int = 0) -> None:
        self.plane.sampled([sample(number, self.clock.now_s, steps) for number in self.plane.instances])


def sample(number: int, taken_s: float, steps: int) -> Sample:
    return Sample(
        instance_id=number,
        taken_s=taken_s,
        running=1,
        waiting=0,
        waiting_tokens=0,
        head_tokens=0,
        kv_used_tokens=0,
        steps=steps,
        busy_s=0.02 * steps,
        decode_tokens=steps,
        prefill_tokens=0,
        context_tokens=10.0 * steps,
        preemptions=0,
    )


def second_round(count: int) -> Many:
    """It has just come."""
    many = Many(count)
    many.scrape()
    many.clock.run_until(1.0)
    many.scrape(50)
    return many


def test_no_call_takes_more_than_a_slice_and_all_are_taken_in_the_end() -> None:
    many = second_round(4 * scrapes.SLICE + 1)
    assert not many.retuned, "it comes in many samples, which is enough for one call"

    most = 0
    while len(many.retuned) < many.count:
        before = len(many.retuned)
        assert many.clock.step()
        most = max(most, len(many.retuned) - before)

    assert most == scrapes.SLICE
    assert sorted(set(many.retuned)) == pytest.approx([1.0 + i * scrapes.GAP_S for i in range(1, 6)])


def test_a_small_round_is_taken_at_once() -> None:
    many = second_round(scrapes.SLICE)

    assert many.retuned == [1.0] * scrapes.SLICE


def test_a_request_that_arrives_between_two_slices_is_placed_at_once() -> None:
    many = second_round(4 * scrapes.SLICE)
    many.clock.run_until(1.0 + 1.5 * scrapes.GAP_S)

    many.plane.submit(Request(1, "m0", CLASSES[0], many.clock.now_s, 8))

    assert [at_s for at_s, _ in many.started] == [many.clock.now_s]
    assert len(many.retuned) == scrapes.SLICE


def test_of_the_rounds_that_wait_for_one_that_is_under_way_the_newest_counts() -> None:
    many = second_round(4 * scrapes.SLICE)
    for _ in range(50):
        many.clock.run_until(many.clock.now_s + 1e-4)
        many.scrape(60)
    last_s = many.clock.now_s

    many.clock.run_until(3.0)

    assert len(many.retuned) == 2 * many.count
    assert {i.sample.taken_s for i in many.plane.instances.values() if i.sample is not None} == {last_s}


def test_samples_are_asked_for_when_they_are_taken() -> None:
    many, made = Many(3 * scrapes.SLICE), list[int]()

    def samples(taken_s: float) -> Iterator[Sample]:
        for number in list(many.plane.instances):
            made.append(number)
            yield sample(number, taken_s, 0)

    many.plane.sampled(samples(0.0))
    counts = [len(made)]
    while len(made) < many.count:
        assert many.clock.step()
        counts.append(len(made))

    assert counts == [scrapes.SLICE + 1, scrapes.SLICE + 1, 2 * scrapes.SLICE, 3 * scrapes.SLICE]


def test_samples_that_cannot_be_made_hold_up_no_later_round() -> None:
    many = Many(3 * scrapes.SLICE)

    def broken() -> Iterator[Sample]:
        for number in list(many.plane.instances)[: 2 * scrapes.SLICE]:
            yield sample(number, 0.0, 0)
        raise OSError("it is gone")

    many.plane.sampled(broken())
    with pytest.raises(OSError, match="it is gone"):
        many.clock.run_until(1.0)

    many.scrape()
    many.clock.run_until(2.0)
    assert all(i.sample is not None for i in many.plane.instances.values())


def test_a_round_is_learned_from_as_often_whatever_its_size() -> None:
    learned = []
    for count in (scrapes.SLICE, 4 * scrapes.SLICE):
        many = second_round(count)
        many.clock.run_until(2.0)
        learned.append(many.plane.models["m0"].learner.updates)

    assert learned == [8, 8]
