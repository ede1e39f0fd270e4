"""Pods that run are found, and go on, whichever gateway started them and whether or not the API server answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.fleet.kubernetes.pods import DELETION_COST
from chiron.fleet.kubernetes.source import CONSENT, CONSENTS, KubernetesSource
from chiron.fleet.kubernetes.testing.api import Refusal, shut
from chiron.fleet.kubernetes.watch import WatchSettings
from chiron.fleet.kubernetes.workload import CHEAPEST, Workload
from fleet_factory import until
from kubernetes_site import DEPLOYMENTS, PODS, PORT, cluster, every_cluster, workload
from pods_site import Site, fleet_on, told, until_told


@every_cluster
def test_pods_that_are_there_at_the_start_are_found_and_none_is_deleted(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        before = await here.cluster.ready()
        here.create(1)
        await here.ready(1)
        await until(lambda: here.kind.found == 2, "two are to be taken over")
        here.create(2, 3)
        assert here.kind.found == 0, "said once"
        await here.ready(2, 3)
        assert await here.cluster.ready() == before
        # The gateway ends; the next one finds all three.
        await here.fleet.close()
        assert await here.cluster.replicas() == 3
        async with fleet_on(here.cluster) as next_one:
            await until(lambda: next_one.kind.found == 3, "all are found again")
        assert await here.cluster.ready() == before
        assert here.heard.failed == []

    told(what, tmp_path, story, workload(replicas=3))


def test_the_next_gateway_goes_on_with_the_pods_that_run(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2, 3)
        await here.ready(1, 2, 3)
        urls = here.heard.urls
        await here.fleet.close()
        async with fleet_on(here.cluster) as later:
            # At once, before it knows what runs.
            assert later.adopt(3, urls[3])
            assert later.adopt(1, urls[1])
            assert later.adopt(9, f"http://10.255.255.1:{PORT}")
            assert not later.adopt(10, urls[1]), "it is claimed"
            assert not later.adopt(10, f"{urls[2]}1"), "no pod is at this port"
            assert not later.adopt(10, f"http://evil.example:{PORT}")
            later.create(4)
            await later.ready(1, 3, 4)
            assert later.heard.urls == {1: urls[1], 3: urls[3], 4: urls[2]}
            await until(lambda: later.heard.leaving == [9], "it is not there, and what runs there is not cut off")
            assert later.heard.failed == []
            assert not later.adopt(10, urls[1]), "it is in use"
            later.remove(9, 1)
            await here.cluster.until(later.scaled_to(2), "it is this gateway's to end")
            assert sorted(later.heard.ready) == [1, 3, 4]

    told("fake", tmp_path, story, workload(replicas=0))


def test_what_ends_while_the_api_server_is_silent_is_noticed(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        fake, pod = here.cluster.fake, await here.pod_of(1)
        assert fake is not None
        await here.fleet.close()
        fake.interfere = lambda method, path: Refusal(503, "", "busy") if path == PODS else None
        async with fleet_on(here.cluster) as later:
            assert later.adopt(1, here.heard.urls[1])
            await later.ready(1)
            await shut(here.cluster.container(pod).server)
            await later.failed(1)
            assert "it stopped answering" in later.heard.reasons[1]

    told("fake", tmp_path, story, workload(replicas=0))


@pytest.mark.parametrize("closing", [False, True])
def test_a_claim_that_finds_no_pod_and_one_whose_pod_closes_leave_its_replica_to_others(
    closing: bool, tmp_path: Path
) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2, 3)
        await here.ready(1, 2, 3)
        urls, fake = here.heard.urls, here.cluster.fake
        assert fake is not None
        third = await here.pod_of(3)
        await here.fleet.close()
        if closing:
            await here.cluster.client.delete(f"{PODS}/{third}", {"gracePeriodSeconds": 600})
            await here.cluster.until_ready(3)
        fake.requests.clear()
        fake.interfere = lambda method, path: Refusal(503, "", "busy") if path == PODS else None
        async with fleet_on(here.cluster) as later:
            stale = [f"http://10.255.255.1:{PORT}", f"http://10.255.255.2:{PORT}"]
            told = [urls[1], urls[2], *([urls[3]] if closing else stale)]
            for number, url in enumerate(told, 1):
                assert later.adopt(number, url)
            await until(lambda: fake.requests.count(("GET", PODS)) > 2, "it asks for pods again and again")
            fake.interfere = lambda method, path: None
            leaves = list(range(3, len(told) + 1))
            await until(lambda: sorted(later.heard.leaving) == leaves, "what cannot be used is left")
            await until(lambda: later.kind.found == 1, "the third replica is nobody's")
            later.remove(*leaves)
            later.create(9)
            await later.ready(1, 2, 9)
            assert (later.heard.urls[9] == urls[3], later.kind.found) == (not closing, 0)
            later.remove(9)
            await here.cluster.until(later.scaled_to(2), "it is this gateway's to end")
            written = [path for method, path in fake.requests if method == "PUT" and path.endswith("/scale")]
            assert len(written) == 1, "the number was not touched before that"

    told("fake", tmp_path, story, workload(replicas=0))


@pytest.mark.parametrize("drained", [True, False])
def test_what_runs_is_taken_over_when_consent_comes_back(drained: bool, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        async def label(value: str | None) -> None:
            await here.cluster.client.patch(f"{DEPLOYMENTS}/engine", {"metadata": {"labels": {CONSENT: value}}})

        here.create(1, 2)
        await here.ready(1, 2)
        before = await here.cluster.ready()
        fake = here.cluster.fake
        assert fake is not None
        fake.requests.clear()
        await label(None)
        await until(lambda: sorted(here.heard.leaving) == [1, 2], "both are drained")
        url = here.heard.urls[1]
        if drained:
            here.remove(1, 2)
            assert here.kind.found == 0, "they are not Chiron's"
            await until(lambda: here.adopt(7, url), "its address is free")
            await until(lambda: 7 in here.heard.leaving, "and may not be used")
            assert "cannot be used" in here.heard.reasons[7]
        await label(CONSENTS)
        await until(lambda: here.kind.found == 2, "both are to be taken over")
        if not drained:
            here.remove(1, 2)
        here.create(3, 4)
        await here.ready(3, 4)
        assert await here.cluster.ready() == before
        assert ("PUT", f"{DEPLOYMENTS}/engine/scale") not in fake.requests

    told("fake", tmp_path, story, workload(replicas=2), opt_in=True)


def test_pods_that_run_are_used_while_the_api_server_is_away(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        await here.fleet.close()
        fake = here.cluster.fake
        assert fake is not None
        await fake.stop()
        async with fleet_on(here.cluster) as later:
            assert later.adopt(1, here.heard.urls[1])
            assert later.adopt(9, f"http://10.255.255.1:{PORT}")
            await later.ready(1)
            await fake.start()
            await until(lambda: later.heard.leaving == [9], "now somebody says that it is not there")
            later.remove(1)
            await here.cluster.until(later.scaled_to(0), "it was this gateway's to end")
            assert later.heard.failed == []

    told("fake", tmp_path, story, workload(replicas=0))


def test_a_pod_that_closes_when_its_next_gateway_finds_it_is_left(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        (pod,) = await here.cluster.pods()
        await here.fleet.close()
        await here.cluster.client.delete(f"{PODS}/{pod['metadata']['name']}", {"gracePeriodSeconds": 600})
        async with fleet_on(here.cluster) as later:
            assert later.adopt(1, here.heard.urls[1])
            await until(lambda: later.heard.leaving == [1], "nothing new begins there")
            assert later.heard.failed == [], "it serves during preStop"
            (tmp_path / "go").touch()
            await until(lambda: later.heard.failed == [1], "it has ended")

    told("fake", tmp_path, story, workload(replicas=0, container={"lifecycle": until_told(tmp_path)}))


def test_pods_that_are_listed_together_are_looked_at_once(tmp_path: Path) -> None:
    looks: list[str] = []

    class Watched(Workload):
        def _assign(self) -> None:
            looks.append(self.name)
            super()._assign()

    async def run() -> None:
        async with cluster("fake", tmp_path, nodes=1, gpus=0) as here:
            await here.apply(workload(replicas=50))  # None of them finds a node.

            async def there() -> bool:
                return len(await here.pods()) == 50

            await here.until(there, "fifty pods are there")
            source = KubernetesSource(workload="deployment", name="engine")
            watched = Watched(source, here.client, "default")
            running = asyncio.get_running_loop().create_task(watched.run())
            await until(lambda: bool(watched.state().notes), "they are known")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert len(looks) < 20, looks

    asyncio.run(run())


def test_what_runs_is_known_a_while_after_all_pods_have_been_listed_and_not_before(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster("fake", tmp_path, nodes=1, gpus=0) as here:
            fake = here.fake
            assert fake is not None
            await here.apply(workload(replicas=1))
            fake.interfere = lambda method, path: Refusal(503, "", "busy") if path == PODS else None
            source = KubernetesSource(workload="deployment", name="engine")
            quick = WatchSettings(settle_s=1e-6, backoff_first_s=0.01)
            watched = Workload(source, here.client, "default", settings=quick)
            running = asyncio.get_running_loop().create_task(watched.run())
            await until(lambda: fake.requests.count(("GET", PODS)) > 2, "it asks for them again and again")
            assert not watched.state().known
            fake.interfere = lambda method, path: None
            await until(lambda: watched.state().known, "they are known")
            slow = Workload(source, here.client, "default")
            running_too = asyncio.get_running_loop().create_task(slow.run())
            await until(lambda: slow._listed, "all pods are known there, too")
            assert not slow.state().known
            for task in (running, running_too):
                task.cancel()
            await asyncio.gather(running, running_too, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("settle_s", [1e6, 1e-6])
def test_a_pod_that_goes_before_all_that_runs_is_known_leaves_its_replica_to_others(
    settle_s: float, tmp_path: Path
) -> None:
    async def run() -> None:
        async with cluster("fake", tmp_path) as here:
            fake = here.fake
            assert fake is not None
            await here.apply(workload(replicas=2))
            await here.until_ready(2)
            source = KubernetesSource(workload="deployment", name="engine")
            watched = Workload(source, here.client, "default", settings=WatchSettings(settle_s=settle_s))
            running = asyncio.get_running_loop().create_task(watched.run())
            left: list[str] = []
            first, second = (watched.hold(asyncio.Event(), left.append) for _ in range(2))
            goes = (await second.pod).name
            await first.pod
            await here.client.delete(f"{PODS}/{goes}")
            await until(lambda: left, "it is told that its pod goes")
            settling = settle_s > 1.0
            assert watched.state().found == settling
            watched.release(second)
            if settling:
                third = watched.hold(asyncio.Event(), left.append)
                assert (await third.pod).name != goes
                assert (watched.state().found, fake.requests.count(("PUT", f"{DEPLOYMENTS}/engine/scale"))) == (0, 0)
            else:  # As always: whoever decides may want another one or none.

                async def lower() -> bool:
                    return await here.replicas() == 1

                await here.until(lower, "one is asked for")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_a_mark_that_is_heard_of_when_its_pod_serves_an_instance_is_taken_back(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        here.create(1)
        await here.ready(1)
        name = await here.pod_of(1)
        fake.patch("pods", name, {"metadata": {"annotations": {DELETION_COST: str(CHEAPEST)}}})

        async def unmarked() -> bool:
            return DELETION_COST not in fake.get("pods", name)["metadata"].get("annotations", {})

        await here.cluster.until(unmarked, "the mark is taken back")

    told("fake", tmp_path, story, workload(replicas=1))


def test_an_api_server_that_restarts_changes_nothing_for_what_runs(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        here.create(1)
        await here.ready(1)
        await fake.stop()
        here.create(2)
        await here.said("the API server gave no answer")
        assert here.heard.failed == []
        await fake.start()
        await here.ready(2)
        await until(lambda: here.kind.notes == (), f"nothing is wrong any more: {here.kind.notes}")
        # Its answer to a write is lost, and the write is not: the number is Chiron's own.
        cut = []

        def lose(method: str, path: str) -> Refusal | None:
            if method == "PUT" and not cut:
                cut.append(path)
                fake.patch("deployments", "engine", {"spec": {"replicas": 3}})
                return Refusal(500, "InternalError", "the answer is lost")
            return None

        fake.interfere = lose
        here.create(3)
        await here.ready(3)
        assert cut
        assert not any("somebody else" in note for note in here.notes)

    told("fake", tmp_path, story, workload())
