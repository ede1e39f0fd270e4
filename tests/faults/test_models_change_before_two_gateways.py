"""Two gateways, one of which Kubernetes elects, while ChironModels are made and deleted: both serve them, whoever
leads, and each request has its whole answer."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from chiron.fleet.kubernetes.access import from_kubeconfig
from chiron.fleet.kubernetes.client import Client
from fault_site import Api, chat
from gateway_pair import NAMES, Pair, gateways, talk, until_ready
from kubernetes_load import Load, run_engine_on_loop
from kubernetes_site import MODELS, chiron_model, cluster, workload
from postgres_server import postgres_server, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]


async def until_models(pair: Pair, name: str, *models: str) -> None:
    async with Api(pair.sites[name].url) as api, asyncio.timeout(120):
        while True:
            answer = await api.ask("GET", "/v1/models")
            if answer.status == 200 and {each["id"] for each in json.loads(answer.body)["data"]} == set(models):
                return
            await asyncio.sleep(0.1)


async def serves(pair: Pair, name: str, model: str) -> None:
    """What is listed is served, also by a relay whose brain is another gateway's."""
    async with Api(pair.sites[name].url) as api, asyncio.timeout(120):
        status = (await api.ask("POST", "/v1/chat/completions", {**chat(), "model": model})).status
        assert status != 404, f"{name} lists {model}, and does not know it"


async def until_told(client: Client, path: str) -> None:
    async with asyncio.timeout(120):
        while (await client.get(path)).get("status", {}).get("ready") != 1:
            await asyncio.sleep(0.1)


def test_both_serve_what_there_is_and_no_request_fails(tmp_path: Path) -> None:
    async def change(pair: Pair, kubeconfig: Path) -> None:
        for name in NAMES:
            await until_ready(pair, name)
        verdicts, over = Counter[str](), asyncio.Event()
        talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES]
        client = Client(from_kubeconfig(kubeconfig))
        await client.post(MODELS, chiron_model("n", "engine"))
        for name in NAMES:
            await until_models(pair, name, "m", "n")
            await serves(pair, name, "n")
        loads = [Load(pair.sites[name].url, 1, model="n") for name in NAMES]
        await until_told(client, f"{MODELS}/n")
        async with asyncio.timeout(120):
            while any(load.sent < 10 for load in loads):
                await asyncio.sleep(0.05)
        for load in loads:
            await load.stop()
            assert load.failures == []
        await client.delete(f"{MODELS}/n")
        for name in NAMES:
            await until_models(pair, name, "m")
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        await client.close()

    def run(kubeconfig: Path) -> None:
        extra = f'elect = "kubernetes"\nkubeconfig = "{kubeconfig}"\n[kubernetes]\nkubeconfig = "{kubeconfig}"'
        with postgres_server(settings=()) as server, gateways(tmp_path, server, lease="6s", extra=extra) as pair:
            asyncio.run(change(pair, kubeconfig))

    async def main() -> None:
        async with cluster("fake", tmp_path / "cluster", run=run_engine_on_loop) as here:
            await here.apply(workload(replicas=0))
            await asyncio.to_thread(run, here.kubeconfig)

    (tmp_path / "cluster").mkdir()
    asyncio.run(main())
