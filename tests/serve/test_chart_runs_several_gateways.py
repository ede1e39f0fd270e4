"""The chart with three gateways on a real control plane: requests through its Service, and a batch, while the pod that
leads is killed, the chart is upgraded, and a gateway is taken away. No request fails, and each item has one line.
Clients are kept off the pod that is killed, and none waits there then: those on it would be cut off.

Gateways are processes with the names, certificates, rights and volumes that the chart gives them, on a PostgreSQL, with
a Lease of the API server. A client asks before each request which pods the Service has, and a pod that ends is told so
once the Service has left it out, which ``preStop`` gives time for in a cluster. The control plane is 1.20, as in
``test_chart_installs.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from chart_site import CORE, GATEWAY_PORT, Node, chart, disk
from chiron.fleet.kubernetes.client import KubernetesError
from chiron.fleet.kubernetes.testing.kubelet import Container, ProcessContainer
from chiron.net.client import NetError, Origin
from fault_site import Answer, Api, chat, item
from kubernetes_load import emulated_pods
from kubernetes_site import PORT, Cluster, cluster, needs_kubernetes, workload
from peer_certificates import Authority
from postgres_server import Server, postgres_server, why_not

helm_python = pytest.importorskip("helm_python")
pytestmark = [
    *needs_kubernetes,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

LEASE = "/apis/coordination.k8s.io/v1/namespaces/default/leases/chiron"
ITEMS, CLIENTS = 150, 4
TOKENS = (30, 30, 30, 500)
"""Of one answer after the other; the last takes longer than a pod that ends is left in peace."""
LABEL = "app.kubernetes.io/name"


def values(server: Server, replicas: int, max_instances: int) -> dict[str, Any]:
    model = {"engine": "openai", "min_instances": 1, "kubernetes": {"deployment": "engine", "port": PORT}}
    return {
        "podDisruptionBudget": {"enabled": False},  # policy/v1 is newer than this control plane.
        "storage": {"size": "1Gi"},
        "resources": {"requests": {"cpu": "1"}},
        "gateways": {
            "replicas": replicas,
            "certificateSecret": "chiron-gateways",
            "databaseSecret": {"name": "chiron-db"},
            "preStopSeconds": 1,
        },
        "config": {
            "store": {"url": server.url},
            "gateways": {"elect": "kubernetes", "lease": "5s"},
            "models": {"llama-3.1-8b": None, "m": {**model, "max_instances": max_instances}},
        },
    }


class LastServed:
    """A gateway's container, told to end once the Service has no address of its any more."""

    def __init__(self, process: ProcessContainer, service: Service, address: str) -> None:
        self.process = process
        self._service = service
        self._address = address

    async def ended(self) -> int:
        return await self.process.ended()

    async def stop(self, grace_s: float) -> None:
        if grace_s:  # Else the test is over.
            while self._address in await self._service.listed():
                await asyncio.sleep(0.05)
        await self.process.stop(grace_s)


