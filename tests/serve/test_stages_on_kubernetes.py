"""The chart's stages on a real control plane: each stage a Deployment that Kubernetes' own autoscaler scales, its pods
real stages, and a head that finds them.

The control plane is 1.20, which has autoscaling/v2beta2 in place of v2. There is no DNS: the head is a process whose
resolver reads what a headless Service's name would say, the addresses of ready pods, from a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from chiron.fleet.kubernetes.testing.kubelet import Container, ProcessContainer
from chiron.net.client import NetError, Origin
from kubernetes_load import Load
from kubernetes_site import DEPLOYMENTS, Cluster, cluster, needs_kubernetes
from peer_certificates import Authority
from pod_metrics import pod_metrics
from reference import recorded
from render_manifests import render
from staged_models import need_torch, prompts, tiny

pytest.importorskip("helm_python")
pytestmark = [*needs_kubernetes, pytest.mark.slow]

CORE = "/api/v1/namespaces/default"
AUTOSCALERS = "/apis/autoscaling/v2beta2/namespaces/default/horizontalpodautoscalers"
PATHS = {"Deployment": DEPLOYMENTS, "Service": f"{CORE}/services", "HorizontalPodAutoscaler": AUTOSCALERS}
STAGE_PORT, HEAD_PORT = 9000, 8000
QUICK, SLOW = "staged-0-1", "staged-2-3"
HPA = ("--horizontal-pod-autoscaler-sync-period=2s", "--horizontal-pod-autoscaler-initial-readiness-delay=0s")
MANAGER = (*HPA, "--controllers=horizontalpodautoscaling")
PROGRAM = """
import json, os, sys
from chiron.cli import main
from chiron.engines.staged.discovery import Discovery

async def resolve(host, port):
    with open(os.environ["NAMES"]) as names:
        found = json.load(names).get(host)
    if not found:
        raise OSError(f"{host}: no such name")
    return found

