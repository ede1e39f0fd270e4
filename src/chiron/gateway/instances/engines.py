"""Instances on their way between the control plane and the fleet, and the engines of those that are ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from chiron.core.ports import FleetEvents, RemoteEngineEvents
from chiron.core.types import Instance, Request
from chiron.engines.rows import ENGINES
from chiron.fleet.port import FleetEnvironment, FleetReport
from chiron.fleet.settings import FleetSettings
from chiron.fleet.union import UnionFleet
from chiron.gateway.relay.admission import ServedModel
from chiron.gateway.relay.context_limit import UNTOLD, longest
from chiron.gateway.relay.upstream import HttpEngine
from chiron.gateway.settings import KindSettings
from chiron.net.clock import LiveClock


class InstanceEvents(FleetEvents, RemoteEngineEvents, Protocol):
    """Who hears of instances and of what they run: the control plane."""


class Engines:
    """Implements the ``Fleet`` port towards the control plane, and hears of instances from the fleet."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        kinds: Sequence[KindSettings],
        models: Mapping[str, ServedModel],
        directory: Path,
        settings: FleetSettings,
        devices: Sequence[str] = (),
        failed: Callable[[Instance, str], None] = lambda instance, reason: None,
    ) -> None:
        """``failed`` hears of each instance that failed, and why."""
        self.plane: InstanceEvents | None = None
        """Set once it exists; it needs a fleet to be made."""
        self.live: dict[int, HttpEngine] = {}
        """Engines of ready and draining instances, by instance id."""
        self._clock = clock
        self._kinds = {each.kind.name: each for each in kinds}
        self._models = models
        self._failed = failed
        environment = FleetEnvironment(
            clock=clock, events=self, log_directory=directory, settings=settings, devices=tuple(devices)
        )
        self.fleet = UnionFleet({each.kind.name: each.source for each in kinds}, environment)

    # -- the Fleet port ----------------------------------------------------------------------------------------

    def create(self, instance: Instance) -> None:
        self.fleet.create(instance)

    def remove(self, instance: Instance) -> None:
        self._close(instance)
        self.fleet.remove(instance)

    # -- what the fleet tells ----------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance, url: str) -> None:
        engine = self.live[instance.id] = self._attach(instance, url)
        self.settle_context(instance.model)
        self._plane().instance_ready(instance, engine)

    def instance_failed(self, instance: Instance, reason: str) -> None:
        self._close(instance)
        self._failed(instance, reason)
        self._plane().instance_failed(instance)

    # -- the rest ----------------------------------------------------------------------------------------------

    def suspect(self, instance: Instance) -> None:
        """Requests fail there: look at it now."""
        self.fleet.suspect(instance)

    def report(self) -> FleetReport:
        return self.fleet.report()

    def limited(self) -> dict[str, int]:
        """How many instances there can be now, by kind, where it is less than usual."""
        kinds = self.report().kinds
        return {name: kind.instances_max for name, kind in kinds.items() if kind.instances_max is not None}

    def urls(self) -> dict[int, str]:
        return {number: engine.url for number, engine in self.live.items()}

    def settle_context(self, model: str) -> None:
        """The longest that any engine of the model has; while it has none, what it was."""
        engines = [engine for engine in self.live.values() if engine.instance.model == model]
        if engines:
            self._models[model].context_tokens = longest(engine.context_tokens for engine in engines)

    def tokens_of(self, request: Request) -> int:
        """Output tokens seen so far of a request that an engine is still at."""
        engine = self.live.get(request.instance.id) if request.instance is not None else None
        run = engine.runs.get(request.id) if engine is not None else None
        return run.tokens if run is not None else 0

    async def close(self) -> None:
        for engine in list(self.live.values()):
            engine.close()
            await engine.origin.close()
        self.live.clear()
        await self.fleet.close()

    def _attach(self, instance: Instance, url: str) -> HttpEngine:
        settings, served = self._kinds[instance.kind.name], self._models[instance.model]

        def learn(request: Request, prompt_tokens: int) -> None:
            served.learn(request.payload.prompt_bytes, prompt_tokens)
            if engine.context_tokens and prompt_tokens > engine.context_tokens:
                engine.context_tokens = UNTOLD  # It took what it says that it cannot: what it says is wrong.
                self.settle_context(instance.model)

        engine = HttpEngine(
            clock=self._clock,
            instance=instance,
            url=url,
            row=ENGINES[settings.engine],
            listener=self._plane(),
            suspect=self.suspect,
            model=settings.served_model_name or instance.model,
            api_key=settings.api_key,
            learn_usage=learn,
        )
        engine.context_tokens = settings.context_tokens
        return engine

    def _close(self, instance: Instance) -> None:
        engine = self.live.pop(instance.id, None)
        if engine is not None:
            engine.close()
            engine.retire()

    def _plane(self) -> InstanceEvents:
        assert self.plane is not None
        return self.plane
