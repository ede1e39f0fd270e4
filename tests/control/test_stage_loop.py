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
from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request
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
    pipeline=pipeline_kind(stage_kind(0, max_replicas=3), stage_kind(1)),
)
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

    def __init__(self, *counts: int, actuators: Actuators | None = None) -> None:
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
            classes=[CHAT],
            policy=Policy(name="p", settings=None, stages=decide, stages_period_s=10.0),
            actuators=actuators,
        )
        self.plane.adopt("m", 1, lambda instance: self.world)
        (self.instance,) = self.plane.instances.values()
        self.plane.begin()

    def sampled(self, *stages: StageSample, **changes: Any) -> None:
        sample = PipelineSample(taken_s=self.clock.now_s, stages=stages, running=0, waiting=0)
        self.plane.stages_sampled(self.instance, replace(sample, **changes))


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
