"""What a cluster's controllers do, for ``FakeKubernetes``: pods of Deployments and StatefulSets, placed on nodes.

As in the real one: surplus pods go in the order of a ReplicaSet (those without a node, pending, not ready, with the
lowest deletion cost, youngest), numbered ones from the end; a changed template is rolled out one pod at a time; GPUs
that a pod asks for are taken from its node, and a pod that fits nowhere is marked unschedulable.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import orjson

from chiron.fleet.kubernetes.pods import read_pod
from chiron.fleet.kubernetes.testing.api import FakeKubernetes, Object, Resource, now

GPU = "nvidia.com/gpu"
SETS = ("deployments", "statefulsets", "leaderworkersets")


class Controllers:
    """Acts a moment after each change."""

    def __init__(self, api: FakeKubernetes, *, schedule: bool = True) -> None:
        """``schedule``: whether pods are given nodes."""
        self._api = api
        self._schedule = schedule
        self._due = False
        self.paused = False
        """Nothing is done, as when a cluster's controllers are slow."""
        api.changed.append(self._changed)

    def _changed(self, resource: Resource, event: str, item: Object) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self.act)

    def act(self) -> None:
        self._due = False
        if self.paused:
            return
        for plural in SETS:
            for item in self._api.all(plural):
                self._shape(plural, item)
        if self._schedule:
            self._place()

    def _shape(self, plural: str, item: Object) -> None:
        api, meta, spec = self._api, item["metadata"], item["spec"]
        wanted = int(spec["replicas"])
        own = [pod for pod in api.all("pods") if any(o["uid"] == meta["uid"] for o in _owners(pod))]
        active = [pod for pod in own if not _is_ending(pod)]
        if plural == "deployments":
            self._shape_replica_set(item, wanted, active)
        else:
            self._shape_numbered(item, wanted, own, active)
        ready = sum(1 for pod in active if read_pod(pod).ready)
        status = {"replicas": len(active), "readyReplicas": ready, "observedGeneration": meta["generation"]}
        if {key: item.get("status", {}).get(key) for key in status} != status:
            api.patch(plural, meta["name"], {"status": status}, "status", meta["namespace"])

    def _shape_replica_set(self, item: Object, wanted: int, active: list[Object]) -> None:
        revision = _revision(item)
        new = [pod for pod in active if pod["metadata"]["labels"].get("pod-template-hash") == revision]
        old = [pod for pod in active if pod not in new]
        room = wanted + (1 if old else 0) - len(active)
        for _ in range(min(room, wanted - len(new))):
            self._make(item, f"{item['metadata']['name']}-{revision}", None)
        surplus = len(active) - wanted if not old else sum(1 for pod in new if read_pod(pod).ready) + len(old) - wanted
        going = sorted(old or new, key=_first_to_go)[: max(0, surplus)]
        for pod in going:
            self._api.delete(self._api._resource("pods"), pod)

    def _shape_numbered(self, item: Object, wanted: int, own: list[Object], active: list[Object]) -> None:
        name = item["metadata"]["name"]
        taken = {pod["metadata"]["name"] for pod in own}
        for ordinal in range(wanted):
            if f"{name}-{ordinal}" not in taken:
                self._make(item, name, f"{name}-{ordinal}")
        for pod in active:
            if int(pod["metadata"]["name"].rpartition("-")[2]) >= wanted:
                self._api.delete(self._api._resource("pods"), pod)

    def _make(self, item: Object, owner: str, name: str | None) -> None:
        meta, spec = item["metadata"], item["spec"]
        template = spec.get("template") or spec["leaderWorkerTemplate"]["workerTemplate"]
        labels = {**template.get("metadata", {}).get("labels", {}), "pod-template-hash": _revision(item)}
        kind = "ReplicaSet" if item["kind"] == "Deployment" else "StatefulSet"
        reference = {"apiVersion": "apps/v1", "kind": kind, "name": owner, "uid": meta["uid"], "controller": True}
        head: Object = {"labels": labels, "ownerReferences": [reference], "generateName": f"{owner}-"}
        if name is not None:
            head["name"] = name
        self._api.create(self._api._resource("pods"), meta["namespace"], {"metadata": head, "spec": template["spec"]})

    def _place(self) -> None:
        nodes = [node for node in self._api.all("nodes") if not node.get("spec", {}).get("unschedulable")]
        pods = self._api.all("pods")
        free = {
            node["metadata"]["name"]: int(node.get("status", {}).get("allocatable", {}).get(GPU, 0))
            - sum(_gpus(pod) for pod in pods if pod["spec"].get("nodeName") == node["metadata"]["name"])
            for node in nodes
        }
        for pod in pods:
            if pod["spec"].get("nodeName") or pod["metadata"].get("deletionTimestamp"):
                continue
            name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
            node_name = next((name for name, gpus in sorted(free.items()) if gpus >= _gpus(pod)), "")
            if node_name:
                free[node_name] -= _gpus(pod)
                self._api.patch("pods", name, {"spec": {"nodeName": node_name}}, "", namespace)
                condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}
            else:
                why = f"{len(nodes)} Insufficient {GPU}." if nodes else "no nodes."
                condition = {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": f"0/{len(nodes)} nodes are available: {why}",
                }
            if not _has(pod, condition):
                self._api.patch("pods", name, {"status": {"conditions": [condition]}}, "status", namespace)


def _has(pod: Object, condition: dict[str, Any]) -> bool:
    same = ("type", "status", "message")
    found = pod.get("status", {}).get("conditions", [])
    return any(all(each.get(key) == condition.get(key) for key in same) for each in found)


def _owners(pod: Object) -> list[Object]:
    owners: list[Object] = pod["metadata"].get("ownerReferences", [])
    return owners


def _is_ending(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp")) or pod["status"].get("phase") in ("Failed", "Succeeded")


def _revision(item: Object) -> str:
    template = item["spec"].get("template") or item["spec"].get("leaderWorkerTemplate")
    return hashlib.sha256(orjson.dumps(template, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]


def _gpus(pod: Object) -> int:
    if pod["status"].get("phase") in ("Failed", "Succeeded"):
        return 0
    limits = [container.get("resources", {}).get("limits", {}) for container in pod["spec"].get("containers", [])]
    return sum(int(each.get(GPU, 0)) for each in limits)


def _first_to_go(pod: Object) -> tuple[bool, bool, bool, int, int, float]:
    read = read_pod(pod)
    running = pod["status"].get("phase") == "Running"
    return read.scheduled, running, read.ready, read.cost, -read.restarts, -float(pod["metadata"]["resourceVersion"])
