"""The stage loop asks the policy about each pipeline and carries out what fits its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any

import pytest

from chiron.control.actuators import Actuators, NullActuators
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.policy import Policy
from chiron.policies.views import PipelineView, StagePlan
from pipelines import CHAT, pipeline_kind, stage_kind

KIND = InstanceKind(
    name="k",
    gpu="a100",
    gpus=2,
    price_per_gpu_hour=2.0,
    kv_capacity_tokens=1000,
    max_num_seqs=8,
    pipeline=pipeline_kind(stage_kind(0, max_replicas=3), stage_kind(1, gpus=2)),
)
BATCH = RequestClass(name="batch", kind="batch", deadline_s=3600.0)
STAGE = StageSample(ready=1, starting=0, draining=0, busy_s=0.0, passes=0, tokens=0)


class World:
    """Fleet, engine and journal of one pipeline."""

    wants_events = False

    def __init__(self) -> None:
        self.scaled: list[tuple[int, ...]] = []
        self.decisions: list[Decision] = []

    def create(self, instance: Instance) -> None: ...
    def remove(self, instance: Instance) -> None: ...
    def start(self, request: Request) -> None: ...
    def evict(self, request: Request) -> None: ...
    def set_max_batch_size(self, max_batch_size: int) -> None: ...

    def scale(self, replicas: Sequence[int]) -> None:
        self.scaled.append(tuple(replicas))

    def decided(self, now_s: float, decision: Decision) -> None:
        self.decisions.append(decision)

    def ended(self, request: Request) -> None: ...
    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


class Loop:
    """A control plane whose policy gives each stage what the test says, and keeps the views it saw."""

    def __init__(
        self, *counts: int, actuators: Actuators | None = None, gpus: int | None = None, pipelines: int = 1
    ) -> None:
        self.world, self.clock, self.views = World(), VirtualClock(), []
        self.counts = counts

        def decide(settings: Any, state: Any, view: PipelineView) -> tuple[tuple[StagePlan, ...], Any]:
            self.views.append((view, state))
            return tuple(StagePlan(replicas=n, reason="asked") for n in self.counts), len(self.views)

        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self.world,
            journal=self.world,
            models=[ModelSpec(name="m", kinds=(KIND,))],
            classes=[CHAT, BATCH],
            policy=Policy(name="p", settings=None, stages=decide, stages_period_s=10.0),
            actuators=actuators,
            gpus_max={"a100": gpus} if gpus is not None else None,
        )
        self.plane.adopt("m", pipelines, lambda instance: self.world)
        self.instance, *self.others = self.plane.instances.values()
        self.plane.begin()

    def sampled(self, *stages: StageSample, **changes: Any) -> None:
        sample = PipelineSample(taken_s=self.clock.now_s, stages=stages, running=0, waiting=0)
        for instance in (self.instance, *self.others):
            self.plane.stages_sampled(instance, replace(sample, **changes))


def test_a_plan_is_held_within_bounds_carried_out_once_and_written_down() -> None:
    loop = Loop(9, 0)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    loop.clock.run_until(30.0)
    assert loop.world.scaled == [(3, 1)]
    (decision,) = loop.world.decisions
    assert (decision.kind, decision.subject, decision.before, decision.after) == ("stage", "m#1/s0", 1, 3)
    assert decision.reason == "asked"


def test_each_pipeline_keeps_its_state_and_sees_what_happened_since_the_last_tick() -> None:
    loop = Loop(1, 1)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    loop.plane.submit(Request(1, "m", CHAT, 10.0, 5))
    loop.sampled(replace(STAGE, busy_s=4.0, passes=40, tokens=400), replace(STAGE, ready=2, busy_s=10.0, passes=5))
    loop.clock.run_until(20.0)
    (first, nothing), (second, state) = loop.views
    assert (nothing, state) == (None, 1)
    assert first.stages[0].utilisation != first.stages[0].utilisation
    assert [s.utilisation for s in second.stages] == [pytest.approx(0.4), pytest.approx(0.5)]
    assert (second.stages[0].step_s, second.stages[0].batch_tokens) == (pytest.approx(0.1), pytest.approx(10.0))
    assert second.arrival_rate == pytest.approx(0.1)


def test_before_the_first_scrape_nothing_is_decided() -> None:
    loop = Loop(2, 2)
    loop.clock.run_until(30.0)
    assert loop.views == []


@pytest.mark.parametrize(
    "sample",
    [
        (STAGE,),
        (STAGE, replace(STAGE, busy_s=nan)),
        (STAGE, replace(STAGE, ready=-1)),
        (STAGE, replace(STAGE, kv_used_tokens=-5)),
        (STAGE, replace(STAGE, ready=1025)),
        (STAGE, replace(STAGE, starting=1 << 60)),
        (STAGE, replace(STAGE, draining=1 << 60)),
        (STAGE, replace(STAGE, start_s=86_401.0)),
    ],
)
def test_what_cannot_be_true_is_not_taken_in(sample: tuple[StageSample, ...]) -> None:
    loop = Loop(2, 2)
    loop.sampled(*sample)
    loop.clock.run_until(10.0)
    assert loop.views == []


def test_to_advise_is_to_write_down_and_touch_nothing() -> None:
    loop = Loop(2, 1, actuators=NullActuators())
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    assert loop.world.scaled == []
    assert len(loop.world.decisions) == 1


@pytest.mark.parametrize(
    ("gpus", "pipelines", "scaled", "reasons"),
    [
        (99, 1, [(3, 4)], {"asked"}),
        (3, 1, [], {"gpus_limited"}),
        (5, 1, [(1, 2)], {"gpus_limited"}),
        (8, 1, [(2, 3)], {"gpus_limited"}),
        (6, 2, [], {"gpus_limited"}),
        (9, 2, [(2, 2)], {"gpus_limited"}),
    ],
)
def test_replicas_have_gpus_only_as_far_as_there_are_some(
    gpus: int, pipelines: int, scaled: list[tuple[int, ...]], reasons: set[str]
) -> None:
    loop = Loop(3, 4, gpus=gpus, pipelines=pipelines)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(30.0)
    assert loop.world.scaled == scaled
    assert {decision.reason for decision in loop.world.decisions} == reasons


def test_replicas_that_drain_hold_their_gpus() -> None:
    loop = Loop(3, 1, gpus=5)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    loop.counts = (1, 2)
    loop.sampled(replace(STAGE, ready=3), STAGE)
    loop.clock.run_until(20.0)
    loop.sampled(replace(STAGE, draining=2), STAGE)
    loop.clock.run_until(30.0)
    assert loop.world.scaled == [(3, 1), (1, 1)]
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(40.0)
    assert loop.world.scaled[2:] == [(1, 2)]


@pytest.mark.parametrize("seen", [True, False])
def test_a_stage_that_grows_while_it_drains_takes_no_gpus_that_are_still_held(seen: bool) -> None:
    loop = Loop(3, 1, gpus=5)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    loop.sampled(replace(STAGE, ready=3), STAGE)
    loop.counts = (1, 1)
    loop.clock.run_until(20.0)
    if seen:
        loop.sampled(replace(STAGE, draining=2), STAGE)
    loop.counts = (3, 1)
    loop.clock.run_until(30.0)
    assert loop.world.scaled == [(3, 1), (1, 1)]
    loop.sampled(replace(STAGE, draining=1), STAGE)
    loop.clock.run_until(40.0)
    assert loop.world.scaled[2:] == [(2, 1)]
    loop.sampled(replace(STAGE, starting=1), STAGE)
    loop.clock.run_until(50.0)
    assert loop.world.scaled[3:] == [(3, 1)]


def test_that_a_stage_gets_none_of_what_it_wants_is_written_down_once() -> None:
    loop = Loop(1, 2, gpus=3)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(30.0)
    (decision,) = loop.world.decisions
    said = (decision.subject, decision.before, decision.after, decision.reason)
    assert said == ("m#1/s1", 1, 1, "gpus_limited")
    loop.counts = (1, 3)
    loop.clock.run_until(50.0)
    assert len(loop.world.decisions) == 2
    loop.counts = (1, 1)
    loop.clock.run_until(60.0)
    assert len(loop.world.decisions) == 2
    loop.counts = (1, 3)
    loop.clock.run_until(80.0)
    assert len(loop.world.decisions) == 3
    assert loop.world.scaled == []


def test_no_instance_is_made_where_pipelines_have_all_gpus() -> None:
    loop = Loop(3, 1, gpus=5)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    made: list[Instance] = []
    loop.world.create = made.append  # type: ignore[method-assign]
    loop.plane.request_initial("m", 2)
    assert made == []
    loop.counts = (1, 1)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(20.0)
    loop.sampled(STAGE, STAGE)
    loop.plane.request_initial("m", 2)
    assert made == []  # Two GPUs are free, and a pipeline needs three.


def test_the_fault_of_one_pipeline_is_not_that_of_the_others() -> None:
    loop = Loop(2, 1, pipelines=2)
    faulty, sound = loop.instance, loop.others[0]
    faulty.engine = Faulty()
    loop.sampled(STAGE, STAGE)
    with pytest.raises(ExceptionGroup) as raised:
        loop.clock.run_until(10.0)
    assert [str(each) for each in raised.value.exceptions] == ["unreachable"]
    assert loop.world.scaled == [(2, 1)]
    assert loop.plane.stage_plan(sound) == (2, 1)
    # What was not carried out is no plan, and is tried again.
    assert loop.plane.stage_plan(faulty) == (1, 1)
    assert [decision.subject for decision in loop.world.decisions] == [f"m#{sound.id}/s0"]
    faulty.engine = loop.world
    loop.clock.run_until(20.0)
    assert loop.plane.stage_plan(faulty) == (2, 1)


class Faulty(World):
    def scale(self, replicas: Sequence[int]) -> None:
        raise RuntimeError("unreachable")


def test_batch_work_counts_by_its_deadlines_and_not_as_arrivals() -> None:
    loop = Loop(1, 1)
    loop.sampled(STAGE, STAGE)
    loop.clock.run_until(10.0)
    for number in range(12):
        loop.plane.submit(Request(number, "m", BATCH, 10.0, 5, deadline_s=3610.0))
    loop.plane.announce_batch("m", 7210.0, "batch", 700_000, 3_500_000, 2e7)
    loop.sampled(STAGE, STAGE, waiting=5)
    loop.clock.run_until(20.0)
    view, _ = loop.views[-1]
    assert (view.arrival_rate, view.waiting, view.waiting_interactive) == (0.0, 5, 0)
    assert view.batch_due == ((3600.0, 12.0), (7210.0, 700_000.0))
    for request in list(loop.instance.requests.values())[:8]:
        loop.plane.cancel(request)
    loop.clock.run_until(30.0)
    view, _ = loop.views[-1]
    assert view.batch_due[0] == (3600.0, 4.0)