class Service:
    """The chart's Service, its pods, and clients of both."""

    def __init__(self, here: Cluster, node: Node) -> None:
        self.here = here
        self.aside: set[str] = set()
        """Addresses that clients are not sent to."""
        self.verdicts = Counter[str]()
        self.served = Counter[str]()
        """Answers, by address."""
        self.unanswered = Counter[str]()
        self._node = node
        self._over = False
        self._turn = 0

    async def run(self, pod: Mapping[str, Any], address: str) -> Container:
        container = await self._node.run(pod, address)
        if LABEL not in pod["metadata"]["labels"]:
            return container
        assert isinstance(container, ProcessContainer)
        return LastServed(container, self, address)

    async def listed(self) -> list[str]:
        """Addresses that the Service has."""
        return sorted((await self._endpoints("chiron")).values())

    async def tell_names(self) -> None:
        """As a name server does it, again and again."""
        while True:
            with contextlib.suppress(KubernetesError):  # Such as before the chart is installed.
                found = await self._endpoints("chiron-gateways")
                self._node.tell_names({f"{pod}.chiron-gateways.default.svc": ip for pod, ip in found.items()})
            await asyncio.sleep(0.2)

    async def _endpoints(self, service: str) -> dict[str, str]:
        """As the controller has them, which takes no addresses of the loopback network: by name of the pod."""
        spec = (await self.here.client.get(f"{CORE}/services/{service}"))["spec"]
        ready, unready_too = await self.here.ready(), spec.get("publishNotReadyAddresses", False)
        return {
            name: address
            for pod in await self.here.pods()
            if spec["selector"].items() <= pod["metadata"]["labels"].items()
            and (address := pod.get("status", {}).get("podIP"))
            and ((name := pod["metadata"]["name"]) in ready or unready_too)
        }

    async def gateways(self) -> dict[str, dict[str, Any]]:
        """Pods that are not about to end, by name."""
        return {
            pod["metadata"]["name"]: pod
            for pod in await self.here.pods()
            if pod["metadata"]["labels"].get(LABEL) == "chiron"
        }

    async def until_serving(self, *names: str, config: str | None = None) -> None:
        """Exactly these, with another config than this one, each with a way to whoever leads and to an engine."""

        async def there() -> bool:
            pods = await self.gateways()
            marks = {pod["metadata"]["annotations"]["checksum/config"] for pod in pods.values()}
            addresses = {pod.get("status", {}).get("podIP") for pod in pods.values()}
            if set(pods) != set(names) or config in marks or set(await self.listed()) != addresses:
                return False
            return all([await is_ready(str(address)) for address in addresses])

        await self.here.until(there, f"{', '.join(names)} serve", 300.0)

    async def leader(self) -> str:
        """Who has the Lease."""
        return str((await self.here.client.get(LEASE))["spec"].get("holderIdentity", ""))

    async def kill(self, name: str) -> None:
        """The container of this pod, at once, when no client waits there."""
        address = (await self.gateways())[name]["status"]["podIP"]
        self.aside.add(address)
        await self.here.until(lambda: self._is_idle(address), "nobody waits there")
        self.here.container(name).process.kill()
        await self.here.until(lambda: self._is_again(name, address), "it is there again")
        self.aside.discard(address)

    async def _is_idle(self, address: str) -> bool:
        return not self.unanswered[address]

    async def _is_again(self, name: str, address: str) -> bool:
        (status,) = (await self.gateways())[name]["status"]["containerStatuses"]
        return bool(status["restartCount"] and status["ready"])

    # -- clients -----------------------------------------------------------------------------------------------

    async def talk(self, number: int) -> None:
        count = 0
        while not self._over:
            count += 1
            tokens = TOKENS[count % len(TOKENS)]
            self.verdicts[await self._ask(chat(f"{number} {count}", tokens, stream=bool(count % 3)))] += 1
            await asyncio.sleep(0.05)

    async def _ask(self, body: dict[str, Any]) -> str:
        while True:
            address = await self._choose()
            origin = Origin(f"http://{address}:{GATEWAY_PORT}", keepalive=False, connect_timeout_s=60.0)
            self.unanswered[address] += 1
            try:
                answer = Answer(origin, body)
                verdict = await answer.end(120.0)
            finally:
                self.unanswered[address] -= 1
                await origin.close()
            if verdict == "broken" and not answer.status and address not in await self.listed():
                continue  # It left the Service between the look and the connection.
            self.served[address] += 1
            return verdict if verdict != "refused" else f"refused: {answer.text[:300]!r}"

    async def _choose(self) -> str:
        """One after the other."""
        while not (found := [each for each in await self.listed() if each not in self.aside]):
            await asyncio.sleep(0.05)
        self._turn += 1
        return found[self._turn % len(found)]

    async def until_answered(self, count: int) -> None:
        """So many more."""
        before = self.served.total()

        async def there() -> bool:
            return self.served.total() >= before + count

        await self.here.until(there, f"{count} more answers")

    @contextlib.asynccontextmanager
    async def clients(self) -> AsyncIterator[None]:
        """They end with the block, after the requests that run."""
        tasks = [asyncio.create_task(self.talk(number)) for number in range(CLIENTS)]
        try:
            yield
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        finally:
            self._over = True
            await asyncio.gather(*tasks, return_exceptions=True)


async def is_ready(address: str) -> bool:
    origin = Origin(f"http://{address}:{GATEWAY_PORT}", keepalive=False)
    try:
        return (await origin.fetch("GET", "/ready", timeout_s=10.0)).status == 200
    except NetError:
        return False
    finally:
        await origin.close()


