"""Instances on their way between the control plane and the fleet, and the engines of those that are ready."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from chiron.core.ports import FleetEvents, RemoteEngineEvents, RemoteFleetEvents, SleeperEvents
from chiron.core.types import Instance, Request
from chiron.fleet.port import FleetReport, LiveFleet, LiveFleetEvents, LiveSleepers
from chiron.gateway.instances.engine import Carrier, InstanceEngine, Placed
from chiron.gateway.relay.admission import ServedModel
from chiron.gateway.relay.context_limit import UNTOLD, longest
from chiron.gateway.relay.upstream import Upstream, address_of
from chiron.gateway.settings import KindSettings
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork

log = logging.getLogger("chiron.fleet")


class Elsewhere(Protocol):
    """Relays in other processes, which have connections of their own to every engine."""

    def carry(self, engine: InstanceEngine, placed: Placed) -> Carrier | None:
        """Who carries this there; None: it is carried here."""

    def instance_up(self, engine: InstanceEngine) -> None: ...
    def instance_gone(self, instance: Instance) -> None: ...


class Engines:
    """Implements the ports ``Fleet`` and ``Sleepers`` towards the control plane, and hears of instances from the
    fleet."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        kinds: Sequence[KindSettings],
        models: Mapping[str, ServedModel],
        make_fleet: Callable[[LiveFleetEvents], LiveFleet],
        network: MemoryNetwork | None = None,
        failed: Callable[[Instance, str], None] = lambda instance, reason: None,
    ) -> None:
        """``make_fleet`` makes the fleet that tells this of its instances; ``network`` has those of them whose address
        is in memory. ``failed`` hears of each instance that failed, and why."""
        self.listener: FleetEvents | None = None
        """Set once the control plane exists, as is ``events``, who hears what engines do: it needs a fleet to be
        made."""
        self.events: RemoteEngineEvents | None = None
        self.leaving: RemoteFleetEvents | None = None
        """Set with ``events``: who hears of instances that are taken away."""
        self.sleep_listener: SleeperEvents | None = None
        """Set with ``events``, where instances can sleep."""
        self.relays: Elsewhere | None = None
        """Set where there are any."""
        self.live: dict[int, InstanceEngine] = {}
        """Engines of ready and draining instances, by instance id."""
        self._clock = clock
        self._kinds = {each.kind.name: each for each in kinds}
        self._models = models
        self._failed = failed
        self._network = network
        self._numbers = itertools.count(1)
        self._upstreams: dict[int, Upstream] = {}
        """This process's own connections to the engines in ``live``."""
        self.fleet = make_fleet(self)

    # -- the Fleet port ----------------------------------------------------------------------------------------

    def create(self, instance: Instance) -> None:
        self.fleet.create(instance)

    def remove(self, instance: Instance) -> None:
        self._close(instance)
        self.fleet.remove(instance)

    # -- the Sleepers port -------------------------------------------------------------------------------------

    @property
    def sleeps(self) -> bool:
        """Whether there are instances that can."""
        return isinstance(self.fleet, LiveSleepers) and bool(self.fleet.sleeping_kinds)

    def sleep(self, instance: Instance) -> None:
        assert isinstance(self.fleet, LiveSleepers)
        self._close(instance)
        self.fleet.sleep(instance)

    def keep_asleep(self, kind: str, most: int) -> None:
        assert isinstance(self.fleet, LiveSleepers)
        self.fleet.keep_asleep(kind, most)

    # -- what the fleet tells ----------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance, url: str) -> None:
        engine = self.live.get(instance.id)  # One that was taken over, and has been found.
        self._listener().instance_ready(instance, engine or self.attach(instance, url))

    def instance_leaving(self, instance: Instance, reason: str) -> None:
        log.warning("instance %d of %s is drained: %s", instance.id, instance.model, reason)
        assert self.leaving is not None
        self.leaving.instance_leaving(instance)

    def instance_failed(self, instance: Instance, reason: str) -> None:
        self._close(instance)
        self._failed(instance, reason)
        self._listener().instance_failed(instance)

    def instance_asleep(self, instance: Instance) -> None:
        if self.sleep_listener is not None:
            self.sleep_listener.instance_asleep(instance)

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        if self.sleep_listener is not None:
            self.sleep_listener.kinds_asleep(asleep)

    # -- the rest ----------------------------------------------------------------------------------------------

    def attach(self, instance: Instance, url: str) -> InstanceEngine:
        """The engine of an instance that answers at this address."""
        engine = self.live[instance.id] = self._client(instance, url)
        if self.relays is not None:
            self.relays.instance_up(engine)
        self.settle_context(instance.model)
        return engine

    def number_from(self, first: int) -> None:
        """Of the placements from now on."""
        self._numbers = itertools.count(first)

    def suspect(self, instance: Instance) -> None:
        """Requests fail there: look at it now."""
        self.fleet.suspect(instance)

    def report(self) -> FleetReport:
        return self.fleet.report()

    def limited(self) -> dict[str, int]:
        """How many instances there can be now, by kind, where it is less than usual."""
        kinds = self.report().kinds
        return {name: kind.instances_max for name, kind in kinds.items() if kind.instances_max is not None}

    def found(self) -> dict[str, int]:
        """How many instances run that nobody has asked for, by kind."""
        return {name: kind.found for name, kind in self.report().kinds.items() if kind.found}

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
        placed = engine.runs.get(request.id) if engine is not None else None
        return placed.tokens if placed is not None else 0

    def watch(self, stall_s: float) -> None:
        """Once a second, posted."""
        for engine in list(self.live.values()):
            engine.watch()
        for upstream in list(self._upstreams.values()):
            upstream.watch(stall_s)

    async def close(self, *, hands_over: bool = False) -> None:
        for engine in list(self.live.values()):
            engine.close()
            await engine.origin.close()
        self.live.clear()
        await self.fleet.close(hands_over=hands_over)

    def _client(self, instance: Instance, url: str) -> InstanceEngine:
        settings, served = self._kinds[instance.kind.name], self._models[instance.model]

        def learn(request: Request, prompt_tokens: int) -> None:
            served.learn(request.payload.prompt_bytes, prompt_tokens)
            if engine.context_tokens and prompt_tokens > engine.context_tokens:
                engine.context_tokens = UNTOLD  # It took what it says that it cannot: what it says is wrong.
                self.settle_context(instance.model)

        def carry(placed: Placed) -> Carrier:
            far = self.relays.carry(engine, placed) if self.relays is not None else None
            return far if far is not None else upstream.carry(placed)

        assert self.events is not None
        engine = InstanceEngine(
            clock=self._clock,
            instance=instance,
            address=address_of(settings, instance.model, url),
            carry=carry,
            listener=self.events,
            suspect=self.suspect,
            learn_usage=learn,
            network=self._network,
            numbers=lambda: next(self._numbers),
        )
        upstream = self._upstreams[instance.id] = Upstream(
            clock=self._clock,
            address=engine.address,
            origin=engine.origin,
            reports=engine,
            counts=engine.observer,
        )
        engine.context_tokens = settings.context_tokens
        return engine

    def _close(self, instance: Instance) -> None:
        engine = self.live.pop(instance.id, None)
        if engine is not None:
            engine.close()
            engine.retire()
            del self._upstreams[instance.id]
            if self.relays is not None:
                self.relays.instance_gone(instance)

    def _listener(self) -> FleetEvents:
        assert self.listener is not None
        return self.listener
