"""A cluster for tests: an API server (in memory, or a real one), controllers, and kubelets whose pods are real."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiron.fleet.kubernetes.access import from_kubeconfig
from chiron.fleet.kubernetes.client import Client, KubernetesError
from chiron.fleet.kubernetes.source import CONSENT, CONSENTS
from chiron.fleet.kubernetes.testing.api import FakeKubernetes, shut
from chiron.fleet.kubernetes.testing.controllers import Controllers
from chiron.fleet.kubernetes.testing.kubelet import Container, Kubelet, Run
from chiron.net.server import HttpServer, Incoming, serve
from real_kubernetes import ControlPlane, control_plane, kubeconfig
from yaml_loader import LOADER

PORT = 8000
PODS = "/api/v1/namespaces/default/pods"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
PROGRAMS = os.environ.get("CHIRON_TEST_KUBERNETES", "")
"""Where kube-apiserver and the others are: what tools/build_kubernetes.sh made."""
needs_kubernetes = (
    pytest.mark.kubernetes,
    pytest.mark.skipif(not PROGRAMS, reason="CHIRON_TEST_KUBERNETES names no programs"),
)
every_cluster = pytest.mark.parametrize("what", ["fake", pytest.param("real", marks=needs_kubernetes)])


CRD = resources.files("chiron") / "data" / "deploy" / "helm" / "chiron" / "crds" / "chironmodels.yaml"
MODELS = "/apis/chiron-serving.io/v1alpha1/namespaces/default/chironmodels"


class LoopContainer:
    """A container that is a server on the test's own loop."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def ended(self) -> int:
        code = await asyncio.shield(self._end)
        await shut(self.server)
        return code

    async def stop(self, grace_s: float) -> None:
        self.exit(0)
        await shut(self.server)

    def exit(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)


async def run_on_loop(pod: Mapping[str, Any], address: str) -> Container:
    """What the image says happens: ``exits/7`` ends with code 7, ``deaf/x`` never answers, others are sound."""
    image = pod["spec"]["containers"][0]["image"]

    def handle(incoming: Incoming) -> None:
        if not image.startswith("deaf/"):
            incoming.respond(200, b"{}")

    container = LoopContainer(await serve(handle, host=address, port=PORT))
    if image.startswith("exits/"):
        container.exit(int(image.removeprefix("exits/")))
    return container


