"""The chart, installed, upgraded, rolled back and uninstalled by Helm on a real control plane, with the gateway and its
engines as real processes, the gateway with the rights that the chart gives it and no others.

The control plane is 1.20: the chart wants 1.22 (pod deletion cost), and a PodDisruptionBudget has policy/v1 since 1.21
only. So a copy of the chart takes any version, and the budget is left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chiron.fleet.kubernetes.testing.kubelet import Container, ProcessContainer, run_process
from chiron.net.client import NetError, Origin
from kubernetes_load import Load, emulated_pods
from kubernetes_site import DEPLOYMENTS, MODELS, PORT, Cluster, chiron_model, cluster, needs_kubernetes, workload
from real_kubernetes import kubeconfig
from render_manifests import CHART

helm_python = pytest.importorskip("helm_python")
pytestmark = [*needs_kubernetes, pytest.mark.slow]

CORE = "/api/v1/namespaces/default"
GATEWAY_PORT = 8080
DISK = {
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "metadata": {"name": "disk"},
    "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/nowhere"}},
}
BASE: dict[str, Any] = {
    "podDisruptionBudget": {"enabled": False},
    "storage": {"size": "1Gi"},
    "resources": {"requests": {"cpu": "1"}},
}
OF_FILE: dict[str, Any] = {
    **BASE,
    "config": {
        "models": {
            "llama-3.1-8b": None,
            "m": {"engine": "openai", "min_instances": 1, "kubernetes": {"deployment": "engine", "port": PORT}},
        }
    },
}
OF_RESOURCES: dict[str, Any] = {**BASE, "config": {"kubernetes": {}, "models": {"llama-3.1-8b": None}}}


def chart(directory: Path) -> Path:
    copied = directory / "chart" / "chiron"
    shutil.copytree(CHART, copied)
    about = copied / "Chart.yaml"
    about.write_text(about.read_text().replace('kubeVersion: ">=1.22.0-0"\n', ""))
    return copied


class Node:
    """Runs pods of the gateway's image with what their volumes and their service account give them."""

    def __init__(self, directory: Path) -> None:
        self.here: Cluster | None = None
        self._directory = directory
        self._others = run_process(directory)

    async def run(self, pod: Mapping[str, Any], address: str) -> Container:
        container = pod["spec"]["containers"][0]
        if not container["image"].startswith("chiron:"):
            return await self._others(pod, address)
        assert self.here is not None
        assert self.here.plane is not None
        client, account = self.here.client, pod["spec"]["serviceAccountName"]
        folders = {}
        for volume in pod["spec"]["volumes"]:
            folder = self._directory / volume.get("persistentVolumeClaim", {}).get("claimName", pod["metadata"]["name"])
            folders[volume["name"]] = folder / volume["name"]
            folders[volume["name"]].mkdir(parents=True, exist_ok=True)
            if name := volume.get("configMap", {}).get("name"):
                for key, text in (await client.get(f"{CORE}/configmaps/{name}"))["data"].items():
                    (folders[volume["name"]] / key).write_text(text)
        wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        token = await client.post(f"{CORE}/serviceaccounts/{account}/token", wanted)
        access = kubeconfig(folders["tmp"] / "kubeconfig", self.here.plane.url, token["status"]["token"])
        mounts = {mount["mountPath"]: str(folders[mount["name"]]) for mount in container["volumeMounts"]}
        words = [
            next((to + w.removeprefix(at) for at, to in mounts.items() if w.startswith(at)), w)
            for w in container["args"]
        ]
        with (self._directory / f"{pod['metadata']['name']}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chiron", *words, "--host", address),
                env={**os.environ, "KUBECONFIG": str(access)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return ProcessContainer(process)


async def gateway_of(here: Cluster, model: str) -> str:
    """Where the gateway's one pod listens, once it serves this model and an instance of it."""
    found: list[str] = []

    async def there() -> bool:
        pods = [pod for pod in await here.pods() if pod["spec"].get("serviceAccountName") == "chiron"]
        if len(pods) != 1 or not pods[0]["status"].get("podIP"):
            return False
        found[:] = [f"http://{pods[0]['status']['podIP']}:{GATEWAY_PORT}"]
        origin = Origin(found[0], keepalive=False)
        try:
            models = await origin.fetch("GET", "/v1/models", timeout_s=5.0)
            ready = await origin.fetch("GET", f"/ready?model={model}", timeout_s=5.0)
            return model.encode() in models.body and ready.status == 200
        except NetError:
            return False
        finally:
            await origin.close()

    await here.until(there, f"a gateway that serves {model}", 180.0)
    return found[0]


async def ask(url: str, model: str) -> None:
    load = Load(url, 2, model=model)
    while load.sent < 4:
        await asyncio.sleep(0.05)
    await load.stop()
    assert load.failures == []


def test_it_is_installed_upgraded_rolled_back_and_uninstalled(tmp_path: Path) -> None:
    async def story() -> None:
        node, copied = Node(tmp_path), chart(tmp_path)
        container, _ = emulated_pods(tmp_path)
        async with cluster("real", tmp_path, run=node.run) as here:
            node.here = here
            volume = {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "hostPath": {"path": "/nowhere"},
            }
            head = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "disk"}}
            await here.client.post("/api/v1/persistentvolumes", {**head, "spec": volume})
            await here.apply(workload(replicas=0, container=container))
            with helm_python.Config(kubeconfig_path=here.kubeconfig, namespace="default") as helm:
                with pytest.raises(helm_python.HelmError, match="replicas"):
                    await asyncio.to_thread(helm.install, copied, "chiron", {**OF_FILE, "replicas": 2})
                await asyncio.to_thread(helm.install, copied, "chiron", OF_FILE)
                await ask(await gateway_of(here, "m"), "m")
                assert await here.replicas() == 1

                # The same engines, as a model that is a resource: with the rights that the chart gives for those.
                kind = {"engine": "openai", "deployment": "engine", "port": PORT, "servedModelName": "m"}
                await here.client.post(MODELS, chiron_model("n", "engine", kinds=[kind]))
                await asyncio.to_thread(helm.upgrade, copied, "chiron", OF_RESOURCES)
                await ask(await gateway_of(here, "n"), "n")

                async def told() -> bool:
                    status = (await here.client.get(f"{MODELS}/n")).get("status", {})
                    return bool(status.get("ready") == 1)

                await here.until(told, "the status of the model")

                await asyncio.to_thread(helm.rollback, "chiron")
                await ask(await gateway_of(here, "m"), "m")
                assert [each["revision"] for each in helm.history("chiron")] == [1, 2, 3]

                await asyncio.to_thread(helm.uninstall, "chiron")

                async def gone() -> bool:
                    names = [item["metadata"]["name"] for item in (await here.client.get(DEPLOYMENTS))["items"]]
                    return names == ["engine"] and len(await here.pods()) == 1

                await here.until(gone, "all of it but the engines and the models is gone")
                assert [item["metadata"]["name"] for item in (await here.client.get(MODELS))["items"]] == ["n"]
                claims = await here.client.get("/api/v1/namespaces/default/persistentvolumeclaims")
                assert [item["metadata"]["name"] for item in claims["items"]] == ["chiron"], "batch work stays"
                await asyncio.to_thread(helm.install, copied, "chiron", OF_FILE)
                await ask(await gateway_of(here, "m"), "m")
        logs = [path.read_text() for path in tmp_path.glob("chiron-*.log")]
        assert len(logs) == 4
        assert [text for text in logs if "Forbidden" in text or "Traceback" in text] == [], json.dumps(logs)

    asyncio.run(story())
