"""Instances as pods: scaled, bound when ready, named before they go, and told apart when they do not come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import chiron
from chiron.core.types import Instance
from chiron.fleet.kubernetes.access import from_kubeconfig
from chiron.fleet.kubernetes.client import ApiError, Client
from chiron.fleet.kubernetes.fleet import KubernetesFleet
from chiron.fleet.kubernetes.pods import DELETION_COST
from chiron.fleet.kubernetes.source import CONSENT, CONSENTS, KubernetesSource
from chiron.fleet.kubernetes.testing.api import Refusal, shut
from chiron.fleet.kubernetes.watch import WatchSettings
from chiron.fleet.kubernetes.workload import CHEAPEST, Workload
from chiron.fleet.port import FleetEnvironment, KindReport
from chiron.net.clock import LiveClock
from fleet_factory import Heard, an_instance, quick_settings, until
from kubernetes_site import DEPLOYMENTS, PODS, PORT, PROGRAMS, Cluster, cluster, every_cluster, workload
from real_kubernetes import kubeconfig
from yaml_loader import LOADER

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


def _until_told(directory: Path) -> dict[str, Any]:
    """A container's hooks: it serves on until there is a file ``go``, also when its pod is deleted."""
    return {"preStop": {"exec": {"command": ["sh", "-c", f"until [ -e {directory}/go ]; do sleep 0.05; done"]}}}


@every_cluster
def test_replicas_follow_the_instances_up_from_zero_and_down_to_zero(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2, 3)
        await here.ready(1, 2, 3)
        assert await here.cluster.replicas() == 3
        assert len(set(here.heard.urls.values())) == 3
        # Whoever has been drained goes, also one that is neither the youngest nor the oldest.
        victim, stays = await here.pod_of(2), {await here.pod_of(1), await here.pod_of(3)}
        here.remove(2)
        await here.cluster.until_ready(2)
        assert await here.cluster.ready() == stays, victim
        here.remove(1, 3)
        await here.cluster.until_ready(0)
        assert await here.cluster.replicas() == 0
        assert (here.heard.failed, here.heard.leaving) == ([], [])

    told(what, tmp_path, story, workload(replicas=0))


@every_cluster
def test_a_start_that_is_no_longer_needed_is_cancelled_and_one_taken_back_costs_nothing(
    what: str, tmp_path: Path
) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1)  # There is one GPU: the second waits for another.
        await here.said("unschedulable")
        first = await here.pod_of(1)
        here.remove(2)
        await here.cluster.until_ready(1)
        assert await here.cluster.replicas() == 1
        assert await here.cluster.ready() == {first}
        # In one moment one goes and another comes: it gets the same pod, and nothing is scaled.
        here.remove(1)
        here.create(3)
        await here.ready(3)
        assert await here.pod_of(3) == first

    told(what, tmp_path, story, workload(replicas=0), nodes=1, gpus=1)


def test_a_workload_that_has_to_consent_is_neither_used_nor_scaled_before_and_left_after(tmp_path: Path) -> None:
    item = workload(replicas=1)
    label = item["metadata"].pop("labels")

    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.said("kubectl label deployment engine chiron-serving.io/scale=allowed")
        await until(lambda: here.kind.instances_max == 0, "it counts as absent")
        assert (here.kind.trouble and here.kind.trouble.reason) == "the cluster does not let Chiron scale it"
        assert (here.heard.ready, here.kind.found, await here.cluster.replicas()) == ([], 0, 1)
        await here.cluster.client.patch(f"{DEPLOYMENTS}/engine", {"metadata": {"labels": label}})
        await here.ready(1, 2)
        assert await here.cluster.replicas() == 2
        await here.cluster.client.patch(f"{DEPLOYMENTS}/engine", {"metadata": {"labels": {CONSENT: None}}})
        await until(lambda: sorted(here.heard.leaving) == [1, 2], "both are drained")
        here.remove(1, 2)
        here.create(3)
        await until(lambda: here.kind.instances_max == 0, "another one finds no pod")
        assert await here.cluster.replicas() == 2, "nobody scales it any more"

    told("fake", tmp_path, story, item, opt_in=True, start_timeout_s=START_MAX_S)


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

    told("fake", tmp_path, story, workload(replicas=0, container={"lifecycle": _until_told(tmp_path)}))


