"""Engines that are models: made for the instances of a modelled fleet, and scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from chiron.core.clock import VirtualClock
from chiron.core.ports import RemoteEngineEvents, Samples, StageSamples
from chiron.core.types import Instance, Sample
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.pipeline import PipelineModel
from chiron.engines.pipeline_rounds import StageTimes
from chiron.engines.prefix_cache import PrefixCache
from chiron.engines.profile import Profile
from chiron.engines.remote import RemoteEngine, Wire
from chiron.fleet.model import FleetModel
from chiron.policies.policy import Composer
from chiron.policies.views import ReplicaView


class ModelledEngines:
    """Makes them. ``listener``, the control plane, is set before the first."""

    listener: RemoteEngineEvents
    suspect: Callable[[Instance], None]
    """Asks the fleet to look at an instance; set as ``listener`` is, where there is a wire."""
    fleet: FleetModel
    """Where replicas of stages come from; set as ``listener`` is, where there are pipelines."""
    samples: Samples
    """Hears of a pipeline's KV capacity; likewise."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        profiles: Mapping[str, Profile],
        kv_transfer_gb_per_s: float,
        stages: Mapping[str, Sequence[Profile]] | None = None,
        wire: Wire | None = None,
        step_mode: bool = False,
        prefix_cache: bool = False,
        compose: Callable[[str], Composer] | None = None,
        route: Callable[[Sequence[ReplicaView], int, int], int] | None = None,
    ) -> None:
        """``profiles`` by kind of instance; ``stages`` likewise, of those that are pipelines. ``wire``: between the
        control plane and every engine, as a gateway has it; None: they call each other directly, and only then
        ``step_mode`` may be off or on. ``compose`` makes the composer of an engine of a model, of a policy that has
        such a hook; ``route`` chooses replicas of stages, likewise. ``prefix_cache``: engines keep what programs'
        next prompts begin with."""
        if prefix_cache and (stages or wire is not None):
            raise ValueError("prefixes are kept by whole instances without a wire only")
        if stages and wire is not None:
            raise ValueError("pipelines of stages are simulated without a wire only")
        if compose is not None and (stages or wire is not None):
            raise ValueError("a policy that composes steps is simulated with whole instances and without a wire only")
        self.made: list[EngineModel | RemoteEngine] = []
        """Every engine there ever was."""
        self._by_id: dict[int, EngineModel | RemoteEngine] = {}
        self._clock = clock
        self._profiles = profiles
        self._times = {name: StepTable(profile) for name, profile in profiles.items()}
        self._stages = {name: [StageTimes(each) for each in parts] for name, parts in (stages or {}).items()}
        self._bytes_per_s = kv_transfer_gb_per_s * 1e9
        self._wire = wire
        self._faults = {request: iter(faults) for request, faults in wire.faults.items()} if wire is not None else {}
        self._step_mode = step_mode
        self._compose = compose
        self._prefix_cache = prefix_cache
        self._route = route

    def make(self, instance: Instance) -> EngineModel | RemoteEngine:
        profile, times = self._profiles[instance.kind.name], self._times[instance.kind.name]
        kv_seconds_per_token = profile.kv_bytes_per_token / self._bytes_per_s if self._bytes_per_s > 0 else 0.0
        engine: EngineModel | RemoteEngine
        if instance.kind.pipeline is not None:
            engine = self._make_pipeline(instance)
        elif self._wire is None:
            engine = EngineModel(
                clock=self._clock,
                instance=instance,
                profile=profile,
                times=times,
                listener=self.listener,
                kv_seconds_per_token=kv_seconds_per_token,
                step_mode=self._step_mode,
                composer=self._compose(instance.model) if self._compose is not None else None,
                prefixes=PrefixCache() if self._prefix_cache else None,
            )
        else:
            engine = RemoteEngine(
                clock=self._clock,
                instance=instance,
                profile=profile,
                times=times,
                listener=self.listener,
                kv_seconds_per_token=kv_seconds_per_token,
                wire=self._wire,
                faults=self._faults,
                suspect=self.suspect,
            )
        self.made.append(engine)
        self._by_id[instance.id] = engine
        return engine

    def _make_pipeline(self, instance: Instance) -> PipelineModel:
        stages, pipeline = self._stages[instance.kind.name], instance.kind.pipeline
        assert pipeline is not None
        # Each stage saves and restores its own part, all at the same time.
        kv_bytes = max(each.profile.kv_bytes_per_token for each in stages)
        engine = PipelineModel(
            clock=self._clock,
            instance=instance,
            kind=pipeline,
            profile=self._profiles[instance.kind.name],
            stages=stages,
            replicas=self.fleet.take_replicas(instance),
            source=self.fleet.replicas,
            listener=self.listener,
            capacity_told=self.samples.capacity_told,
            kv_seconds_per_token=kv_bytes / self._bytes_per_s if self._bytes_per_s > 0 else 0.0,
            step_mode=self._step_mode,
            route=self._route,
        )
        # Once the control plane knows it.
        self._clock.call_at(self._clock.now_s, engine.tell_capacity)
        return engine

    def of(self, instances: Iterable[int]) -> list[EngineModel | RemoteEngine]:
        """The engines of these instances."""
        return [self._by_id[instance] for instance in instances]


class Looked(Protocol):
    """An engine that can be scraped."""

    def look(self, seen: Callable[[Sample], None]) -> None: ...


class ModelScraper:
    """Every ``period_s``: samples of all engines to the control plane, ``delay_s`` after they were read."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        plane: Samples,
        engines: Callable[[], Iterable[Looked]],
        period_s: float,
        delay_s: float,
        dated_when_taken: bool = False,
        stages: StageSamples | None = None,
    ) -> None:
        """``stages`` hears of the stages of pipelines. ``dated_when_taken``: as a gateway's samples are, where there is
        a wire; else when they were read."""
        self._clock = clock
        self._plane = plane
        self._engines = engines
        self._period_s = period_s
        self._delay_s = delay_s
        self._dated_when_taken = dated_when_taken
        self._stages = stages

    def _dated(self, samples: list[Sample]) -> Iterator[Sample]:
        for sample in samples:
            now_s = self._clock.now_s
            yield replace(sample, taken_s=now_s) if self._dated_when_taken and sample.taken_s != now_s else sample

    def begin(self) -> None:
        """The first round one period from now."""
        self._clock.call_later(self._period_s, self._scrape)

    def _scrape(self) -> None:
        engines = list(self._engines())
        samples: list[Sample] = []
        if self._stages is not None:
            self._scrape_stages(self._stages, engines)

        def seen(sample: Sample) -> None:
            # As far as whoever asked can tell, it is of when the answer came.
            now_s = self._clock.now_s
            samples.append(sample if sample.taken_s == now_s else replace(sample, taken_s=now_s))
            if len(samples) == len(engines):
                tell()

        def tell() -> None:
            self._clock.call_later(self._delay_s, lambda: self._plane.sampled(self._dated(samples)))

        for engine in engines:
            engine.look(seen)
        if not engines:
            tell()
        self._clock.call_later(self._period_s, self._scrape)

    def _scrape_stages(self, stages: StageSamples, engines: Iterable[Looked]) -> None:
        for engine in engines:
            if isinstance(engine, PipelineModel):
                instance, sample = engine.instance, engine.stage_sample()
                self._clock.call_later(
                    self._delay_s,
                    lambda instance=instance, sample=sample: stages.stages_sampled(instance, sample),  # type: ignore[misc]
                )
