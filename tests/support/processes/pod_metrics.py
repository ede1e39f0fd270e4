"""Metrics of pods for a real Kubernetes: an API behind its own, which scrapes pods when an autoscaler asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from chiron.fleet.kubernetes.client import Client, KubernetesError
from peer_certificates import Authority

ROOT = "/apis/custom.metrics.k8s.io/v1beta1"
_ASKED = re.compile(ROOT + r"/namespaces/([^/]+)/pods/\*/([^/]+)$")

Pods = Callable[[str], Awaitable[Mapping[str, str]]]
"""Addresses of the ready pods with this label ``app``, by name."""


@contextlib.asynccontextmanager
async def pod_metrics(client: Client, directory: Path, pods: Pods, port: int) -> AsyncIterator[None]:
    """Serves any metric that a pod has on its page at this port. The API server reaches it as ``localhost``."""
    certificate, key = Authority(directory / "metrics").issue("metrics", host="DNS:localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = json.dumps(await _answer(head.split()[1].decode(), pods, port)).encode()
                top = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(top.encode() + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    service = {"type": "ExternalName", "externalName": "localhost"}
    spec = {
        "service": {"namespace": "default", "name": "metrics", "port": server.sockets[0].getsockname()[1]},
        "group": "custom.metrics.k8s.io",
        "version": "v1beta1",
        "insecureSkipTLSVerify": True,
        "groupPriorityMinimum": 100,
        "versionPriority": 100,
    }
    about = {"name": "v1beta1.custom.metrics.k8s.io"}
    api = {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": about, "spec": spec}
    named = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics"}, "spec": service}
    await client.post("/api/v1/namespaces/default/services", named)
    await client.post("/apis/apiregistration.k8s.io/v1/apiservices", api)
    async with asyncio.timeout(180.0):
        while True:
            with contextlib.suppress(KubernetesError):
                await client.get(ROOT)
                break
            await asyncio.sleep(0.2)
    try:
        yield
    finally:
        server.close()


async def _answer(target: str, pods: Pods, port: int) -> object:
    address = urlsplit(target)
    asked = _ASKED.match(unquote(address.path))
    if asked is None:
        resource = {"name": "pods/chiron_stage_utilisation", "namespaced": True, "kind": "MetricValueList"}
        listed = [{"singularName": "", "verbs": ["get"], **resource}]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": ROOT[6:], "resources": listed}
    (label,) = parse_qs(address.query)["labelSelector"]
    items = []
    for name, host in sorted((await pods(label.removeprefix("app="))).items()):
        value = await _scrape(host, port, asked[2])
        if value is not None:
            described = {"kind": "Pod", "namespace": asked[1], "name": name, "apiVersion": "/v1"}
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            metric = {"metricName": asked[2], "timestamp": now, "value": f"{round(1000 * value)}m"}
            items.append({"describedObject": described, **metric})
    return {"kind": "MetricValueList", "apiVersion": ROOT[6:], "metadata": {}, "items": items}


async def _scrape(host: str, port: int, metric: str) -> float | None:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(20.0):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            page = (await reader.read()).decode()
            writer.close()
        found = re.search(rf"^{metric}\{{[^}}]*\}} (\S+)$", page, re.MULTILINE)
        return float(found[1]) if found else None
    return None
