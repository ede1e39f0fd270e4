"""The chart, installed, upgraded, rolled back and uninstalled by Helm on a real control plane, with the gateway and its
engines as real processes, the gateway with the rights that the chart gives it and no others.

The control plane is 1.20: the chart wants 1.22 (pod deletion cost), and a PodDisruptionBudget has policy/v1 since 1.21
only. So a copy of the chart takes any version, and the budget is left out.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from chart_site import CORE, GATEWAY_PORT, Node, chart, disk
from chiron.net.client import NetError, Origin
from kubernetes_load import Load, emulated_pods
from kubernetes_site import DEPLOYMENTS, MODELS, PORT, Cluster, chiron_model, cluster, needs_kubernetes, workload

helm_python = pytest.importorskip("helm_python")
pytestmark = [*needs_kubernetes, pytest.mark.slow]

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
            await here.client.post("/api/v1/persistentvolumes", disk("disk"))
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
                claims = await here.client.get(f"{CORE}/persistentvolumeclaims")
                assert [item["metadata"]["name"] for item in claims["items"]] == ["chiron"], "batch work stays"
                await asyncio.to_thread(helm.install, copied, "chiron", OF_FILE)
                await ask(await gateway_of(here, "m"), "m")
        logs = [path.read_text() for path in tmp_path.glob("chiron-*.log")]
        assert len(logs) == 4
        assert [text for text in logs if "Forbidden" in text or "Traceback" in text] == [], json.dumps(logs)

    asyncio.run(story())
