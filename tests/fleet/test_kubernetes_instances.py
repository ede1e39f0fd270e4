"""Instances as pods: scaled, bound when ready, named before they go, and told apart when they do not come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import chiron
from chiron.fleet.kubernetes.access import from_kubeconfig
from chiron.fleet.kubernetes.client import ApiError, Client
from chiron.fleet.kubernetes.pods import DELETION_COST
from chiron.fleet.kubernetes.source import CONSENT
from chiron.fleet.kubernetes.testing.api import shut
from fleet_factory import until
from kubernetes_site import DEPLOYMENTS, PODS, PORT, PROGRAMS, cluster, every_cluster, workload
from pods_site import START_MAX_S, STATEFUL_SETS, Site, fleet_on, told, until_told
from real_kubernetes import kubeconfig
from yaml_loader import LOADER


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

    told(what, tmp_path, story, workload(container={"lifecycle": until_told(tmp_path)}))


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
