"""Every live fleet keeps one contract, whatever its instances come from."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from child_processes import children
from chiron.core.types import Instance
from chiron.engines.profile_store import load_profile
from chiron.fleet.endpoints import EndpointsFleet, EndpointsSource
from chiron.fleet.health import RecoverySettings
from chiron.fleet.kubernetes.fleet import KubernetesFleet
from chiron.fleet.kubernetes.source import KubernetesSource
from chiron.fleet.model import ColdStart, Failures
from chiron.fleet.port import FleetEnvironment, KindReport, LiveFleet
from chiron.fleet.process.fleet import ProcessFleet, ProcessSource
from chiron.fleet.ray.fleet import RayFleet
from chiron.fleet.ray.instances import RayTimes
from chiron.fleet.ray.source import RaySource
from chiron.fleet.ray.testing import MemoryRay
from chiron.fleet.settings import FleetSettings
from chiron.fleet.starts import BackoffSettings
from chiron.fleet.union import MEMBERS, Source, UnionFleet
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork
from chiron.runtime.emulated import EmulatedFleet, wire
from fleet_factory import QUICK_HEALTH, Heard, an_instance, kill, until
from kubernetes_site import PORT, cluster, workload

EMULATED = (
    *(sys.executable, "-m", "chiron.engines.serve.emulated", "--port", "0"),
    *("--profile", "llama-3.1-8b/a100/tp1", "--served-model-name", "m"),
)
DEAD_URL = "http://127.0.0.1:9"
SETTINGS = FleetSettings(
    health=QUICK_HEALTH,
    backoff=BackoffSettings(backoff_max_s=600.0, crash_loop_starts=1),
    recovery=RecoverySettings(recover_first_s=0.05, recover_max_s=7.0),
    usage_period_s=0.1,
)
GOOD, BAD = "good", "bad"
"""Kinds of instances: one that works, one that cannot."""


@dataclass
class Site:
    fleet: LiveFleet
    heard: Heard
    kill_engine: Callable[[int], Any]
    """Of the instance with this number; by whoever runs it."""
    network: MemoryNetwork | None = None
    """Where its addresses are, if in memory."""

    def create(self, instance: Instance) -> None:
        """As the control plane does, like ``remove``."""
        self.heard.clock.post(lambda: self.fleet.create(instance))

    def remove(self, instance: Instance) -> None:
        instance.state = "gone"
        self.heard.clock.post(lambda: self.fleet.remove(instance))


def process_sources() -> dict[str, ProcessSource]:
    return {
        GOOD: ProcessSource(command=EMULATED, stop_timeout_s=2.0),
        BAD: ProcessSource(command=(sys.executable, "-c", "raise SystemExit('secret words')", "{port}")),
    }


def kubernetes_sources(kubeconfig: str) -> dict[str, KubernetesSource]:
    return {
        kind: KubernetesSource(workload="deployment", name=kind, port=PORT, kubeconfig=kubeconfig)
        for kind in (GOOD, BAD)
    }


def ray_sources() -> dict[str, RaySource]:
    return {
        GOOD: RaySource(command=EMULATED, resources={"GPU": 1.0}, stop_timeout_s=2.0),
        BAD: RaySource(command=(sys.executable, "-c", "raise SystemExit('secret words')", "{port}")),
    }


def endpoint_sources(url: str) -> dict[str, EndpointsSource]:
    return {GOOD: EndpointsSource(urls=(url,)), BAD: EndpointsSource(urls=(DEAD_URL,))}


def emulated_fleet(clock: LiveClock, heard: Heard) -> EmulatedFleet:
    return EmulatedFleet(
        clock=clock,
        events=heard,
        profiles={GOOD: load_profile("llama-3.1-8b/a100/tp1")},
        cold_start=ColdStart(node_start_s=0.0, model_load_s=0.05, warm_load_s=0.05, jitter=0.0),
        failures=Failures(),
        network=wire(clock, 0.0),
    )


@contextlib.asynccontextmanager
async def engine_of_somebody_else() -> AsyncIterator[tuple[str, int]]:
    engine = await asyncio.create_subprocess_exec(*EMULATED, stdout=asyncio.subprocess.PIPE)
    try:
        assert engine.stdout is not None
        line = b""
        while b"ready port=" not in line:
            line = await engine.stdout.readline()
        yield f"http://127.0.0.1:{line.decode().strip().partition('=')[2]}", engine.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            engine.kill()
        await engine.wait()


@contextlib.asynccontextmanager
async def site(what: str, directory: Path, *, engine: bool = True) -> AsyncIterator[Site]:
    """``engine``: one runs behind the good kind of a fleet that starts none itself."""
    async with contextlib.AsyncExitStack() as stack:
        clock = LiveClock(asyncio.get_running_loop())
        stack.callback(clock.stop)
        heard = Heard(clock)
        patience = replace(SETTINGS.recovery, bind_timeout_s=60.0 if engine else 0.5)
        settings = replace(SETTINGS, recovery=patience)
        environment = FleetEnvironment(clock=clock, events=heard, log_directory=directory, settings=settings)
        pid = 0
        fleet: LiveFleet
        if what == "process":
            fleet = ProcessFleet(process_sources(), environment)
        elif what == "kubernetes":
            directory.mkdir(exist_ok=True)
            here = await stack.enter_async_context(cluster("fake", directory))
            await here.apply(workload(name=GOOD))
            await here.apply(workload(name=BAD, container={"image": "missing/secret words"}))
            fleet = KubernetesFleet(kubernetes_sources(str(here.kubeconfig)), environment)
        elif what == "ray":
            ray = MemoryRay({"node": {"CPU": 4.0, "GPU": 1.0}}, directory)
            stack.push_async_callback(ray.close)
            fleet = RayFleet(ray_sources(), environment, connect=ray.connect, times=RayTimes(quick_s=0.02, calm_s=0.02))
        elif what == "emulated":
            emulated = fleet = emulated_fleet(clock, heard)
        else:
            url = DEAD_URL
            if engine:
                url, pid = await stack.enter_async_context(engine_of_somebody_else())
            if what == "endpoints":
                fleet = EndpointsFleet(endpoint_sources(url), environment)
            else:
                fleet = UnionFleet({GOOD: endpoint_sources(url)[GOOD], BAD: process_sources()[BAD]}, environment)
        stack.push_async_callback(fleet.close)
        if what == "kubernetes":
            # Of the pods one serves at a time.
            yield Site(
                fleet, heard, lambda number: [each.exit(1) for k in here.kubelets for each in k.containers.values()]
            )
        elif what == "ray":
            yield Site(
                fleet, heard, lambda number: [kill(pid) for name in ray.instances for pid in ray.engine_pids(name)]
            )
        elif what == "emulated":
            yield Site(fleet, heard, lambda number: clock.post(emulated.model.fail_one), emulated.network)
        else:
            yield Site(fleet, heard, lambda number: kill(pid or fleet.report().usage[number].pid))


def test_every_member_of_the_union_has_a_fleet_and_says_what_the_config_asks_of_it() -> None:
    assert set(MEMBERS) == set(get_args(Source))
    sources = process_sources(), endpoint_sources(DEAD_URL), kubernetes_sources(""), ray_sources()
    for source in (source for each in sources for source in each.values()):
        assert source.standing >= 0
        assert source.instances_max is None or source.instances_max >= source.standing
        assert source.gpus >= 0
        assert source.summary


every_fleet = pytest.mark.parametrize("what", ["process", "endpoints", "union", "kubernetes", "ray"])


@pytest.mark.parametrize("what", ["process", "endpoints", "union", "kubernetes", "ray", "emulated"])
def test_an_instance_is_ready_later_at_an_address_that_answers_until_its_engine_dies(what: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with site(what, tmp_path) as here:
            fleet, heard = here.fleet, here.heard
            first, second = an_instance(1, GOOD), an_instance(2, GOOD)
            here.create(first)
            assert not heard.ready, "a port's calls do not answer at once"
            await until(lambda: heard.ready == [1], "ready")
            assert first.state == "ready"
            origin = Origin(heard.urls[1], network=here.network)
            assert (await origin.fetch("GET", "/v1/models")).status == 200
            await origin.close()
            report = fleet.report().kinds.get(GOOD, KindReport())
            assert report == replace(report, trouble=None, instances_max=None)
            fleet.suspect(first)
            here.remove(first)
            here.remove(first)
            fleet.suspect(first)
            here.create(second)
            await until(lambda: heard.ready == [1, 2], "what it held is free for another")
            await until(lambda: what != "process" or 2 in fleet.report().usage, "its process is known")
            here.kill_engine(2)
            await until(lambda: heard.failed == [2], "its end is noticed")
            assert heard.reasons[2]
            fleet.suspect(second)
            here.remove(second)
            await fleet.close()
            await asyncio.sleep(0.05)
            assert (heard.ready, heard.failed) == ([1, 2], [2]), "nothing is heard of what is gone"

    asyncio.run(story())
    assert not children(), "nothing is left"


@every_fleet
def test_a_kind_that_cannot_come_says_why_and_is_not_tried_again_unasked(what: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with site(what, tmp_path, engine=False) as here:
            fleet, heard = here.fleet, here.heard
            assert fleet.report().kinds[BAD].trouble is None, "nobody has tried yet"
            here.create(an_instance(1, BAD))
            await until(lambda: heard.failed == [1], "failed")
            assert ("secret words" in heard.reasons[1]) or (DEAD_URL in heard.reasons[1])
            trouble = fleet.report().kinds[BAD].trouble
            assert trouble is not None
            assert trouble.retry_s > 0.0
            assert fleet.report().kinds[BAD].instances_max == 0
            assert trouble.reason
            assert "secret" not in trouble.reason, "what engines print is nothing to clients"
            assert "127.0.0.1" not in trouble.reason, "where engines are is nothing to clients"
            assert fleet.report().kinds[GOOD].trouble is None
            await asyncio.sleep(0.2)
            assert (heard.ready, heard.failed) == ([], [1]), "only the control plane asks for another"
            # Neither one that waits nor the close of the fleet is heard of.
            waiting = an_instance(2, BAD)
            here.create(waiting)
            await asyncio.sleep(0)
            here.remove(waiting)
            here.create(an_instance(3, BAD))
            await fleet.close()
            here.create(an_instance(4, BAD))
            await asyncio.sleep(0.05)
            assert (heard.ready, heard.failed) == ([], [1])

    asyncio.run(story())
