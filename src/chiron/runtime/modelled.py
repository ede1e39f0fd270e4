"""Engines that are models: made for the instances of a modelled fleet, and scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from chiron.core.clock import VirtualClock
from chiron.core.ports import RemoteEngineEvents, Samples
from chiron.core.types import Instance, Sample
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.engines.remote import RemoteEngine, Wire


class ModelledEngines:
    """Makes them. ``listener``, the control plane, is set before the first."""

    listener: RemoteEngineEvents
    suspect: Callable[[Instance], None]
    """Asks the fleet to look at an instance; set as ``listener`` is, where there is a wire."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        profiles: Mapping[str, Profile],
        kv_transfer_gb_per_s: float,
        wire: Wire | None = None,
        step_mode: bool = False,
    ) -> None:
        """``profiles`` by kind of instance. ``wire``: between the control plane and every engine, as a gateway has it;
        None: they call each other directly, and only then ``step_mode`` may be off or on."""
        self.made: list[EngineModel | RemoteEngine] = []
        """Every engine there ever was."""
        self._by_id: dict[int, EngineModel | RemoteEngine] = {}
        self._clock = clock
        self._profiles = profiles
        self._times = {name: StepTable(profile) for name, profile in profiles.items()}
        self._bytes_per_s = kv_transfer_gb_per_s * 1e9
        self._wire = wire
        self._faults = {request: iter(faults) for request, faults in wire.faults.items()} if wire is not None else {}
        self._step_mode = step_mode

    def make(self, instance: Instance) -> EngineModel | RemoteEngine:
        profile, times = self._profiles[instance.kind.name], self._times[instance.kind.name]
        kv_seconds_per_token = profile.kv_bytes_per_token / self._bytes_per_s if self._bytes_per_s > 0 else 0.0
        engine: EngineModel | RemoteEngine
        if self._wire is None:
            engine = EngineModel(
                clock=self._clock,
                instance=instance,
                profile=profile,
                times=times,
                listener=self.listener,
                kv_seconds_per_token=kv_seconds_per_token,
                step_mode=self._step_mode,
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
    ) -> None:
        """``dated_when_taken``: as a gateway's samples are, where there is a wire; else when they were read."""
        self._clock = clock
        self._plane = plane
        self._engines = engines
        self._period_s = period_s
        self._delay_s = delay_s
        self._dated_when_taken = dated_when_taken

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
