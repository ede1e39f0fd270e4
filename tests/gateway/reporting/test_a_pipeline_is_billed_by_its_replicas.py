"""GPU-hours and cost of a live pipeline are those of its replicas, from when it says that it has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiron.control.actuators import NullActuators
from chiron.control.gpus import Gpus
from chiron.control.stages import StageLoop
from chiron.core.clock import VirtualClock
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Instance, InstanceKind, ModelSpec
from chiron.gateway.reporting.live_result import LiveRecorder
from chiron.policies.policy import Policy
from pipelines import CHAT, pipeline_kind, stage_kind

STAGES = pipeline_kind(
    stage_kind(0, min_replicas=2, initial_replicas=2, max_replicas=4), stage_kind(1, gpus=2, max_replicas=4)
)
KIND = InstanceKind(
    name="m/stages",
    gpu="a100",
    gpus=3,
    price_per_gpu_hour=0.0,
    kv_capacity_tokens=1000,
    max_num_seqs=8,
    pipeline=STAGES,
)
POLICY = Policy(name="p", settings=CHAT)
BEGAN_S, PRICE = 10.0, 2.0
AT_FIRST = 2 * 1 + 1 * 2


def recorded(*samples: tuple[float, tuple[int, int, int], tuple[int, int, int]]) -> LiveRecorder:
    """Of one pipeline; (ready, starting, draining) of each of its stages, from a time on."""
    recorder = LiveRecorder(models=[ModelSpec(name="m", kinds=(KIND,), max_instances=1)], classes=[CHAT])
    instance = Instance(1, "m", KIND, "mixed", BEGAN_S)
    recorder.instance_event(BEGAN_S, "created", instance)
    for at_s, *counts in samples:
        empty = StageSample(ready=0, starting=0, draining=0, busy_s=0.0, passes=0.0, tokens=0.0)
        stages = tuple(replace(empty, ready=r, starting=s, draining=d) for r, s, d in counts)
        instance.gpus = sum(sum(each) * stage.gpus for each, stage in zip(counts, STAGES.stages, strict=True))
        recorder.stages_sampled(instance, PipelineSample(taken_s=at_s, stages=stages, running=0, waiting=0))
    return recorder


def figures(recorder: LiveRecorder, now_s: float) -> tuple[float, float, int, int]:
    summary = recorder.result(now_s, policy=POLICY).summary
    (bill,) = recorder.billed(now_s).values()
    assert (bill.gpu_seconds, bill.cost) == (
        pytest.approx(summary["gpu_hours"] * 3600),
        pytest.approx(summary["cost"]),
    )
    return bill.gpu_seconds, bill.cost * 3600, summary["gpus_peak"], summary["instances_peak"]


def test_before_it_has_said_anything_by_the_least_that_it_has() -> None:
    assert figures(recorded(), 20.0) == (10 * AT_FIRST, 10 * AT_FIRST * PRICE, AT_FIRST, 1)


def test_by_what_is_ready_starts_or_drains_from_then_on() -> None:
    same = (12.0, (1, 1, 0), (1, 0, 0))
    grown, shrunk = (14.0, (2, 0, 0), (1, 2, 1)), (18.0, (1, 0, 0), (1, 0, 0))
    expected = 4 * AT_FIRST + 4 * 10 + 2 * 3
    assert figures(recorded(same, grown, shrunk), 20.0) == (expected, expected * PRICE, 10, 1)


def test_stages_have_prices_of_their_own() -> None:
    dearer = replace(STAGES, stages=(STAGES.stages[0], replace(STAGES.stages[1], price_per_gpu_hour=5.0)))
    recorder = LiveRecorder(models=[ModelSpec(name="m", kinds=(KIND,), max_instances=1)], classes=[CHAT])
    recorder.instance_event(0.0, "created", Instance(1, "m", replace(KIND, pipeline=dearer), "mixed", 0.0))
    (bill,) = recorder.billed(3600.0).values()
    assert bill.cost == pytest.approx(2 * 2.0 + 2 * 5.0)


def test_what_the_control_plane_did_not_believe_is_not_billed() -> None:
    recorder = recorded()
    (bill,) = recorder._alive.values()
    gpus = Gpus({"a100": 100})
    gpus.take(bill.instance, up=True)
    loop = StageLoop(
        clock=VirtualClock(),
        policy=POLICY,
        models={},
        instances={1: bill.instance},
        gpus=gpus,
        journal=recorder,
        actuators=NullActuators(),
    )
    few = StageSample(ready=2, starting=0, draining=0, busy_s=0.0, passes=0.0, tokens=0.0)
    for at_s, ready in ((12.0, 1 << 60), (14.0, 3), (18.0, 1025)):
        stages = (few, replace(few, ready=ready))
        sample = PipelineSample(taken_s=at_s, stages=stages, running=0, waiting=0)
        loop.sampled(bill.instance, sample)
        recorder.stages_sampled(bill.instance, sample)
    assert figures(recorder, 20.0)[0] == 4 * AT_FIRST + 6 * (2 + 3 * 2)
    assert gpus.room(KIND)


def test_the_bill_of_one_that_is_gone_is_closed() -> None:
    recorder = recorded((14.0, (2, 0, 0), (2, 0, 0)))
    (bill,) = recorder._alive.values()
    recorder.instance_event(16.0, "gone", bill.instance)
    assert figures(recorder, 99.0)[0] == 4 * AT_FIRST + 2 * 6
