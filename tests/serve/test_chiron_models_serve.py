"""``chiron serve`` with models as ChironModel resources: made, changed and deleted under load, and no request fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chiron.net.client import NetError, Origin
from kubernetes_load import Load, run_engine_on_loop
from kubernetes_site import MODELS, Cluster, chiron_model, cluster, every_cluster, workload
from ports import free_port

pytestmark = pytest.mark.slow


class Gateway:
    """A gateway as processes."""

    def __init__(self, here: Cluster, url: str) -> None:
        self.here = here
        self.url = url

    async def models(self) -> set[str]:
        """Those that it serves; empty while it cannot be asked."""
        origin = Origin(self.url, keepalive=False)
        try:
            answer = await origin.fetch("GET", "/v1/models", timeout_s=5.0)
            return {each["id"] for each in json.loads(answer.body)["data"]} if answer.status == 200 else set()
        except NetError:
            return set()
        finally:
            await origin.close()

    async def until_models(self, *names: str) -> None:
        async def there() -> bool:
            return await self.models() == set(names)

        await self.here.until(there, f"models {names}", 120.0)

    async def until_status(self, name: str, **wanted: Any) -> dict[str, Any]:
        """With these values, or whose condition has these words."""
        found: dict[str, Any] = {}

        async def there() -> bool:
            found.clear()
            found.update((await self.here.client.get(f"{MODELS}/{name}")).get("status") or {})
            conditions = {each["type"]: each for each in found.get("conditions", ())}
            verdict = conditions.get("Accepted", {})
            flat = {**found, "accepted": verdict.get("status"), "why": verdict.get("message", "")}
            return all(str(value) in str(flat.get(key)) for key, value in wanted.items())

        await self.here.until(there, f"status {wanted} of {name}", 120.0)
        return found


@contextlib.asynccontextmanager
async def served(here: Cluster, directory: Path) -> AsyncIterator[Gateway]:
    port = free_port()
    config = directory / "chiron.toml"
    config.write_text(f'[server]\nport = {port}\n[kubernetes]\nkubeconfig = "{here.kubeconfig}"\n')
    with (directory / "gateway.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "chiron", "serve", str(config), stdout=log, stderr=log
        )
    try:
        yield Gateway(here, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        await process.wait()
    log_text = (directory / "gateway.log").read_text()
    assert "Traceback" not in log_text
    assert process.returncode == 0, log_text


async def lose_definition(gateway: Gateway, log: Path) -> None:
    """And all resources with it; then it is made again."""

    def logged(words: str) -> Callable[[], Awaitable[bool]]:
        async def there() -> bool:
            return words in log.read_text()

        return there

    here, definition = gateway.here, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    await here.client.delete(f"{definition}/chironmodels.chiron-serving.io")
    await here.until(logged("their definition may not be installed"), "it is gone")
    assert await gateway.models() == {"m"}
    await here.define_models()
    await here.until(logged("their definition was away, and has come back without any"), "it is back")
    assert await gateway.models() == {"m"}
    await here.client.post(MODELS, chiron_model("m", "a", minInstances=2))
    await gateway.until_status("m", model="m", accepted="True")


@every_cluster
def test_models_come_change_and_go_and_no_request_fails(what: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster(what, tmp_path, run=run_engine_on_loop) as here:
            await here.define_models()
            for name in ("a", "b"):
                await here.apply(workload(name=name, replicas=0))
            async with served(here, tmp_path) as gateway:
                await here.client.post(MODELS, chiron_model("m", "a"))
                await gateway.until_models("m")
                load = Load(gateway.url, 6)
                status = await gateway.until_status("m", ready=1, accepted="True")
                assert status["planned"] == 1

                # One that is wrong, one that is not, and one that is changed, together.
                await here.client.post(MODELS, chiron_model("wrong", "b", minInstances=9))
                await here.client.post(MODELS, chiron_model("n", "b"))
                await here.client.patch(f"{MODELS}/m", {"spec": {"minInstances": 2}})
                await gateway.until_models("m", "n")
                await gateway.until_status("wrong", accepted="False", why="minInstances is 9")
                await gateway.until_status("m", ready=2, planned=2, observedGeneration=2)
                await gateway.until_status("n", ready=1)
                other = Load(gateway.url, 2, model="n")

                # A version that cannot be, and an API server that is killed: what is in force stays.
                await here.client.patch(f"{MODELS}/m", {"spec": {"maxInstances": 1}})
                await gateway.until_status("m", accepted="False", why="generation 2 stays in force")
                await here.restart_api()
                assert await gateway.models() == {"m", "n"}
                sent = load.sent, other.sent

                async def go_on() -> bool:
                    return load.sent > sent[0] + 10 and other.sent > sent[1] + 10

                await here.until(go_on, "requests go on")
                await other.stop()
                await here.client.delete(f"{MODELS}/n")
                await gateway.until_models("m")
                left = await here.replicas("b")
                assert left >= 1, "its workload stays"
                if what == "real":
                    await lose_definition(gateway, tmp_path / "gateway.log")
                assert await here.replicas("b") == left, "Chiron has let go of it"
                await load.stop()
                assert load.failures == other.failures == []

    asyncio.run(story())
