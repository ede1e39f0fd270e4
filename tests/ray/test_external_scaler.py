"""A fleet policy beside Ray Serve, through its external scaler; the dashboard and Prometheus are stubs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from chiron.net.server import Incoming, serve
from chiron.ray.decisions import Decisions
from chiron.ray.external import ExternalScaler, ScalerError, Target
from chiron.ray.load import Workload

SCALE = "/api/v1/applications/llm/deployments/vLLM%3Achat/scale"


class Stub:
    """Ray's dashboard and Prometheus in one."""

    def __init__(self) -> None:
        self.replicas = 1
        self.figures: dict[str, float | None] = {"processing": 5.0, "queued": None}
        self.enabled = True
        self.posted: list[tuple[str, dict[str, Any], bytes | None]] = []

    def handle(self, incoming: Incoming) -> None:
        path, query = incoming.path, incoming.query.decode()
        if incoming.method == b"POST":
            header = dict(incoming.headers).get(b"authorization")
            self.posted.append((path, json.loads(incoming.body), header))
            self.replicas = self.posted[-1][1]["target_num_replicas"] if self.enabled else self.replicas
            incoming.respond(200 if self.enabled else 412, b'{"message": "x"}')
        elif path == "/api/serve/applications/":
            replicas = [{"state": "RUNNING"}] * self.replicas
            details = {"target_num_replicas": self.replicas, "replicas": replicas}
            incoming.respond(
                200, json.dumps({"applications": {"llm": {"deployments": {"vLLM:chat": details}}}}).encode()
            )
        else:
            assert (path, query.startswith("query=sum%28ray_serve_")) == ("/api/v1/query", True)
            assert "application%3D%22llm%22%2Cdeployment%3D%22vLLM%3Achat%22" in query
            value = self.figures["processing" if "processing" in query else "queued"]
            result = [] if value is None else [{"metric": {}, "value": [1, str(value)]}]
            incoming.respond(200, json.dumps({"status": "success", "data": {"result": result}}).encode())


def told(story: Callable[[Stub, ExternalScaler], Coroutine[Any, Any, None]], **target: Any) -> None:
    async def run() -> None:
        stub = Stub()
        server = await serve(stub.handle, host="127.0.0.1", port=0)
        url = f"http://127.0.0.1:{server.port}"
        decisions = Decisions(
            policy="ray-serve",
            settings={"upscale_delay": 0, "downscale_delay": 0, "look_back": "1s"},
            profile="llama-3.1-8b/a100/tp1",
            workload=Workload(),
        )
        where = Target(
            **{"application": "llm", "deployment": "vLLM:chat", "dashboard": url, "prometheus": url, **target}
        )
        scaler = ExternalScaler(where, decisions)
        try:
            await story(stub, scaler)
        finally:
            await scaler.close()
            await server.close(0.1)

    asyncio.run(run())


def test_the_target_is_read_decided_and_set() -> None:
    async def story(stub: Stub, scaler: ExternalScaler) -> None:
        assert await scaler.step(0.0) is None
        stub.figures = {"processing": 30.0, "queued": 18.0}
        assert await scaler.step(10.0) == 3
        assert stub.posted == [(SCALE, {"target_num_replicas": 3}, b"Bearer t")]
        stub.figures = {"processing": 3.0, "queued": None}
        assert await scaler.step(20.0) == 1
        assert stub.replicas == 1

    told(story, token="t")


def test_a_load_that_is_not_known_scales_nothing() -> None:
    async def story(stub: Stub, scaler: ExternalScaler) -> None:
        stub.replicas = 3
        assert await scaler.step(0.0) is None or stub.posted
        stub.posted.clear()
        stub.figures = {"processing": None, "queued": None}
        assert await scaler.step(100.0) is None
        assert not stub.posted

    told(story)


@pytest.mark.parametrize(
    ("target", "enabled", "message"),
    [
        ({}, False, "set external_scaler_enabled: true"),
        ({"application": "other"}, True, "Ray Serve has no deployment 'vLLM:chat' in 'other'"),
        ({"dashboard": "http://127.0.0.1:9"}, True, "GET /api/serve/applications/: "),
    ],
)
def test_what_cannot_be_asked_or_told_is_said(target: dict[str, Any], enabled: bool, message: str) -> None:
    async def story(stub: Stub, scaler: ExternalScaler) -> None:
        stub.enabled = enabled
        stub.figures = {"processing": 100.0, "queued": 0.0}
        with pytest.raises(ScalerError, match=message):
            await scaler.step(0.0)

    told(story, **target)


def test_bounds_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_replicas is 3; it must be 0 to max_replicas \(2"):
        Target(application="a", deployment="d", min_replicas=3, max_replicas=2)