Discovery.__init__.__kwdefaults__["resolve"] = resolve
sys.exit(main())
"""


def values(model: Path) -> dict[str, Any]:
    return {
        "staged": {
            "enabled": True,
            "model": str(model),
            "servedModelName": "m",
            "volume": {"hostPath": {"path": str(model)}},
            "graceSeconds": 20,
            "args": ["--dtype", "float32"],
            "stages": [
                {"layers": "0-1", "min": 1, "max": 3, "gpus": 0},
                {"layers": "2-3", "min": 1, "max": 3, "gpus": 0, "args": ["--pace-ms", "150"]},
            ],
            "hpa": {"target": "500m", "behavior": {"scaleDown": {"stabilizationWindowSeconds": 5}}},
            "head": {"args": ["--dtype", "float32", "--silent", "60"]},
        }
    }


class Node:
    """Runs pods of the chart's image, and is the name server of the head."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.secret = directory / "secret"
        """Where the Secret with certificates is mounted."""
        self.names = directory / "names.json"
        self.names.write_text("{}")

    async def run(self, pod: Mapping[str, Any], address: str) -> Container:
        words = [word.replace("0.0.0.0", address) for word in pod["spec"]["containers"][0]["args"]]
        words = [word.replace("/etc/chiron-stages/", f"{self.secret}/") for word in words]
        with (self._directory / f"{pod['metadata']['name']}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, *words),
                env={**os.environ, "OMP_NUM_THREADS": "1", "NAMES": str(self.names)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return ProcessContainer(process)

    async def tell_names(self, here: Cluster) -> None:
        """As a name server does it, again and again."""
        while True:
            names = {app: sorted((await ready(here, app)).values()) for app in (QUICK, SLOW)}
            new = self.names.with_suffix(".new")
            new.write_text(json.dumps(names))
            new.replace(self.names)
            await asyncio.sleep(0.5)


async def ready(here: Cluster, app: str) -> dict[str, str]:
    """Addresses of the pods that a Service of this label would have."""
    names = await here.ready()
    pods = [pod for pod in await here.pods() if pod["metadata"]["labels"]["app"] == app]
    return {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in pods if pod["metadata"]["name"] in names}


async def replicas(head: str) -> list[int]:
    """Of each stage, that the head has reached."""
    origin = Origin(head)
    try:
        said = json.loads((await origin.fetch("GET", "/chiron/stages", timeout_s=30.0)).body)
    finally:
        await origin.close()
    return [int(stage["ready"]) for stage in said["stages"]]


async def complete(head: str, prompt: list[int], tokens: int) -> list[int]:
    origin = Origin(head)
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    try:
        answer = await origin.fetch("POST", "/v1/completions", body=json.dumps(body).encode(), timeout_s=120.0)
    finally:
        await origin.close()
    found: list[int] = json.loads(answer.body)["choices"][0]["token_ids"]
    return found


@contextlib.asynccontextmanager
async def running(task: Any) -> AsyncIterator[None]:
    made = asyncio.get_running_loop().create_task(task)
    try:
        yield
    finally:
        made.cancel()
        await asyncio.gather(made, return_exceptions=True)


def test_kubernetes_scales_the_stage_that_is_busy_and_the_head_follows(tmp_path: Path) -> None:
    need_torch()
    model, given = tiny(), prompts(3, seed=0)

    async def answers_are_right(head: str) -> None:
        found = await asyncio.gather(*(complete(head, prompt, 12) for prompt in given))
        assert list(found) == [tokens[:12] for tokens in recorded("llama")]

    async def story() -> None:
        node = Node(tmp_path)
        async with (
            cluster("real", tmp_path, run=node.run, manager=MANAGER) as here,
            running(node.tell_names(here)),
            pod_metrics(here.client, tmp_path, partial(ready, here), STAGE_PORT),
        ):
            for item in yaml.safe_load_all(render(values(model))["staged"]):
                old = item["apiVersion"].replace("autoscaling/v2", "autoscaling/v2beta2")
                await here.apply({**item, "apiVersion": old}, PATHS[item["kind"]])
            await here.until(lambda: all_ready(here, 3), "each Deployment has a pod", 300.0)
            (address,) = (await ready(here, "staged-head")).values()
            head = f"http://{address}:{HEAD_PORT}"

            async def reached(*least: int) -> bool:
                return all(n >= m for n, m in zip(await replicas(head), least, strict=True))

            await here.until(lambda: reached(1, 1), "the head has found both stages", 120.0)
            await answers_are_right(head)
            load = Load(head, 6, max_tokens=30, ignore_eos=True)
            await here.until(lambda: reached(1, 2), "the slow stage has another replica", 300.0)
            await answers_are_right(head)
            await load.stop()

            async def fewer() -> bool:
                return await here.replicas(SLOW) == 1 and len(await ready(here, SLOW)) == 1

            await here.until(fewer, "it has been taken back", 300.0)
            await answers_are_right(head)
            assert load.failures == []
            assert load.sent > 6

    asyncio.run(story())


def test_head_and_stages_speak_tls_by_the_certificate_of_a_secret(tmp_path: Path) -> None:
    need_torch()
    model, given = tiny(), prompts(3, seed=0)

    async def story() -> None:
        node, ca = Node(tmp_path), Authority(tmp_path / "authority")
        certificate, key = ca.issue("staged", host=f"DNS:{QUICK},DNS:{SLOW}")
        node.secret.mkdir()
        for file, name in ((certificate, "tls.crt"), (key, "tls.key"), (ca.ca, "ca.crt")):
            (node.secret / name).write_bytes(file.read_bytes())
        secured = values(model)
        secured["staged"] |= {"certificateSecret": "staged-tls", "hpa": {"enabled": False}}
        async with cluster("real", tmp_path, run=node.run) as here, running(node.tell_names(here)):
            for item in yaml.safe_load_all(render(secured)["staged"]):
                await here.apply(item, PATHS[item["kind"]])
            await here.until(lambda: all_ready(here, 3), "each Deployment has a pod", 300.0)
            (address,) = (await ready(here, "staged-head")).values()
            head = f"http://{address}:{HEAD_PORT}"

            async def reached() -> bool:
                return await replicas(head) == [1, 1]

            await here.until(reached, "the head has found both stages", 120.0)
            found = await asyncio.gather(*(complete(head, prompt, 12) for prompt in given))
            assert list(found) == [tokens[:12] for tokens in recorded("llama")]
            (stage,) = (await ready(here, QUICK)).values()
            plain = Origin(f"http://{stage}:{STAGE_PORT}")
            with pytest.raises(NetError):
                await plain.fetch("GET", "/health", timeout_s=30.0)
            await plain.close()

    asyncio.run(story())


async def all_ready(here: Cluster, count: int) -> bool:
    return len(await here.ready()) == count
