"""What instances may come from, as a union, and the fleets of its members as one fleet.

A member is a frozen dataclass that says how an instance of a kind comes to be. Besides that each has ``standing`` (how
many instances run whether Chiron wants them or not), ``instances_max`` (how many there can be; None: no bound of its
own), ``gpus`` (of this machine, for one instance) and ``summary`` (in a few words, for people).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from chiron.core.types import Instance
from chiron.fleet.endpoints import EndpointsFleet, EndpointsSource
from chiron.fleet.kubernetes.fleet import KubernetesFleet
from chiron.fleet.kubernetes.source import KubernetesSource
from chiron.fleet.port import Claim, FleetEnvironment, FleetReport, InstanceUsage, KindReport, LiveFleet, LiveSleepers
from chiron.fleet.process.fleet import ProcessFleet, ProcessSource
from chiron.fleet.ray.fleet import RayFleet
from chiron.fleet.ray.source import RaySource

Source = ProcessSource | EndpointsSource | KubernetesSource | RaySource

MEMBERS: Mapping[type[Any], Callable[[Mapping[str, Any], FleetEnvironment], LiveFleet]] = {
    ProcessSource: ProcessFleet,
    EndpointsSource: EndpointsFleet,
    KubernetesSource: KubernetesFleet,
    RaySource: RayFleet,
}
"""The fleet of each member."""
LASTING: frozenset[type[Any]] = frozenset({RaySource})
"""Members whose instances may outlive the config that named them: their fleet looks for those even if it has none."""


class UnionFleet:
    """Implements ``LiveFleet`` and ``LiveSleepers``: each kind of instance is left to the fleet of its source."""

    def __init__(self, sources: Mapping[str, Source], environment: FleetEnvironment) -> None:
        """``sources`` by InstanceKind.name. Raises ValueError or OSError for what cannot work."""
        self._fleets: list[LiveFleet] = []
        self._by_kind: dict[str, LiveFleet] = {}
        self._environment = environment
        for member, make in MEMBERS.items():
            own = {name: source for name, source in sources.items() if type(source) is member}
            if own or member in LASTING:
                fleet = make(own, environment)
                self._fleets.append(fleet)
                self._by_kind.update(dict.fromkeys(own, fleet))
        self.sleeping_kinds = frozenset(
            kind for fleet in self._fleets if isinstance(fleet, LiveSleepers) for kind in fleet.sleeping_kinds
        )

    def create(self, instance: Instance) -> None:
        self._by_kind[instance.kind.name].create(instance)

    def remove(self, instance: Instance) -> None:
        self._by_kind[instance.kind.name].remove(instance)

    def sleep(self, instance: Instance) -> None:
        fleet, environment = self._by_kind[instance.kind.name], self._environment
        if instance.kind.name in self.sleeping_kinds and isinstance(fleet, LiveSleepers):
            fleet.sleep(instance)
            return
        fleet.remove(instance)
        environment.clock.call_later(0.0, lambda: environment.events.instance_asleep(instance))

    def keep_asleep(self, kind: str, most: int) -> None:
        fleet = self._by_kind[kind]
        if isinstance(fleet, LiveSleepers):
            fleet.keep_asleep(kind, most)

    def suspect(self, instance: Instance) -> None:
        self._by_kind[instance.kind.name].suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        fleet = self._by_kind.get(kind)
        return fleet.adopt(kind, url) if fleet is not None else None

    def report(self) -> FleetReport:
        kinds: dict[str, KindReport] = {}
        usage: dict[int, InstanceUsage] = {}
        for fleet in self._fleets:
            report = fleet.report()
            kinds.update(report.kinds)
            usage.update(report.usage)
        return FleetReport(kinds=kinds, usage=usage)

    async def close(self, *, hands_over: bool = False) -> None:
        await asyncio.gather(*(fleet.close(hands_over=hands_over) for fleet in self._fleets))
