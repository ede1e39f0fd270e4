"""The stage loop: replicas of each stage, where an instance is a pipeline.

Below the global loop: that says how many pipelines there are, this how many replicas each stage of each of them has.
A policy's ``stages`` hook decides for each pipeline by itself, over what the last scrape brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite, nan
from typing import Final, cast

from chiron.control.actuators import Actuators
from chiron.control.gpus import Gpus
from chiron.control.model import ModelState
from chiron.core.clock import VirtualClock
from chiron.core.ports import Journal, StagedEngine
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Decision, Instance, StageKind
from chiron.policies.policy import Policy, StagesHook
from chiron.policies.views import PipelineView, PolicyState, StagePlan, StageView

_REPLICAS_MAX: Final = 1024
"""Of a stage, in one state, that are believed where its plan allows fewer: a head takes no more. What it says is
billed, and held against the limit of GPUs."""
_START_MAX_S: Final = 86_400.0
"""A day, which is the longest that a replica's start may be given: policies keep what has happened since."""


class _Pipeline:
    """What the loop remembers of one."""

    __slots__ = ("held_back", "plan", "sample", "seen", "state")

    def __init__(self, sample: PipelineSample) -> None:
        self.sample = sample
        self.seen: PipelineSample | None = None
        """As of the last tick."""
        self.plan = tuple(stage.ready + stage.starting for stage in sample.stages)
        self.held_back: tuple[int, ...] = ()
        """What each stage wanted at the last tick and did not get; 0: it got it."""
        self.state: PolicyState = None


