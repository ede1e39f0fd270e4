"""A whole gateway on this loop, before engines that it starts. For tests that look inside."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chiron.config.serve import load_serve
from chiron.core.types import Instance
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.processes.relay import RelayServer
from chiron.gateway.processes.reserved import reserve
from chiron.gateway.processes.start import BrainStart, RelayStart
from chiron.gateway.service import Service
from chiron.gateway.settings import ServeConfig
from chiron.net.client import Origin

BESIDES = """
[server]
port = 0
[telemetry]
scrape_period = "200ms"
[fleet]
usage_period = "1s"
"""
COMPLETIONS = "/v1/completions"


class LoopRelays:
    """Relays on this loop, beside the brain that they speak to: everything but their processes."""

    def __init__(self, config: ServeConfig, count: int) -> None:
        self.running: list[RelayServer] = []
        self._config = config
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = reserve(config.server.host, config.server.port)
        self._folder = tempfile.mkdtemp(prefix="chiron-")
        self.start = RelayStart(port=self._port.number, folder=Path(self._folder), relays=count)

    def open(self) -> None:
        """The brain listens for them."""
        for _ in range(self.start.relays):
            task = asyncio.get_running_loop().create_task(self._keep())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def die(self, server: RelayServer) -> None:
        """As when its process is killed: all its connections are cut."""
        server.relay.uplink.wire.abort()
        server.over.set()

    async def _keep(self) -> None:
        """One at a time, and another when it has ended."""
        while not self._closed:
            server = RelayServer(self._config, self.start)
            self.running.append(server)
            await server.join()
            await server.over.wait()
            self.running.remove(server)
            await server.close()

    async def close(self) -> None:
        self._closed = True
        for server in self.running:
            server.over.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._port.close()
        shutil.rmtree(self._folder)


RELAYS: dict[Path, LoopRelays] = {}
"""Of gateways that run with relays, by their directory."""


@asynccontextmanager
async def serving(directory: Path, text: str, relays: int = 0, changes: Sequence[str] = ()) -> AsyncIterator[Service]:
    """The gateway that ``text`` (TOML), ``BESIDES`` and ``changes`` configure; its engines are stopped with it."""
    (directory / "chiron.toml").write_text(text + BESIDES)
    config = load_serve(directory / "chiron.toml", list(changes), None)
    there = LoopRelays(config, relays) if relays else None
    brain = None
    if there is not None:
        RELAYS[directory] = there
        brain = BrainStart(relays=there.start, opened=there.open)
    service = Service(config, brain=brain)
    try:
        await service.start()
        yield service
    finally:
        await service.stop(0.1)
        if there is not None:
            await there.close()
            del RELAYS[directory]


async def until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """What the condition says once it is true."""
    end_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)
    return found


async def ready(service: Service) -> tuple[Instance, InstanceEngine]:
    """The one instance, once it is ready."""

    def found() -> InstanceEngine | None:
        return next(iter(service.engines.live.values()), None)

    engine: InstanceEngine = await until(found, "an engine is ready")
    return engine.instance, engine


async def ask(url: str, path: str = COMPLETIONS, *, timeout_s: float = 60.0, **fields: Any) -> dict[str, Any]:
    """One answer in one piece."""
    origin = Origin(url, connect_timeout_s=60.0)
    try:
        body = json.dumps({"model": "toy", "temperature": 0, "ignore_eos": True} | fields).encode()
        headers = {"content-type": "application/json"}
        answer = await origin.fetch("POST", path, body=body, headers=headers, timeout_s=timeout_s)
    finally:
        await origin.close()
    assert answer.status == 200, answer.body
    found: dict[str, Any] = json.loads(answer.body)
    return found