@every_cluster
def test_somebody_else_who_scales_is_noticed_and_not_fought(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2, 3)
        await here.ready(1, 2, 3)
        await here.cluster.set_replicas(4)
        await here.said("from 3 to 4")
        await here.cluster.until_ready(4)
        assert here.kind.found == 0, "it is theirs"
        here.create(4)  # Chiron needs another: there is one.
        await here.ready(4)
        assert await here.cluster.replicas() == 4
        # A cut: those who lose their pods hear of it while these still run, and no more than what is left is asked for.
        await here.cluster.set_replicas(2)
        await here.said("from 4 to 2")
        await until(lambda: len(here.heard.leaving) == 2, "two are told to leave")
        await here.failed(*here.heard.leaving)
        here.create(5, 6)
        assert here.kind.instances_max == 2
        await asyncio.sleep(0.3)
        assert await here.cluster.replicas() == 2
        # They give it back.
        await here.cluster.set_replicas(4)
        await here.ready(5, 6)
        assert here.kind.instances_max is None
        assert await here.cluster.replicas() == 4

    told(what, tmp_path, story, workload(replicas=0))


def test_after_a_while_chiron_asks_again_for_what_somebody_else_has_cut(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        await here.cluster.set_replicas(1)
        await until(lambda: len(here.heard.failed) == 1, "one is gone")
        here.create(3)
        await here.ready(3)
        assert await here.cluster.replicas() == 2

    told("fake", tmp_path, story, workload(replicas=0), yield_s=0.5)


@every_cluster
def test_what_keeps_a_start_is_told_apart(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.said("image: ImagePullBackOff")
        await here.failed(1)
        assert "missing/engine" in here.heard.reasons[1]
        await here.cluster.until_ready(0)

    told(what, tmp_path, story, workload(container={"image": "missing/engine"}))


@pytest.mark.parametrize(("image", "words"), [("exits/3", "crash loop"), ("exits/137", "out of memory")])
def test_an_engine_that_keeps_ending_is_a_start_that_failed(image: str, words: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.failed(1)
        assert words in here.heard.reasons[1]
        await here.said(words)
        assert any(words in note for note in here.kind.notes) or not await here.cluster.pods()
        await here.cluster.until_ready(0)
        assert await here.cluster.replicas() == 0, "it holds no GPU"
        starts = here.kind.starts
        assert starts is not None
        assert starts.failures == 1

    told("fake", tmp_path, story, workload(container={"image": image}))


def test_a_start_that_takes_too_long_counts_as_absent_and_still_comes(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        began_s = time.monotonic()
        here.create(1, 2)
        await here.ready(1)
        trouble = here.kind.trouble
        assert trouble is None or time.monotonic() - began_s >= START_MAX_S
        await until(lambda: here.kind.instances_max == 1, "the second does not count")

        def no_room() -> bool:
            trouble = here.kind.trouble
            return trouble is not None and trouble.reason == "no node has room for another instance"

        await until(no_room, "it is said why")
        assert any("unschedulable" in note and "nvidia.com/gpu" in note for note in here.kind.notes)
        assert here.heard.failed == []
        # A node comes.
        kubelet = here.cluster.kubelets[0]
        assert here.cluster.fake is not None
        here.cluster.fake.patch("nodes", kubelet._node, {"status": {"allocatable": {"nvidia.com/gpu": "2"}}}, "status")
        await here.ready(2)
        assert (here.kind.instances_max, here.kind.trouble) == (None, None)

    told("fake", tmp_path, story, workload(), nodes=1, gpus=1, start_timeout_s=START_MAX_S)


@every_cluster
def test_a_pod_that_somebody_deletes_is_left_before_it_ends(what: str, tmp_path: Path) -> None:
    """A drained node, a roll-out: its requests have until the end of the grace period."""

    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        pod = await here.pod_of(1)
        await here.cluster.client.delete(f"{PODS}/{pod}")
        await until(lambda: here.heard.leaving == [1], "it is told to leave")
        assert 1 not in here.heard.failed, "it serves during preStop"
        here.create(3)  # As the control plane does.
        (tmp_path / "go").touch()
        await here.ready(3)
        await here.failed(1)
        assert await here.cluster.replicas() in (2, 3)
        here.instances.pop(1)
        await here.cluster.until_ready(2)

    told(what, tmp_path, story, workload(container={"lifecycle": _until_told(tmp_path)}))


def test_an_engine_that_is_restarted_has_lost_its_requests(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        here.cluster.container(await here.pod_of(1)).exit(137)
        await here.failed(1)
        here.create(2)
        await here.ready(2)
        assert len(await here.cluster.pods()) == 1

    told("fake", tmp_path, story, workload())


def test_an_engine_that_does_not_answer_while_its_pod_is_ready_gets_another_pod(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        pod = await here.pod_of(1)
        await shut(here.cluster.container(pod).server)
        await here.failed(1)
        here.create(2)
        await here.ready(2)
        assert await here.pod_of(2) != pod
        await here.said("does not answer")

    told("fake", tmp_path, story, workload())


def test_a_pod_that_has_never_answered_as_an_engine_is_not_deleted(tmp_path: Path) -> None:
    """Whoever names a workload of somebody else's must not end its pods."""

    async def story(here: Site) -> None:
        here.create(1)
        await here.failed(1)
        assert [note for note in here.notes if "deleted" in note] == []

    told("fake", tmp_path, story, workload(replicas=1), port=PORT + 1, start_timeout_s=0.5)


@every_cluster
def test_a_stateful_set_moves_the_instance_of_its_last_pod_before_it_shrinks(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2, 3)
        await here.ready(1, 2, 3)
        numbers = {await here.pod_of(number): number for number in (1, 2, 3)}
        first, last = numbers["engine-0"], numbers["engine-2"]
        here.remove(first)
        await until(lambda: here.heard.leaving == [last], "the last one has to move")
        assert await here.cluster.replicas(path=STATEFUL_SETS) == 3
        here.create(4)  # In its place, as the control plane does.
        await here.ready(4)
        assert await here.pod_of(4) == "engine-0"
        assert len(await here.cluster.ready()) == 3, "it runs until it is drained"
        here.remove(last)
        await here.cluster.until_ready(2)
        assert await here.cluster.ready() == {"engine-0", "engine-1"}
        assert here.heard.failed == []

    told(
        what,
        tmp_path,
        story,
        workload("StatefulSet"),
        path=STATEFUL_SETS,
        workload="statefulset",
    )


@every_cluster
def test_where_another_scales_instances_wait_for_it_and_leave_marks_for_it(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1)
        await until(lambda: any("at 1 replicas; 2 are planned" in note for note in here.kind.notes), "it is said")
        assert await here.cluster.replicas() == 1
        await here.cluster.set_replicas(3)  # One more than anybody needs.
        await here.ready(1, 2)
        await here.cluster.until_ready(3)
        assert not any("somebody else" in note for note in here.kind.notes)
        victim = await here.pod_of(1)
        spare = (await here.cluster.ready() - {victim, await here.pod_of(2)}).pop()
        here.remove(1)

        async def marked() -> bool:
            pods = {pod["metadata"]["name"]: pod["metadata"] for pod in await here.cluster.pods()}
            costs = {name: int(meta.get("annotations", {}).get(DELETION_COST, 0)) for name, meta in pods.items()}
            return {name for name, cost in costs.items() if cost < 0} == {victim, spare}

        await until(lambda: here.kind.fewest == 1, "the others may go")
        assert await marked(), "both that are not needed are marked by then"
        assert await here.cluster.replicas() == 3
        await here.cluster.set_replicas(1)
        await here.cluster.until_ready(1)
        assert await here.cluster.ready() == {await here.pod_of(2)}
        assert not here.heard.failed
        # A cut below the plan is waited out, not fought.
        await here.cluster.set_replicas(0)
        await until(lambda: here.heard.failed, "its pod is gone")
        assert here.kind.instances_max is None

    told(what, tmp_path, story, workload(replicas=1), scaler="external")


async def scale_reads_meanwhile(here: Cluster) -> int:
    """How often the scale is read during thirty other requests, on the same loop as all else."""
    assert here.fake is not None
    here.fake.requests.clear()
    for _ in range(30):
        await here.pods()
    return sum(1 for method, path in here.fake.requests if method == "GET" and path.endswith("/scale"))


def test_a_number_that_has_to_wait_is_not_asked_for_in_a_loop(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        numbers = {await here.pod_of(number): number for number in (1, 2)}
        here.remove(numbers["engine-0"])
        await until(lambda: here.heard.leaving == [numbers["engine-1"]], "the last one has to move")
        assert await scale_reads_meanwhile(here.cluster) < 5

    told("fake", tmp_path, story, workload("StatefulSet"), path=STATEFUL_SETS, workload="statefulset")


def test_advice_for_more_than_runs_is_not_asked_for_in_a_loop(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1)
        assert await scale_reads_meanwhile(here.cluster) < 5

    told("fake", tmp_path, story, workload(replicas=1), advise=True)


def test_fewer_replicas_wait_until_pods_are_watched_again_and_no_longer(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        here.create(1, 2)
        await here.ready(1, 2)
        fake.interfere = lambda method, path: Refusal(503, "", "busy") if path == PODS else None
        fake.cut_watches()
        await here.said("its pods cannot be watched")
        here.remove(2)
        await until(lambda: fake.requests[-1][1].endswith("/scale"), "it looks")
        fake.interfere = lambda method, path: None

        async def scaled() -> bool:
            fake.bookmark()  # Nothing else is heard: no pod changes.
            return fake.get("deployments", "engine")["spec"]["replicas"] == 1

        await here.cluster.until(scaled, "one is left")

    told("fake", tmp_path, story, workload())


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


@every_cluster
def test_events_on_the_workload_say_how_it_was_scaled_and_why(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        up = ("ScaledUp", "0 -> 2 replicas: the load of engine")
        await here.told_of(up)
        here.remove(2)
        await here.cluster.until_ready(1)
        down = ("ScaledDown", "2 -> 1 replicas: the load of engine")
        await here.told_of(up, down)
        await here.cluster.set_replicas(3)
        others = ("ScaledByOthers", "somebody else has scaled it from 1 to 3 replicas")
        await here.told_of(up, down, others)
        workload_itself = await here.cluster.client.get(f"{DEPLOYMENTS}/engine")
        for event in await here.events():
            about = event["involvedObject"]
            assert (about["kind"], about["uid"]) == ("Deployment", workload_itself["metadata"]["uid"])
            assert event["type"] == ("Warning" if event["reason"] == "ScaledByOthers" else "Normal")

    told(what, tmp_path, story, workload(replicas=0))


def test_events_tell_whoever_scales_in_chirons_place_of_the_plan_and_advice_writes_none(tmp_path: Path) -> None:
    async def follows(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        here.create(2)
        plan = "2 instances are planned, where 1 replicas are asked for: the load of engine"
        await here.told_of(("Planned", plan))

    async def advises(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        here.create(1, 2)
        await here.ready(1)
        await here.cluster.set_replicas(2)
        await here.ready(2)
        assert not any(method != "GET" and "/events" in path for method, path in fake.requests)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    told("fake", tmp_path / "a", follows, workload(replicas=1), scaler="external")
    told("fake", tmp_path / "b", advises, workload(replicas=1), advise=True)


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


def test_conflicts_are_tried_again_and_refusals_are_said(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        left = [3]

        def conflict(method: str, path: str) -> Refusal | None:
            if method == "PUT" and left[0]:
                left[0] -= 1
                return Refusal(409, "Conflict", "the object has been modified")
            return None

        fake.interfere = conflict
        here.create(1)
        await here.ready(1)
        assert left == [0]
        fake.interfere = lambda method, path: Refusal(403, "Forbidden", "no scale") if method == "PUT" else None
        here.create(2)
        await here.said("403 Forbidden: no scale")
        await until(lambda: here.kind.trouble is not None, "clients hear of it")
        trouble = here.kind.trouble
        assert trouble is not None
        assert trouble.reason == "the cluster does not let Chiron scale it"
        fake.interfere = lambda method, path: None
        await here.ready(2)

    told("fake", tmp_path, story, workload(), start_timeout_s=0.2)


def test_advice_writes_nothing_and_takes_in_whatever_runs(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        fake.requests.clear()
        here.create(1)
        await here.ready(1)
        await until(lambda: here.kind.found == 1, "the other is found")
        here.create(2)
        await here.ready(2)
        await here.cluster.set_replicas(3)
        await until(lambda: here.kind.found == 1, "and the one that an autoscaler adds")
        here.create(3, 4)  # One more than there is.
        await here.ready(3)
        await here.cluster.set_replicas(4)
        await here.ready(4)
        assert here.kind.found == 0
        here.remove(4)
        await asyncio.sleep(0.1)
        mine = [each for each in fake.requests if each[0] != "GET" and "/scale" in each[1]]
        assert len(mine) == 2, "the test's own"
        assert await here.cluster.replicas() == 4

    told("fake", tmp_path, story, workload(replicas=2), advise=True)


def test_pods_of_others_that_fit_the_selector_are_not_used_and_marks_are_taken_back(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        assert here.cluster.controllers is not None

        async def canary_is_ready() -> bool:
            return any(name.startswith("engine-canary") for name in await here.cluster.ready())

        stranger = {
            "metadata": {"name": "stranger", "labels": {"app": "engine"}},
            "spec": {"containers": [{"name": "x"}]},
        }
        fake.create(fake._resource("pods"), "default", stranger)
        # Another Deployment, with the same labels and the same beginning of its name.
        await here.cluster.apply(workload(replicas=1) | {"metadata": {"name": "engine-canary"}})
        await here.cluster.until(canary_is_ready, "it is ready")
        here.create(1, 2)
        await here.ready(1, 2)
        used = {await here.pod_of(1), await here.pod_of(2)}
        assert not any(name.startswith(("stranger", "engine-canary")) for name in used)
        # While the workload's controller is slow the one that was marked is needed again.
        here.cluster.controllers.paused = True
        victim = await here.pod_of(2)
        here.remove(2)

        def cost() -> object:
            return fake.get("pods", victim)["metadata"].get("annotations", {}).get(DELETION_COST)

        await until(lambda: fake.get("deployments", "engine")["spec"]["replicas"] == 1, "scaled")
        assert cost() is not None
        here.create(3)
        await until(lambda: fake.get("deployments", "engine")["spec"]["replicas"] == 2, "scaled back")
        await here.ready(3)
        assert await here.pod_of(3) == victim
        await until(lambda: cost() is None, "its mark is gone")

    told("fake", tmp_path, story, workload())


@pytest.mark.kubernetes
@pytest.mark.skipif(not PROGRAMS, reason="CHIRON_TEST_KUBERNETES names no programs")
def test_the_role_that_ships_allows_what_chiron_does_and_nothing_else(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster("real", tmp_path) as here:
            text = (Path(chiron.__file__).parent / "data/deploy/kubernetes/chiron.yaml").read_text()
            by_kind = {item["kind"]: item for item in yaml.load_all(text, LOADER)}
            rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
            binding = by_kind["RoleBinding"]
            binding["subjects"] = [{"kind": "User", "name": "chiron", "apiGroup": "rbac.authorization.k8s.io"}]
            await here.client.post(f"{rbac}/roles", by_kind["Role"])
            await here.client.post(f"{rbac}/rolebindings", binding)
            await here.apply(workload(name="vllm"))
            await here.apply(workload(name="other"))
            assert here.plane is not None
            limited = kubeconfig(tmp_path / "limited", here.plane.url, "chirontok")
            async with fleet_on(replace(here, kubeconfig=limited), name="vllm") as site:
                site.create(1, 2)
                await site.ready(1, 2)
                site.remove(2)
                await here.until_ready(1)
                pod = await site.pod_of(1)
                client = Client(from_kubeconfig(limited))
                await client.delete(f"{PODS}/{pod}")
                for call in (
                    client.get(f"{DEPLOYMENTS}/other/scale"),
                    client.delete(f"{DEPLOYMENTS}/vllm"),
                    client.get("/api/v1/namespaces/default/secrets"),
                    client.get("/api/v1/nodes"),
                ):
                    with pytest.raises(ApiError, match="403 Forbidden"):
                        await call
                await client.close()
                assert not any("403" in note for note in site.notes)
                await here.until(site.events, "it may write events")

    asyncio.run(run())
