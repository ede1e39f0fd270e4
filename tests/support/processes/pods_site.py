"""A fleet of pods on a cluster, the instances that it was asked for, and what it said of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiron.core.types import Instance
from chiron.fleet.kubernetes.fleet import KubernetesFleet
from chiron.fleet.kubernetes.source import KubernetesSource
from chiron.fleet.port import FleetEnvironment, KindReport
from chiron.net.clock import LiveClock
from fleet_factory import Heard, an_instance, quick_settings, until
from kubernetes_site import DEPLOYMENTS, PORT, Cluster, cluster

KIND = "engine"

START_MAX_S = 0.3

STATEFUL_SETS = "/apis/apps/v1/namespaces/default/statefulsets"


@dataclass
class Site:
    cluster: Cluster
    fleet: KubernetesFleet
    heard: Heard
    notes: list[str]
    instances: dict[int, Instance] = field(default_factory=dict)

    def create(self, *numbers: int) -> None:
        for number in numbers:
            instance = self.instances[number] = an_instance(number, KIND)
            self.heard.clock.post(lambda instance=instance: self.fleet.create(instance))  # type: ignore[misc]

    def adopt(self, number: int, url: str) -> bool:
        """One that another gateway has had; False: that cannot be."""
        claim = self.fleet.adopt(KIND, url)
        if claim is None:
            return False
        assert not claim.found, "its pod has yet to be found"
        instance = self.instances[number] = an_instance(number, KIND)
        instance.state = "ready"
        self.heard.clock.post(lambda: claim.begin(instance))
        return True

    def scaled_to(self, count: int) -> Callable[[], Awaitable[bool]]:
        async def there() -> bool:
            return await self.cluster.replicas() == count

        return there

    def remove(self, *numbers: int) -> None:
        for number in numbers:
            instance = self.instances.pop(number)
            instance.state = "gone"
            self.heard.clock.post(lambda instance=instance: self.fleet.remove(instance))  # type: ignore[misc]

    async def ready(self, *numbers: int) -> None:
        await until(lambda: set(numbers) <= set(self.heard.ready), f"{numbers} are ready, not {self.heard.ready}")

    async def failed(self, *numbers: int) -> None:
        await until(lambda: set(numbers) <= set(self.heard.failed), f"{numbers} have failed, not {self.heard.failed}")

    async def pod_of(self, number: int) -> str:
        address = self.heard.urls[number].removeprefix("http://").partition(":")[0]
        return next(p["metadata"]["name"] for p in await self.cluster.pods() if p["status"].get("podIP") == address)

    async def events(self) -> list[dict[str, Any]]:
        """Those that Chiron has written, in order."""
        items = (await self.cluster.client.get("/api/v1/namespaces/default/events"))["items"]
        ours = [item for item in items if item.get("source", {}).get("component") == "chiron"]
        return sorted(ours, key=lambda item: int(item["metadata"]["resourceVersion"]))

    async def told_of(self, *expected: tuple[str, str]) -> None:
        """Reasons and messages of all events so far."""

        async def there() -> bool:
            return [(event["reason"], event["message"]) for event in await self.events()] == list(expected)

        await self.cluster.until(there, f"these events are there: {expected}")

    async def said(self, words: str) -> None:
        await until(lambda: any(words in note for note in self.notes), f"{words!r} is said, not {self.notes}")

    @property
    def kind(self) -> KindReport:
        return self.fleet.report().kinds[KIND]


@contextlib.asynccontextmanager
async def fleet_on(here: Cluster, *, advise: bool = False, **source: Any) -> AsyncIterator[Site]:
    clock = LiveClock(asyncio.get_running_loop())
    heard, notes = Heard(clock), []
    given = {"workload": "deployment", "name": "engine", "port": PORT, "kubeconfig": str(here.kubeconfig), **source}
    environment = FleetEnvironment(
        clock=clock,
        events=heard,
        log_directory=Path("/nowhere"),
        settings=quick_settings(),
        advise=advise,
        noted=lambda kind, text: notes.append(text),
        why=lambda kind: f"the load of {kind}",
    )
    fleet = KubernetesFleet({KIND: KubernetesSource(**given)}, environment, unknown_s=0.5)
    try:
        yield Site(here, fleet, heard, notes)
    finally:
        await fleet.close()
        clock.stop()


def told(
    what: str,
    directory: Path,
    story: Callable[[Site], Awaitable[None]],
    item: dict[str, Any],
    *,
    path: str = DEPLOYMENTS,
    nodes: int = 2,
    gpus: int = 8,
    **source: Any,
) -> None:
    async def run() -> None:
        async with cluster(what, directory, nodes=nodes, gpus=gpus) as here:
            await here.apply(item, path)
            await here.until_ready(min(nodes * gpus, item["spec"]["replicas"]))
            async with fleet_on(here, **source) as site:
                await story(site)

    asyncio.run(run())


def until_told(directory: Path) -> dict[str, Any]:
    """A container's hooks: it serves on until there is a file ``go``, also when its pod is deleted."""
    return {"preStop": {"exec": {"command": ["sh", "-c", f"until [ -e {directory}/go ]; do sleep 0.05; done"]}}}
