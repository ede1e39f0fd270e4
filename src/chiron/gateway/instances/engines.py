"""Instances on their way between the control plane and the fleets: one fleet port over processes and endpoints, and
the engines of the instances that are ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chiron.control.plane import ControlPlane
from chiron.core.ports import Engine
from chiron.core.types import Instance, Request
from chiron.engines.rows import ENGINES
from chiron.fleet.local import LocalFleet, LocalFleetSettings, ProcessKind
from chiron.fleet.starts import KindStatus
from chiron.fleet.static import EndpointStatus, StaticFleet, StaticFleetSettings, StaticKind
from chiron.fleet.usage import ProcessUsage
from chiron.gateway.relay.admission import ServedModel
from chiron.gateway.relay.context_limit import UNTOLD, longest
from chiron.gateway.relay.upstream import HttpEngine
from chiron.gateway.settings import KindSettings
from chiron.net.clock import LiveClock


class Engines:
    """Implements the ``Fleet`` port towards the control plane and its listener towards the fleets."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        kinds: Sequence[KindSettings],
        models: Mapping[str, ServedModel],
        directory: Path,
        fleet: LocalFleetSettings,
        devices: Sequence[str],
        static_fleet: StaticFleetSettings | None = None,
        failed: Callable[[Instance, str], None] = lambda instance, reason: None,
    ) -> None:
        """``failed`` hears of each instance that failed, and why."""
        self.plane: ControlPlane | None = None
        """Set once it exists; it needs a fleet to be made."""
        self.live: dict[int, HttpEngine] = {}
        """Engines of ready and draining instances, by instance id."""
        self._clock = clock
        self._kinds = {each.kind.name: each for each in kinds}
        self._models = models
        self._failed = failed
        static = {each.kind.name: _static(each) for each in kinds if each.endpoints}
        started = {each.kind.name: _process(each) for each in kinds if each.command}
        self.local: LocalFleet | None = None
        self.static: StaticFleet | None = None
        if started:
            self.local = LocalFleet(
                clock=clock,
                kinds=started,
                attach=self._attach,
                directory=directory,
                settings=fleet,
                devices=devices,
            )
            self.local.listener = self
        if static:
            self.static = StaticFleet(clock=clock, kinds=static, attach=self._attach, settings=static_fleet)
            self.static.listener = self

    # -- the Fleet port ----------------------------------------------------------------------------------------

    def create(self, instance: Instance) -> None:
        self._fleet_of(instance).create(instance)

    def remove(self, instance: Instance) -> None:
        self._close(instance)
        self._fleet_of(instance).remove(instance)

    # -- what fleets report ------------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance, engine: Engine) -> None:
        assert isinstance(engine, HttpEngine)
        self.live[instance.id] = engine
        self.settle_context(instance.model)
        self._plane().instance_ready(instance, engine)

    def instance_failed(self, instance: Instance) -> None:
        self._close(instance)
        self._failed(instance, self._fleet_of(instance).reasons.get(instance.id, ""))
        self._plane().instance_failed(instance)

    # -- the rest ----------------------------------------------------------------------------------------------

    def suspect(self, instance: Instance) -> None:
        """Requests fail there: look at it now."""
        self._fleet_of(instance).suspect(instance)

    def usage(self) -> dict[int, ProcessUsage]:
        return self.local.usage() if self.local is not None else {}

    def starts(self) -> dict[str, KindStatus]:
        """How the starts of each kind go that the gateway starts itself."""
        return self.local.status() if self.local is not None else {}

    def endpoints(self) -> dict[str, dict[str, EndpointStatus]]:
        """How the engines are that run already, by kind and URL."""
        return self.static.status() if self.static is not None else {}

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
        for fleet in (self.local, self.static):
            if fleet is not None:
                await fleet.close()

    def _fleet_of(self, instance: Instance) -> LocalFleet | StaticFleet:
        fleet = self.static if self._kinds[instance.kind.name].endpoints else self.local
        assert fleet is not None
        return fleet

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
            sets_limit=self._plane().actuates,
        )
        engine.context_tokens = settings.context_tokens
        return engine

    def _close(self, instance: Instance) -> None:
        engine = self.live.pop(instance.id, None)
        if engine is not None:
            engine.close()
            engine.retire()

    def _plane(self) -> ControlPlane:
        assert self.plane is not None
        return self.plane


def _static(settings: KindSettings) -> StaticKind:
    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    return StaticKind(urls=settings.endpoints, health_path=ENGINES[settings.engine].health_path, headers=headers)


def _process(settings: KindSettings) -> ProcessKind:
    return ProcessKind(
        command=settings.command,
        env=settings.env,
        health_path=ENGINES[settings.engine].health_path,
        start_timeout_s=settings.start_timeout_s,
        stop_timeout_s=settings.stop_timeout_s,
        gpus=settings.devices,
        log_bytes_max=settings.log_bytes_max,
    )
