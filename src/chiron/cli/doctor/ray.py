"""Whether the Ray clusters of a config answer, and have room for an instance of each kind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from chiron.cli.doctor.checks import FAIL, WARN, Check, check
from chiron.cli.ray import nodes_text

if TYPE_CHECKING:
    from chiron.fleet.ray.cluster import Answer
    from chiron.fleet.ray.source import RaySource
    from chiron.gateway.settings import ServeConfig


def ray_checks(config: ServeConfig) -> Iterator[Check]:
    from chiron.fleet.ray.source import RaySource

    places: dict[tuple[str, str, str], dict[str, RaySource]] = {}
    for model in config.models:
        for kind in model.kinds:
            if isinstance(source := kind.source, RaySource):
                places.setdefault((source.address, source.namespace, source.python), {})[kind.kind.name] = source
    for place, sources in places.items():
        yield from _cluster(place, sources)


def _cluster(place: tuple[str, str, str], sources: Mapping[str, RaySource]) -> Iterator[Check]:
    from chiron.fleet.ray.client import AgentClient
    from chiron.fleet.ray.cluster import Question, RayError

    address, namespace, python = place
    what = f"Ray {address}"

    async def ask() -> tuple[str, Answer]:
        client = AgentClient(address, namespace, python)
        try:
            answer = await client.ask(Question(holder="chiron-doctor"))
            return client.ray_version, answer
        finally:
            await client.close()

    try:
        version, answer = asyncio.run(ask())
    except RayError as error:
        hint = (
            "start it (ray start --head), correct ray.address, or set ray.python to a Python with the cluster's Ray; a "
            "cluster with tokens needs the same RAY_AUTH_MODE here (docs/ray.md)"
        )
        yield check(what, str(error), FAIL, hint)
        return
    yield check(what, f"version {version}, {nodes_text(answer)}")
    for kind, source in sources.items():
        yield room_check(kind, source, answer)
    if answer.instances:
        free = sum(1 for each in answer.instances if each.free)
        found = f"{len(answer.instances)} in namespace {namespace}, {free} of them of no gateway"
        yield check(f"{what}: instances", f"{found} (chiron ray list)")


def room_check(kind: str, source: RaySource, answer: Answer) -> Check:
    """Whether the nodes are large enough; what is in use does not count."""
    needs = source.needs
    fitting = [node for node in answer.nodes if all(node.resources.get(k, 0.0) >= v for k, v in needs.items())]
    wanted = ", ".join(f"{name} {amount:g}" for name, amount in sorted(needs.items()))
    found = f"needs {wanted}{f' on each of {source.nodes} nodes' if source.nodes > 1 else ''}; "
    if len(fitting) >= source.nodes:
        return check(f"room for {kind}", f"{found}{len(fitting)} of {len(answer.nodes)} nodes are large enough")
    hint = "Ray's autoscaler must add nodes, or correct gpus, cpus and resources of ray"
    return check(f"room for {kind}", f"{found}{len(fitting)} of {len(answer.nodes)} nodes are large enough", WARN, hint)