class StageLoop:
    """Ticks of the stages hook."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        policy: Policy,
        models: Mapping[str, ModelState],
        instances: Mapping[int, Instance],
        gpus: Gpus,
        journal: Journal,
        actuators: Actuators,
    ) -> None:
        self._clock = clock
        self._policy = policy
        self._models = models
        self._instances = instances
        self._gpus = gpus
        self._journal = journal
        self._actuators = actuators
        self._pipelines: dict[int, _Pipeline] = {}
        self._last_tick_s = 0.0
        self._arrived: dict[str, int] = {}
        """Of each model, as of the last tick."""

    def begin(self) -> None:
        self._last_tick_s = self._clock.now_s
        if self._policy.stages is not None:
            self._clock.call_later(self._policy.stages_period_s, self._tick)

    def sampled(self, instance: Instance, sample: PipelineSample) -> None:
        """A scrape of a pipeline. What does not fit its stages is dropped: it says nothing about them."""
        pipeline = instance.kind.pipeline
        if pipeline is None or len(sample.stages) != len(pipeline.stages) or not _sound(sample, pipeline.stages):
            return
        known = self._pipelines.get(instance.id)
        if known is None:
            known = self._pipelines[instance.id] = _Pipeline(sample)
        elif sample.taken_s >= known.sample.taken_s:
            known.sample = sample
        replicas = _replicas(known.sample)
        instance.gpus = sum(n * stage.gpus for n, stage in zip(replicas, pipeline.stages, strict=True))
        self._gpus.hold(instance, _at_most(known.plan, known.plan, known.sample))

    def plan_of(self, instance: Instance) -> tuple[int, ...]:
        """Replicas of each stage by the plan in force; empty: nothing is known of it."""
        known = self._pipelines.get(instance.id)
        return known.plan if known is not None else ()

    def _tick(self) -> None:
        hook = self._policy.stages
        assert hook is not None
        try:
            now_s = self._clock.now_s
            since_s, self._last_tick_s = now_s - self._last_tick_s, now_s
            rates = {name: self._rate(name, since_s) for name in self._models}
            gone = [number for number in self._pipelines if number not in self._instances]
            for number in gone:
                del self._pipelines[number]
            faults: list[Exception] = []
            for number, pipeline in self._pipelines.items():
                instance = self._instances[number]
                if instance.state == "ready":
                    try:
                        self._decide(hook, instance, pipeline, since_s, rates[instance.model])
                    except Exception as fault:  # One pipeline's must not be the others'.
                        faults.append(fault)
            if faults:
                raise ExceptionGroup("stages of a pipeline could not be decided about or scaled", faults)
        finally:  # Live, a faulty tick must not be the last one.
            self._clock.call_later(self._policy.stages_period_s, self._tick)

    def _rate(self, model: str, since_s: float) -> float:
        """Interactive arrivals per second since the last tick, less those that turned out not to run."""
        arrived = self._models[model].arrived_interactive
        before = self._arrived.get(model, 0)
        self._arrived[model] = arrived
        return max(0, arrived - before) / since_s if since_s > 0.0 else 0.0

    def _decide(self, hook: StagesHook, instance: Instance, pipeline: _Pipeline, since_s: float, rate: float) -> None:
        view = self._view(instance, pipeline, since_s, rate)
        plans, pipeline.state = hook(self._policy.stages_settings, pipeline.state, view)
        pipeline.seen = pipeline.sample
        kind = instance.kind.pipeline
        assert kind is not None
        assert len(plans) == len(kind.stages), "a plan for each stage"
        self._adopt(instance, pipeline, kind.stages, plans)

    def _adopt(
        self, instance: Instance, pipeline: _Pipeline, stages: Sequence[StageKind], plans: Sequence[StagePlan]
    ) -> None:
        before = pipeline.plan
        within = tuple(_within(stage, plan) for stage, plan in zip(stages, plans, strict=True))
        after = self._gpus.afforded(instance, before, within)
        if after != before:
            # What is to go has not gone before a scrape says so.
            self._gpus.hold(instance, _at_most(before, after, pipeline.sample))
            assert instance.engine is not None
            self._actuators.stages(cast(StagedEngine, instance.engine), after)
            pipeline.plan = after
        known = pipeline.held_back or (0,) * len(stages)
        pipeline.held_back = tuple(wanted if now != wanted else 0 for wanted, now in zip(within, after, strict=True))
        for number, (stage, plan) in enumerate(zip(stages, plans, strict=True)):
            held_back = pipeline.held_back[number]
            # That a stage gets nothing is said once, and not at every tick.
            if before[number] != after[number] or (held_back and held_back != known[number]):
                decision = Decision(
                    kind="stage",
                    subject=f"{instance.model}#{instance.id}/{stage.name}",
                    before=before[number],
                    after=after[number],
                    reason="gpus_limited" if held_back else plan.reason,
                    numbers=plan.numbers,
                )
                self._journal.decided(self._clock.now_s, decision)

    def _view(self, instance: Instance, pipeline: _Pipeline, since_s: float, rate: float) -> PipelineView:
        now_s, sample, seen = self._clock.now_s, pipeline.sample, pipeline.seen
        kind, state = instance.kind.pipeline, self._models[instance.model]
        assert kind is not None
        span_s = sample.taken_s - seen.taken_s if seen is not None else 0.0
        before: Sequence[StageSample | None] = seen.stages if seen is not None else [None] * len(kind.stages)
        stages = zip(kind.stages, pipeline.plan, sample.stages, before, strict=True)
        ready = sum(1 for each in state.instances.values() if each.state == "ready")
        return PipelineView(
            now_s=now_s,
            since_s=since_s,
            model=instance.model,
            instance=instance.id,
            kind=kind,
            stages=tuple(_stage_view(stage, planned, now, was, span_s) for stage, planned, now, was in stages),
            sample_age_s=now_s - sample.taken_s,
            running=sample.running,
            waiting=sample.waiting + -(-len(state.waiting) // ready),
            waiting_interactive=_interactive(instance, sample.waiting) + -(-state.waiting.interactive // ready),
            context_tokens=sample.context_tokens / sample.running if sample.running else 0.0,
            arrival_rate=rate / ready,
            batch_due=tuple((due_s, requests / ready) for due_s, requests in state.batch_due()),
            pipelines=sum(state.planned.values()),
            mixes=tuple(mix.view() for mix in state.learner.mixes.values()),
        )


def _stage_view(kind: StageKind, planned: int, now: StageSample, was: StageSample | None, span_s: float) -> StageView:
    utilisation, step_s, tokens = nan, nan, 0.0
    if was is not None and span_s > 0.0 and now.busy_s >= was.busy_s:
        passes = now.passes - was.passes
        utilisation = (now.busy_s - was.busy_s) / (span_s * max(1, now.ready))
        if passes > 0.0:
            step_s = (now.busy_s - was.busy_s) / passes
            tokens = max(0.0, now.tokens - was.tokens) / passes
    return StageView(
        kind=kind,
        planned=planned,
        ready=now.ready,
        starting=now.starting,
        draining=now.draining,
        utilisation=utilisation,
        step_s=step_s,
        batch_tokens=tokens,
        waiting=now.waiting,
        kv_used=now.kv_used_tokens / kind.kv_capacity_tokens,
        start_s=now.start_s if now.start_s > 0.0 else kind.start_s,
    )


def _interactive(instance: Instance, waiting: int) -> int:
    """Of the requests that wait inside an engine: by the share of them there, as it does not say which they are."""
    return waiting * instance.running_interactive // len(instance.requests) if instance.batch else waiting


def _replicas(sample: PipelineSample) -> list[int]:
    """Of each stage, in whatever state."""
    return [stage.ready + stage.starting + stage.draining for stage in sample.stages]


def _at_most(before: Sequence[int], after: Sequence[int], sample: PipelineSample) -> list[int]:
    """How many each stage may have at once, on its way from one plan to another: an engine may start a replica while
    another one drains, and what was there beyond the plan before goes as well."""
    return [
        max(was, now) + max(0, stage.ready + stage.starting - was) + stage.draining
        for was, now, stage in zip(before, after, sample.stages, strict=True)
    ]


def _within(stage: StageKind, plan: StagePlan) -> int:
    return min(max(plan.replicas, stage.min_replicas), stage.max_replicas)


def _sound(sample: PipelineSample, kinds: Sequence[StageKind]) -> bool:
    """What an engine says is believed only as far as it can be true."""
    return (
        isfinite(sample.taken_s)
        and sample.running >= 0
        and sample.waiting >= 0
        and 0.0 <= sample.context_tokens < inf
        and all(_sound_stage(stage, kind) for stage, kind in zip(sample.stages, kinds, strict=True))
    )


def _sound_stage(stage: StageSample, kind: StageKind) -> bool:
    sums = (stage.busy_s, stage.passes, stage.tokens, stage.waiting)
    replicas = (stage.ready, stage.starting, stage.draining)
    most = max(_REPLICAS_MAX, kind.max_replicas)
    return (
        all(0.0 <= each < inf for each in sums)
        and all(0 <= each <= most for each in replicas)
        and stage.kv_used_tokens >= 0
        and not stage.start_s > _START_MAX_S
    )
