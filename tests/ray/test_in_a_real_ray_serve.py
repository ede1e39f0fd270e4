"""Chiron's policies scale deployments of a real Ray Serve: inside its controller, and by its external scaler."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from chiron.net.client import NetError, Origin
from chiron.net.server import Incoming, serve
from chiron.ray import ExternalScaler
from chiron.ray.decisions import Decisions
from chiron.ray.external import Target
from chiron.ray.load import Workload
from ray_nodes import ATTEMPTS, TOO_BUSY
from ray_serve_apps import QUICK
from ray_site import PATIENCE, end_marked, needs_ray

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_ray]
PROGRAM = Path(__file__).parent.parent / "support" / "processes" / "ray_serve_apps.py"
PATIENCE_S = 600.0
CLIENTS = 12
_SERIES = re.compile(r"^(\w+)\{(.*)\} (\S+)")
_WANTED = re.compile(r'sum\((\w+)\{application="(.*)",deployment="(.*)"\}\)')


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory:
        mark = os.path.basename(directory)
        with subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | PATIENCE | {"CHIRON_TEST_RAY": mark, "RAY_TMPDIR": directory},
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line and process.wait() == TOO_BUSY:
                    pytest.skip(f"Ray could not start on this machine in {ATTEMPTS} attempts of half a minute")
                assert line, f"it has ended with status {process.wait()}"
                yield json.loads(line)
            finally:
                assert process.stdin is not None
                process.stdin.close()
                try:
                    process.wait(PATIENCE_S)
                finally:
                    end_marked(mark)


class Clients:
    """Each sends one request after the other until it is told to stop."""

    def __init__(self, url: str, path: str, count: int = CLIENTS) -> None:
        self.statuses: set[int] = set()
        self._url, self._path = url, path
        self._going = True
        self._tasks = [asyncio.ensure_future(self._run()) for _ in range(count)]

    async def _run(self) -> None:
        origin = Origin(self._url)
        while self._going:
            self.statuses.add((await origin.fetch("GET", self._path, timeout_s=PATIENCE_S)).status)
        await origin.close()

    async def stop(self) -> None:
        self._going = False
        await asyncio.gather(*self._tasks)
        assert self.statuses == {200}


async def replicas(urls: dict[str, str], application: str) -> int:
    """That run, as Ray Serve says."""
    origin = Origin(urls["dashboard"], keepalive=False)
    try:
        said = json.loads((await origin.fetch("GET", "/api/serve/applications/", timeout_s=60.0)).body)
    finally:
        await origin.close()
    found = said["applications"][application]["deployments"]["Model"]["replicas"]
    return sum(1 for each in found if each["state"] == "RUNNING")


async def until(urls: dict[str, str], application: str, enough: Callable[[int], bool], what: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not enough(await replicas(urls, application)):
            await asyncio.sleep(0.5)
    assert what


@pytest.mark.parametrize("policy", ["chiron", "ray-serve"])
def test_replicas_follow_a_policy_inside_its_controller(policy: str, urls: dict[str, str]) -> None:
    async def story() -> None:
        assert await replicas(urls, policy) == 1
        clients = Clients(urls["http"], f"/{policy}")
        await until(urls, policy, lambda count: count >= 3, "more replicas under load")
        await clients.stop()
        if policy == "ray-serve":  # The other one keeps its headroom for as long as it remembers the load.
            await until(urls, policy, lambda count: count == 1, "fewer after it")

    asyncio.run(story())


def test_replicas_follow_the_external_scaler(urls: dict[str, str]) -> None:
    """The figures are Ray's own; what adds them up stands for a Prometheus."""

    async def story() -> None:
        prometheus = await serve(lambda incoming: answer(incoming, urls["metrics"]))
        decisions = Decisions(
            policy="ray-serve",
            settings=QUICK,
            profile="llama-3.1-8b/a100/tp1",
            workload=Workload(output_tokens=50, cold_start_s=1.0),
        )
        target = Target(
            application="beside",
            deployment="Model",
            max_replicas=4,
            dashboard=urls["dashboard"],
            prometheus=f"http://127.0.0.1:{prometheus.port}",
        )
        scaler = ExternalScaler(target, decisions)
        running = asyncio.ensure_future(scaler.run())
        clients = Clients(urls["http"], "/beside")
        await until(urls, "beside", lambda count: count >= 3, "more replicas under load")
        await clients.stop()
        await until(urls, "beside", lambda count: count == 1, "fewer after it")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await scaler.close()
        await prometheus.close(0.0)

    asyncio.run(story())


TASKS: set[asyncio.Task[None]] = set()


def answer(incoming: Incoming, metrics: str) -> None:
    """An instant query over what Ray exports now."""

    async def tell() -> None:
        query = parse_qs(incoming.query.decode())["query"][0]
        wanted = _WANTED.fullmatch(query)
        assert wanted is not None, query
        found = [value for labels, value in await series(metrics, wanted[1]) if of(labels, wanted[2], wanted[3])]
        result = [{"metric": {}, "value": [0, str(sum(found))]}] if found else []
        incoming.respond(200, json.dumps({"status": "success", "data": {"result": result}}).encode())

    task = asyncio.ensure_future(tell())
    TASKS.add(task)
    task.add_done_callback(TASKS.discard)


def of(labels: str, application: str, deployment: str) -> bool:
    return f'application="{application}"' in labels and f'deployment="{deployment}"' in labels


async def series(metrics: str, name: str) -> list[tuple[str, float]]:
    origin = Origin(metrics, keepalive=False)
    try:
        page = (await origin.fetch("GET", "/metrics", timeout_s=60.0, body_max=64 << 20)).body.decode()
    except NetError:
        return []
    finally:
        await origin.close()
    found = (_SERIES.match(line) for line in page.splitlines())
    return [(each[2], float(each[3])) for each in found if each is not None and each[1] == name]