async def lines_of(service: Service, batch: str) -> list[str]:
    async with Api(f"http://{(await service.listed())[0]}:{GATEWAY_PORT}") as api, asyncio.timeout(180):
        while (found := await api.batch(batch))["status"] != "completed":
            await asyncio.sleep(0.2)
        assert not found["error_file_id"]
        return [line["custom_id"] for line in await api.lines(found, "output_file_id")]


async def make_secrets(here: Cluster, directory: Path, server: Server) -> None:
    ca = Authority(directory / "certificates")
    certificate, key = ca.issue("gateways", host="DNS:*.chiron-gateways.default.svc")
    files = {"tls.crt": certificate.read_bytes(), "tls.key": key.read_bytes(), "ca.crt": ca.ca.read_bytes()}
    for name, data in (("chiron-gateways", files), ("chiron-db", {"password": server.password.encode()})):
        encoded = {file: b64encode(each).decode() for file, each in data.items()}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded}
        await here.client.post(f"{CORE}/secrets", secret)


def test_no_request_fails_while_the_leader_is_killed_and_the_chart_is_upgraded(tmp_path: Path) -> None:
    async def story(server: Server) -> None:
        node, copied = Node(tmp_path), chart(tmp_path)
        container, _ = emulated_pods(tmp_path)
        services: list[Service] = []

        async def run(pod: Mapping[str, Any], address: str) -> Container:
            return await services[0].run(pod, address)

        async with cluster("real", tmp_path, run=run) as here:
            service = Service(here, node)
            node.here = here
            services.append(service)
            for number in range(3):
                await here.client.post("/api/v1/persistentvolumes", disk(f"disk-{number}"))
            await make_secrets(here, tmp_path, server)
            await here.apply(workload(replicas=0, container=container))
            naming = asyncio.create_task(service.tell_names())
            try:
                with helm_python.Config(kubeconfig_path=here.kubeconfig, namespace="default") as helm:
                    await asyncio.to_thread(helm.install, copied, "chiron", values(server, 3, 2))
                    await service.until_serving("chiron-0", "chiron-1", "chiron-2")
                    async with service.clients():
                        await service.until_answered(30)
                        async with Api(f"http://{(await service.listed())[0]}:{GATEWAY_PORT}") as api:
                            batch = await api.submit([item(f"i{number}", 150) for number in range(ITEMS)])
                        await service.kill((await service.leader()).split("/")[0])
                        await service.until_serving("chiron-0", "chiron-1", "chiron-2")
                        await service.until_answered(30)

                        first = (await service.gateways())["chiron-0"]
                        mark = first["metadata"]["annotations"]["checksum/config"]
                        await asyncio.to_thread(helm.upgrade, copied, "chiron", values(server, 3, 3))
                        await service.until_serving("chiron-0", "chiron-1", "chiron-2", config=mark)
                        await service.until_answered(30)

                        await asyncio.to_thread(helm.upgrade, copied, "chiron", values(server, 2, 3))
                        await service.until_serving("chiron-0", "chiron-1")
                        await service.until_answered(30)
                        assert Counter(await lines_of(service, batch)) == Counter(f"i{n}" for n in range(ITEMS))
                        leader = (await service.leader()).split("/")[0]
                        for address in await service.listed():
                            async with Api(f"http://{address}:{GATEWAY_PORT}") as api:
                                assert (await api.get("/chiron/status"))["leader"]["gateway"] == leader
                    assert set(service.verdicts) == {"complete"}, service.verdicts
                    assert await here.replicas() >= 1
            finally:
                naming.cancel()
                await asyncio.gather(naming, return_exceptions=True)
            print(f"{service.verdicts.total()} requests, {len(service.served)} pods of gateways")
        logs = [path.read_text() for path in tmp_path.glob("chiron-?.log")]
        terms = [term for text in logs for term in re.findall(r"this gateway leads \(term (\d+)\)", text)]
        assert len(set(terms)) == len(terms) >= 3, "two gateways lead in one term"
        assert [text for text in logs if "Forbidden" in text or "Traceback" in text] == []

    with postgres_server() as server:
        asyncio.run(story(server))
