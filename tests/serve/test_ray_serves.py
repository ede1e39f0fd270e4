"""A gateway before engines on a real Ray cluster: up and down under load, nodes that come and go, kill -9."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from chiron.fleet.ray.client import AgentClient, AgentSettings
from chiron.fleet.ray.cluster import Question
from chiron.gateway.service import Service
from chiron.policies.policy import Policy
from chiron.policies.registry import POLICIES, PolicyEntry
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from fault_site import Api, FaultSite
from fleet_factory import until_sync
from kubernetes_load import Load
from live_gateway import serving, until
from ray_site import PATIENCE, RealRay, needs_ray, real_ray
from serve_trial import emulated, send, verdicts
from serve_trial import until as until_status

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_ray]
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StairsSettings:
    """None."""


WANTED = [1]
"""How many instances there are to be, set by the tests."""


def decide_fleet(settings: StairsSettings, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    plan = ModelPlan(counts={"mixed": WANTED[0]}, reason="stairs", numbers={})
    return {model.name: plan for model in view.models}, None


def make_stairs(settings: StairsSettings) -> Policy:
    return Policy(name="stairs", settings=settings, fleet=decide_fleet, fleet_period_s=0.1)


@pytest.fixture(scope="module")
def ray() -> Iterator[RealRay]:
    with real_ray() as cluster:
        cluster.add(2)
        yield cluster


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "stairs", PolicyEntry(settings=StairsSettings, make=make_stairs, about="as told"))
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)


def config(ray: RealRay, namespace: str, policy: str = "stairs", **keys: Any) -> str:
    table = f'ray = {{ address = "{ray.address}", namespace = "{namespace}", gpus = 1, on_stop = "remove" }}'
    # Engines end at once. So long may the gateway wait for it when it is stopped.
    bounds = {"min_instances": 0, "max_instances": 3, "stop_timeout": "120s", **keys}
    lines = [f"{name} = {json.dumps(value)}" for name, value in bounds.items()]
    return "\n".join([f'policy = "{policy}"', "[models.m]", emulated(), table, *lines, ""])


def ready_count(service: Service) -> int:
    return sum(1 for each in service.engines.live.values() if each.instance.state == "ready")


async def climb(service: Service, count: int) -> float:
    """Seconds until there are so many."""
    began_s = time.monotonic()
    WANTED[0] = count
    await until(lambda: ready_count(service) == count == len(service.engines.live), f"{count} instances", PATIENCE_S)
    return time.monotonic() - began_s


def listener(ray: RealRay, url: str) -> psutil.Process:
    """The engine at this address."""
    port = int(url.rpartition(":")[2])
    found = ray.processes("engines.serve.emulated")
    return next(each for each in found if port in listening(each))


def listening(process: psutil.Process) -> list[int]:
    return [each.laddr.port for each in process.net_connections() if each.status == psutil.CONN_LISTEN]


async def names(ray: RealRay, namespace: str) -> list[str]:
    """Of what is in the cluster."""
    patience = AgentSettings(connect_timeout_s=PATIENCE_S, answer_timeout_s=PATIENCE_S)
    client = AgentClient(ray.address, namespace, settings=patience)
    try:
        return [each.name for each in (await client.ask(Question(holder="test"))).instances]
    finally:
        await client.close()


def test_up_and_down_under_load_and_a_node_that_is_lost(ray: RealRay, tmp_path: Path) -> None:
    took: dict[str, float] = {}

    async def story() -> None:
        WANTED[0] = 0
        async with serving(tmp_path, config(ray, "stairs")) as service:
            api = Api(service.url)
            took["0 -> 1"] = await climb(service, 1)
            load = Load(service.url, 8, max_tokens=40)
            began_s = time.monotonic()
            WANTED[0] = 3
            # Two GPUs are there: the third instance is demand, until there is a node for it.
            (kind,) = service.engines.report().kinds
            notes = lambda: service.engines.report().kinds[kind].notes  # noqa: E731
            await until(lambda: ready_count(service) == 2 and notes(), "two have room", PATIENCE_S)
            assert "no node has room now: it needs CPU 1, GPU 1" in notes()[0]
            added_s = time.monotonic()
            node = await asyncio.to_thread(ray.add, 1)
            took["node added"] = time.monotonic() - added_s
            await climb(service, 3)
            took["1 -> 3, with the node"] = time.monotonic() - began_s
            live = service.engines.live
            await until(lambda: all(each.runs for each in live.values()), "requests run everywhere", PATIENCE_S)
            took["3 -> 1"] = await climb(service, 1)
            sent = load.sent
            await until(lambda: load.sent > sent + 8, "requests go on", PATIENCE_S)
            await load.stop()
            assert load.failures == []
            took["requests"] = load.sent
            await climb(service, 3)
            lost_s = time.monotonic()
            await asyncio.to_thread(ray.lose, node)
            await until(lambda: ready_count(service) == 2, "the node's instance is gone", PATIENCE_S)
            took["node lost, noticed"] = time.monotonic() - lost_s
            await until(lambda: notes() and "no node has room" in notes()[0], "another is asked for", PATIENCE_S)
            assert set(await verdicts(await send(api, 5.0, 1.0), PATIENCE_S)) == {"complete"}
            # An engine that is killed is replaced.
            before = set(live)
            listener(ray, next(iter(live.values())).url).kill()
            await until(lambda: ready_count(service) == 2 and set(live) != before, "another engine", PATIENCE_S)
            await api.origin.close()

    asyncio.run(story())
    assert asyncio.run(names(ray, "stairs")) == [], "nothing is left"
    until_sync(lambda: not ray.processes("engines.serve.emulated"), "its engines have ended")
    print(json.dumps(took))


def test_a_gateway_that_is_killed_leaves_its_engines_to_the_next(ray: RealRay, tmp_path: Path) -> None:
    bounds = {"min_instances": 2, "max_instances": 2}

    async def urls(api: Api) -> set[str]:
        status = await until_status(
            lambda status: status if all_ready(status, 2) else None, api, "two instances", PATIENCE_S
        )
        return {each["url"] for each in status["models"][0]["instances"]}

    async def story() -> None:
        with FaultSite(tmp_path, config(ray, "killed", policy="static", **bounds)) as site:
            api = Api(site.url)
            before = await urls(api)
            pids = {process.pid for process in ray.processes("engines.serve.emulated")}
            site.kill()
            began_s = time.monotonic()
            site.start()
            assert await urls(api) == before
            print(f"taken over in {time.monotonic() - began_s:.1f} s")
            assert {process.pid for process in ray.processes("engines.serve.emulated")} == pids
            assert set(await verdicts(await send(api, 5.0, 1.0), PATIENCE_S)) == {"complete"}
            await api.origin.close()
            site.stop(timeout_s=PATIENCE_S)

    asyncio.run(story())
    assert asyncio.run(names(ray, "killed")) == [], "a stop removes them, as configured"


def all_ready(status: dict[str, Any], count: int) -> bool:
    instances = status["models"][0]["instances"]
    return len(instances) == count and all(each["state"] == "ready" for each in instances)
