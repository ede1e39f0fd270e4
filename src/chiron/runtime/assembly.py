"""Clock, fleet, journal and control plane joined, and begun: the same in a simulation, an emulation and a gateway.

They differ in what they put behind the ports: a virtual clock or one that follows real time, models of engines and
fleets or processes, endpoints and HTTP, a recorder or the event log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from chiron.control.actuators import Actuators
from chiron.control.autoscaler import Observer
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.ports import Ends, Engine, Fleet, FleetEvents, Journal, Sleepers
from chiron.core.types import Instance, ModelSpec, RequestClass
from chiron.policies.policy import Policy

Attach = Callable[[Instance], Engine]
"""The engine of an instance that has been up since before the start."""


class HeardFleet(Fleet, Protocol):
    """A fleet that tells a listener of its instances."""

    listener: FleetEvents | None
    """Set once the control plane exists; it needs a fleet to be made."""


class Loop(Protocol):
    """Something periodic besides the control plane's own loops: scrapes, failures that are due."""

    def begin(self) -> None: ...


class Assembly:
    """The parts that every run has."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        fleet: HeardFleet,
        journal: Journal,
        models: Sequence[ModelSpec],
        classes: Sequence[RequestClass],
        policy: Policy,
        ends: Ends | None = None,
        gpus_max: Mapping[str, int] | None = None,
        observer: Observer | None = None,
        actuators: Actuators | None = None,
        sleepers: Sleepers | None = None,
    ) -> None:
        """As ``ControlPlane``, which it makes."""
        self.clock = clock
        self.fleet = fleet
        self.models = tuple(models)
        self.plane = ControlPlane(
            clock=clock,
            fleet=fleet,
            journal=journal,
            ends=ends,
            models=models,
            classes=classes,
            policy=policy,
            gpus_max=gpus_max,
            observer=observer,
            actuators=actuators,
            sleepers=sleepers,
        )
        fleet.listener = self.plane

    def begin(self, initial: Mapping[str, int], *, attach: Attach | None = None, loops: Iterable[Loop] = ()) -> None:
        """The first instances of each model (``initial``, or as few as it may have), then every loop. They are up
        already if there is an ``attach``; else the fleet is asked for them. A live clock calls this in a ``post``."""
        for model in self.models:
            count = initial.get(model.name, model.min_instances)
            if attach is not None:
                self.plane.adopt(model.name, count, attach)
            else:
                self.plane.request_initial(model.name, count)
        if attach is not None:
            for model in self.models:
                self.plane.adopt_rest(model.name, attach)
        self.plane.begin()
        for loop in loops:
            loop.begin()