@dataclass
class Cluster:
    client: Client
    kubeconfig: Path
    kubelets: list[Kubelet]
    fake: FakeKubernetes | None = None
    controllers: Controllers | None = None
    plane: ControlPlane | None = None

    async def restart_api(self) -> None:
        """Kill it, and start it again a moment later."""
        if self.fake is not None:
            await self.fake.stop()
            await asyncio.sleep(0.5)
            await self.fake.start()
            return
        assert self.plane is not None
        await self.plane.kill("kube-apiserver")
        await self.plane.start_api()
        await self.plane.until_ready(self.kubeconfig)

    async def apply(self, item: Mapping[str, Any], path: str = DEPLOYMENTS) -> dict[str, Any]:
        return await self.client.post(path, item)

    async def pods(self) -> list[dict[str, Any]]:
        """Those that are not being deleted."""
        items = (await self.client.get(PODS))["items"]
        return [pod for pod in items if not pod["metadata"].get("deletionTimestamp")]

    async def ready(self) -> set[str]:
        return {
            pod["metadata"]["name"]
            for pod in await self.pods()
            for condition in pod.get("status", {}).get("conditions", ())
            if condition["type"] == "Ready" and condition["status"] == "True"
        }

    async def replicas(self, name: str = "engine", path: str = DEPLOYMENTS) -> int:
        return int((await self.client.get(f"{path}/{name}/scale"))["spec"].get("replicas", 0))

    async def set_replicas(self, replicas: int, name: str = "engine", path: str = DEPLOYMENTS) -> None:
        await self.client.patch(f"{path}/{name}/scale", {"spec": {"replicas": replicas}})

    async def define_models(self) -> None:
        """ChironModels can be made from now on: of what is in memory they are a part."""
        if self.plane is None:
            return
        definition = yaml.load(CRD.read_text(), LOADER)
        await self.client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)

        async def there() -> bool:
            with contextlib.suppress(KubernetesError):
                return bool((await self.client.get(MODELS))["kind"])
            return False

        await self.until(there, "ChironModels are known")

    def container(self, pod: str) -> Any:
        return next(kubelet.containers[pod] for kubelet in self.kubelets if pod in kubelet.containers)

    async def until(self, condition: Any, what: str, timeout_s: float = 60.0) -> None:
        """``condition`` is awaited again and again."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while not await condition():
            assert asyncio.get_running_loop().time() < deadline_s, f"not within {timeout_s} s: {what}"
            await asyncio.sleep(0.02)

    async def until_ready(self, count: int) -> None:
        async def there() -> bool:
            return len(await self.ready()) == count == len(await self.pods())

        await self.until(there, f"{count} pods are ready")


def chiron_model(name: str, deployment: str, **spec: Any) -> dict[str, Any]:
    kind = {"engine": "openai", "deployment": deployment, "port": PORT}
    return {
        "apiVersion": "chiron-serving.io/v1alpha1",
        "kind": "ChironModel",
        "metadata": {"name": name},
        "spec": {"kinds": [kind], "minInstances": 1, "maxInstances": 3, **spec},
    }


def workload(
    kind: str = "Deployment",
    name: str = "engine",
    replicas: int = 0,
    *,
    gpus: int = 1,
    container: Mapping[str, Any] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    limits = {"limits": {"nvidia.com/gpu": gpus}} if gpus else {}
    engine = {"name": "engine", "image": "sound", "resources": limits, **(container or {})}
    pod = {"terminationGracePeriodSeconds": 20, "containers": [engine], **spec}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": {CONSENT: CONSENTS}},
        "spec": {
            "replicas": replicas,
            **({"serviceName": name, "podManagementPolicy": "Parallel"} if kind == "StatefulSet" else {}),
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": pod},
        },
    }


@contextlib.asynccontextmanager
async def cluster(
    what: str,
    directory: Path,
    *,
    nodes: int = 2,
    gpus: int = 8,
    run: Run = run_on_loop,
    restart_s: float = 0.02,
    manager: Sequence[str] = (),
) -> AsyncIterator[Cluster]:
    """``manager``: more arguments of the real controller manager."""
    async with contextlib.AsyncExitStack() as stack:
        fake = controllers = plane = None
        if what == "fake":
            fake = await stack.enter_async_context(FakeKubernetes())
            controllers = Controllers(fake)
            config = kubeconfig(directory / "kubeconfig", fake.url)
        else:
            plane, config = await stack.enter_async_context(control_plane(Path(PROGRAMS), directory, manager=manager))
        client = Client(from_kubeconfig(config))
        stack.push_async_callback(client.close)
        kubelets = []
        for number in range(nodes):
            kubelet = Kubelet(client, f"node-{number}", run=run, gpus=gpus, restart_s=restart_s)
            task = asyncio.get_running_loop().create_task(kubelet.run())
            kubelets.append(kubelet)

            async def stop(kubelet: Kubelet = kubelet, task: asyncio.Task[None] = task) -> None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await kubelet.close()

            stack.push_async_callback(stop)
        here = Cluster(
            client=client, kubeconfig=config, kubelets=kubelets, fake=fake, controllers=controllers, plane=plane
        )

        async def nodes_ready() -> bool:
            with contextlib.suppress(KubernetesError):
                items = (await client.get("/api/v1/nodes"))["items"]
                tainted = [node for node in items if node.get("spec", {}).get("taints")]
                capable = [node for node in items if node.get("status", {}).get("allocatable")]
                return len(capable) == nodes and not tainted
            return False

        await here.until(nodes_ready, "the nodes are there")
        yield here
