"""A gateway before pods: the fleet goes up and down under load, and no request fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.policies.policy import Policy
from chiron.policies.registry import POLICIES, PolicyEntry
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from kubernetes_load import Load, emulated_pods, run_engine_on_loop
from kubernetes_site import PODS, PORT, Cluster, cluster, needs_kubernetes, workload
from live_gateway import serving, until


@dataclass(frozen=True, slots=True, kw_only=True)
class StairsSettings:
    """None."""


WANTED = [1]
"""How many instances there are to be, set by the tests; below 0: as many as there are."""


def decide_fleet(settings: StairsSettings, state: None, view: FleetView) -> tuple[FleetPlan, None]:
    plans = {}
    for model in view.models:
        count = WANTED[0] if WANTED[0] >= 0 else sum(model.planned.values())
        plans[model.name] = ModelPlan(counts={"mixed": count}, reason="stairs", numbers={})
    return plans, None


def make_stairs(settings: StairsSettings) -> Policy:
    return Policy(name="stairs", settings=settings, fleet=decide_fleet, fleet_period_s=0.1)


@pytest.fixture(autouse=True)
def stairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "stairs", PolicyEntry(settings=StairsSettings, make=make_stairs, about="as told"))


def config(kubeconfig: Path, most: int, scaler: str = "chiron", **more: str) -> str:
    lines = [f"{key} = {value}" for key, value in more.items()]
    return "\n".join(
        [
            'policy = "stairs"',
            "[models.m]",
            'engine = "openai"',
            "min_instances = 0",
            f"max_instances = {most}",
            "max_num_seqs = 64",
            *lines,
            "[models.m.kubernetes]",
            'deployment = "engine"',
            f"port = {PORT}",
            f'kubeconfig = "{kubeconfig}"',
            f'scaler = "{scaler}"',
        ]
    )


@contextlib.asynccontextmanager
async def gateway(here: Cluster, directory: Path, most: int, **more: str) -> AsyncIterator[Service]:
    directory.mkdir(exist_ok=True)
    async with serving(directory, config(here.kubeconfig, most, **more)) as service:
        yield service


def ready_count(service: Service) -> int:
    return sum(1 for each in service.engines.live.values() if each.instance.state == "ready")


async def climb(service: Service, count: int) -> float:
    """Seconds until there are so many."""
    began_s = time.monotonic()
    WANTED[0] = count
    await until(lambda: ready_count(service) == count == len(service.engines.live), f"{count} instances", 300.0)
    return time.monotonic() - began_s


def test_up_and_down_under_load_without_a_failed_request(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    hook = {"preStop": {"exec": {"command": ["sh", "-c", f"until [ -e {go} ]; do sleep 0.05; done"]}}}

    async def story() -> None:
        async with cluster("fake", tmp_path, run=run_engine_on_loop) as here:
            await here.apply(workload(replicas=0, container={"lifecycle": hook}))
            async with gateway(here, tmp_path / "a", 6) as service:
                WANTED[0] = 0
                load = Load(service.url, 8)  # From zero: they are held until there is an instance.
                await asyncio.sleep(0.1)
                for count in (1, 5, 2):
                    await climb(service, count)
                    sent = load.sent
                    await until(lambda sent=sent: load.sent > sent + 10, "requests go on")  # type: ignore[misc]
                # A pod that somebody deletes is replaced, and what runs there ends while its preStop hook waits.
                go.unlink()
                (pod, *_) = sorted(await here.ready())
                await here.client.delete(f"{PODS}/{pod}")
                await here.until_ready(2)
                await climb(service, 2)
                go.touch()
                sent = load.sent
                await until(lambda: load.sent > sent + 10, "requests go on")
                await load.stop()
                assert load.failures == []
                await climb(service, 0)
                await here.until_ready(0)

    asyncio.run(story())


def test_the_next_gateway_takes_over_what_the_last_one_left(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster("fake", tmp_path, run=run_engine_on_loop) as here:
            await here.apply(workload(replicas=0))
            async with gateway(here, tmp_path / "a", 6) as service:
                await climb(service, 3)
                fake = here.fake
                assert fake is not None
                said = lambda: [event["message"] for event in fake.all("events")]  # noqa: E731
                await until(lambda: any(each.endswith("3 replicas: stairs") for each in said()), "why it was scaled")
                WANTED[0] = -1
            before = await here.ready()
            assert len(before) == 3
            async with gateway(here, tmp_path / "b", 6) as service:
                await until(lambda: ready_count(service) == 3, "three are taken over")
                assert await here.ready() == before
                assert len(service.status()["models"][0]["instances"]) == 3

    asyncio.run(story())


async def follow_desired(here: Cluster, service: Service) -> None:
    """What KEDA does: asks for the number, and sets it; without a number it leaves all as it is."""
    origin = Origin(service.url)
    try:
        while True:
            answer = await origin.fetch("GET", "/chiron/desired?model=m")
            if answer.status == 200:
                await here.set_replicas(int(json.loads(answer.body)["desired"]))
            await asyncio.sleep(0.1)
    finally:
        await origin.close()


@pytest.mark.slow
def test_whoever_scales_by_the_desired_number_takes_the_fleet_up_and_down_without_a_failed_request(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        async with cluster("fake", tmp_path, run=run_engine_on_loop) as here:
            await here.apply(workload(replicas=2))
            await here.until_ready(2)
            async with gateway(here, tmp_path / "a", 6, scaler="external") as service:
                WANTED[0] = -1
                load = Load(service.url, 8)
                follower = asyncio.get_running_loop().create_task(follow_desired(here, service))
                await until(lambda: ready_count(service) == 2, "what runs is taken over")
                for count in (5, 1):
                    await climb(service, count)
                    await here.until_ready(count)
                    sent = load.sent
                    await until(lambda sent=sent: load.sent > sent + 10, "requests go on")  # type: ignore[misc]
                assert not follower.done()
                follower.cancel()
                await load.stop()
                assert load.failures == []

    asyncio.run(story())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fake", pytest.param("real", marks=needs_kubernetes)])
def test_one_to_twelve_to_three_with_emulated_engines_while_the_api_server_restarts(what: str, tmp_path: Path) -> None:
    async def story() -> None:
        container, run = emulated_pods(tmp_path)
        async with cluster(what, tmp_path, run=run) as here:
            await here.apply(workload(replicas=0, container=container))
            async with gateway(here, tmp_path / "a", 12) as service:
                first_s = await climb(service, 1)
                load = Load(service.url, 6)
                up_s = await climb(service, 12)
                WANTED[0] = 3
                await here.restart_api()
                down_s = await climb(service, 3)
                await here.until_ready(3)
                sent = load.sent
                await until(lambda: load.sent > sent + 10, "requests go on")
                await load.stop()
                assert load.failures == []
                times = f"to 1 in {first_s:.1f} s, to 12 in {up_s:.1f} s, to 3 in {down_s:.1f} s"
                print(f"\n{what}: {times}; {load.sent} requests")

    asyncio.run(story())
