"""The API server in memory does what a real one does, where Chiron relies on it: one contract, held by both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from chiron.fleet.kubernetes.client import ApiError
from chiron.fleet.kubernetes.pods import DELETION_COST
from chiron.fleet.kubernetes.watch import Watch, WatchSettings
from kubernetes_site import DEPLOYMENTS, MODELS, PODS, Cluster, chiron_model, cluster, every_cluster, workload

LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
STATEFUL_SETS = "/apis/apps/v1/namespaces/default/statefulsets"


def told(what: str, directory: Path, story: Callable[[Cluster], Awaitable[None]], **more: Any) -> None:
    async def run() -> None:
        async with cluster(what, directory, **more) as here:
            await story(here)

    asyncio.run(run())


async def refused(call: Awaitable[Any]) -> tuple[int, str]:
    with pytest.raises(ApiError) as error:
        await call
    return error.value.status, error.value.reason


def lease(holder: str, **meta: str) -> dict[str, Any]:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "leader", **meta},
        "spec": {"holderIdentity": holder},
    }


@every_cluster
def test_objects_have_versions_and_stale_writes_are_conflicts(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        client = here.client
        first = await client.post(LEASES, lease("a"))
        assert await refused(client.post(LEASES, lease("b"))) == (409, "AlreadyExists")
        version = first["metadata"]["resourceVersion"]
        # Two that hold the same version: one of them wins.
        second = await client.put(f"{LEASES}/leader", lease("b", resourceVersion=version))
        assert second["metadata"]["resourceVersion"] != version
        assert await refused(client.put(f"{LEASES}/leader", lease("c", resourceVersion=version))) == (409, "Conflict")
        patched = await client.patch(f"{LEASES}/leader", {"metadata": {"annotations": {"x": "1", "y": "2"}}})
        assert patched["spec"]["holderIdentity"] == "b"
        patched = await client.patch(f"{LEASES}/leader", {"metadata": {"annotations": {"x": None}}})
        assert patched["metadata"]["annotations"] == {"y": "2"}
        stale = {"metadata": {"resourceVersion": version}, "spec": {"holderIdentity": "d"}}
        assert await refused(client.patch(f"{LEASES}/leader", stale)) == (409, "Conflict")
        assert await refused(client.get(f"{LEASES}/nobody")) == (404, "NotFound")
        wrong = {"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
        assert await refused(client.delete(f"{LEASES}/leader", wrong)) == (409, "Conflict")
        await client.delete(f"{LEASES}/leader")
        assert await refused(client.get(f"{LEASES}/leader")) == (404, "NotFound")

    told(what, tmp_path, story, nodes=0)


@every_cluster
def test_scale_is_a_view_of_the_workload(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        client, path = here.client, f"{DEPLOYMENTS}/engine/scale"
        made = await here.apply(workload(replicas=0))
        scale = await client.get(path)
        assert (scale["kind"], scale["spec"].get("replicas", 0)) == ("Scale", 0)
        assert scale["status"]["selector"] == "app=engine"
        await client.put(path, {**scale, "spec": {"replicas": 2}})
        assert await refused(client.put(path, {**scale, "spec": {"replicas": 3}})) == (409, "Conflict")
        item = await client.get(f"{DEPLOYMENTS}/engine")
        assert item["spec"]["replicas"] == 2
        assert item["metadata"]["generation"] > made["metadata"]["generation"]
        assert (await refused(client.patch(path, {"spec": {"replicas": -1}})))[0] == 422
        # Without a node their pods wait, and it is said why.

        async def unschedulable() -> bool:
            pods = await here.pods()
            conditions = [c for pod in pods for c in pod["status"].get("conditions", ()) if c["type"] == "PodScheduled"]
            return len(pods) == 2 and [c.get("reason") for c in conditions] == ["Unschedulable"] * 2

        await here.until(unschedulable, "two pods without a node")
        await client.patch(path, {"spec": {"replicas": 0}})

        async def none() -> bool:
            return not (await client.get(PODS))["items"]

        await here.until(none, "pods that run nowhere go at once")

    told(what, tmp_path, story, nodes=0)


@every_cluster
def test_a_watch_tells_every_change_and_begins_where_the_last_one_ended(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        client = here.client
        seen: dict[str, Mapping[str, Any]] = {}
        lists = []
        watch = Watch(
            client,
            LEASES,
            {"labelSelector": "for=us"},
            changed=lambda item: seen.__setitem__(item["metadata"]["uid"], item),
            gone=lambda uid: seen.__delitem__(uid),
            listed=lambda: lists.append(len(seen)),
            settings=WatchSettings(watch_s=1.0, late_s=60.0, page=2, backoff_first_s=0.01),
        )
        for number in range(5):
            await client.post(LEASES, lease("a", name=f"old-{number}", labels={"for": "us"}))  # type: ignore[arg-type]
        await client.post(LEASES, lease("a", name="not-ours"))
        running = asyncio.get_running_loop().create_task(watch.run())

        def names() -> list[str]:
            return sorted(item["metadata"]["name"] for item in seen.values())

        async def are(*wanted: str) -> None:
            async def so() -> bool:
                return names() == sorted(wanted)

            await here.until(so, f"{wanted}, not {names()}")

        old = [f"old-{number}" for number in range(5)]
        await are(*old)
        # For longer than a watch lasts, so that there are several.
        for number in range(4):
            await client.post(LEASES, lease("a", name=f"new-{number}", labels={"for": "us"}))  # type: ignore[arg-type]
            await are(*old, *(f"new-{n}" for n in range(number + 1)))
            await client.patch(f"{LEASES}/new-{number}", {"spec": {"holderIdentity": "b"}})
            await asyncio.sleep(0.3)

        async def all_changed() -> bool:
            return sorted(item["spec"]["holderIdentity"] for item in seen.values()) == ["a"] * 5 + ["b"] * 4

        await here.until(all_changed, "every change is told")
        await client.delete(f"{LEASES}/old-0")
        # One that no longer fits the selector is gone as well.
        await client.patch(f"{LEASES}/old-1", {"metadata": {"labels": None}})
        await are(*old[2:], *(f"new-{n}" for n in range(4)))
        assert lists == [5], "listed in pages, once"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    told(what, tmp_path, story, nodes=0)


@every_cluster
def test_pods_run_on_nodes_and_end_with_grace(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        mark = tmp_path / "stopped"
        hook = {"preStop": {"exec": {"command": ["touch", str(mark)]}}}
        await here.apply(workload(replicas=3, gpus=8, container={"lifecycle": hook}))

        async def two_run() -> bool:
            found = await here.pods()
            waiting = [pod for pod in found if not pod["spec"].get("nodeName")]
            said = [pod for pod in waiting if pod["status"].get("conditions")]
            return len(await here.ready()) == 2 and len(found) == 3 and len(waiting) == len(said) == 1

        await here.until(two_run, "two run, and the third finds no GPU")
        pods = await here.pods()
        (waiting,) = [pod for pod in pods if not pod["spec"].get("nodeName")]
        condition = next(c for c in waiting["status"]["conditions"] if c["type"] == "PodScheduled")
        assert condition["reason"] == "Unschedulable"
        assert "nvidia.com/gpu" in condition["message"]
        assert {pod["metadata"]["ownerReferences"][0]["kind"] for pod in pods} == {"ReplicaSet"}
        assert all(pod["metadata"]["ownerReferences"][0]["name"].startswith("engine-") for pod in pods)
        # Fewer replicas: the one without a node first, whatever the others cost to delete.
        await here.set_replicas(2)
        await here.until_ready(2)
        victim = sorted(await here.ready())[1]
        await here.client.patch(f"{PODS}/{victim}", {"metadata": {"annotations": {DELETION_COST: "-5"}}})
        await here.set_replicas(1)
        await here.until_ready(1)
        assert victim not in await here.ready()

        async def gone() -> bool:
            return len((await here.client.get(PODS))["items"]) == 1

        await here.until(gone, "its kubelet has confirmed it")
        assert mark.exists(), "preStop has run"

    told(what, tmp_path, story)


@every_cluster
def test_pods_of_a_stateful_set_are_numbered_and_go_from_the_end(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        await here.apply(workload("StatefulSet", replicas=3), STATEFUL_SETS)
        await here.until_ready(3)
        assert await here.ready() == {"engine-0", "engine-1", "engine-2"}
        await here.client.patch(f"{PODS}/engine-0", {"metadata": {"annotations": {DELETION_COST: "-5"}}})
        await here.set_replicas(2, path=STATEFUL_SETS)
        await here.until_ready(2)
        assert await here.ready() == {"engine-0", "engine-1"}
        (owner,) = (await here.pods())[0]["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["controller"]) == ("StatefulSet", "engine", True)

    told(what, tmp_path, story)


@every_cluster
def test_containers_that_end_are_restarted_and_images_that_are_missing_are_said(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        await here.apply(workload(name="broken", replicas=1, container={"image": "exits/7"}))
        await here.apply(workload(name="typo", replicas=1, container={"image": "missing/engine:v1"}))

        async def said() -> bool:
            text = json.dumps(await here.pods())
            return "CrashLoopBackOff" in text and '"restartCount": 2' in text and "ImagePullBackOff" in text

        await here.until(said, "both say what is wrong")

    told(what, tmp_path, story)


def test_a_version_that_is_too_old_is_expired_and_lists_bring_a_watch_up_to_date(tmp_path: Path) -> None:
    """In memory only: a real server forgets versions after five minutes."""

    async def story(here: Cluster) -> None:
        assert here.fake is not None
        seen: set[str] = set()
        lists = []
        watch = Watch(
            here.client,
            LEASES,
            {},
            changed=lambda item: seen.add(item["metadata"]["name"]),
            gone=lambda uid: seen.discard(names[uid]),
            listed=lambda: lists.append(set(seen)),
            settings=WatchSettings(backoff_first_s=0.01),
        )
        names = {}
        for name in ("a", "b"):
            names[(await here.client.post(LEASES, lease("x", name=name)))["metadata"]["uid"]] = name
        running = asyncio.get_running_loop().create_task(watch.run())

        async def watching() -> bool:
            return bool(here.fake and here.fake._watchers)

        await here.until(watching, "watching")
        # While nobody watches one goes, one comes, and the server forgets.
        await here.fake.stop()
        here.fake.delete(here.fake._resource("leases"), here.fake.get("leases", "a"))
        here.fake.create(here.fake._resource("leases"), "default", lease("x", name="c"))
        here.fake.expire()
        await here.fake.start()

        async def again() -> bool:
            return lists == [{"a", "b"}, {"b", "c"}]

        await here.until(again, "listed anew")
        # A bookmark keeps an idle watch from growing old: here another kind of object changes.
        await here.until(watching, "watching again")
        await here.apply(workload())

        async def up_to_date() -> bool:
            assert here.fake is not None
            here.fake.bookmark()  # Again: controllers may have more to change.
            return watch._version == str(here.fake._version)

        await here.until(up_to_date, "the bookmark is heard")
        here.fake.expire()
        here.fake.cut_watches()
        await here.until(watching, "watching once more")
        await asyncio.sleep(0.05)
        assert len(lists) == 2, "the bookmark's version was known"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    told("fake", tmp_path, story, nodes=0)


@every_cluster
def test_the_status_of_a_chiron_model_is_written_apart_from_what_is_wanted(what: str, tmp_path: Path) -> None:
    async def story(here: Cluster) -> None:
        await here.define_models()
        client, path = here.client, f"{MODELS}/m"
        made = await client.post(MODELS, {**chiron_model("m", "a"), "status": {"ready": 7}})
        assert made["metadata"]["generation"] == 1
        assert "status" not in made
        version = made["metadata"]["resourceVersion"]
        told = await client.patch(f"{path}/status", {"metadata": {"resourceVersion": version}, "status": {"ready": 1}})
        assert (told["status"], told["metadata"]["generation"]) == ({"ready": 1}, 1)
        stale = {"metadata": {"resourceVersion": version}, "status": {"ready": 2}}
        assert await refused(client.patch(f"{path}/status", stale)) == (409, "Conflict")
        changed = await client.patch(path, {"spec": {"minInstances": 2}, "status": {"ready": 9}})
        assert (changed["status"], changed["metadata"]["generation"]) == ({"ready": 1}, 2)
        gone = await client.patch(f"{path}/status", {"spec": {"minInstances": 3}, "status": {"ready": None}})
        assert (gone["status"], gone["spec"]["minInstances"]) == ({}, 2)
        if what == "real":
            for wrong, where in (
                ({"kinds": []}, "spec.kinds"),
                ({"kinds": [{"engine": "vllm"}]}, "spec.kinds"),
                ({"kinds": [{"engine": "vllm", "deployment": "A_b"}]}, "spec.kinds.deployment"),
                ({"minInstances": -1}, "spec.minInstances"),
                ({"classes": [{"name": "c", "kind": "odd"}]}, "spec.classes.kind"),
            ):
                with pytest.raises(ApiError, match=where) as error:
                    await client.post(MODELS, chiron_model("wrong", "a", **wrong))
                assert error.value.status == 422

    told(what, tmp_path, story, nodes=0)
