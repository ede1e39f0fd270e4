"""A whole gateway on this loop, before engines that it starts. For tests that look inside."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from chiron.config.serve import load_serve
from chiron.core.types import Instance
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.service import Service
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


@asynccontextmanager
async def serving(directory: Path, text: str) -> AsyncIterator[Service]:
    """The gateway that ``text`` (TOML) and ``BESIDES`` configure; its engines are stopped with it."""
    (directory / "chiron.toml").write_text(text + BESIDES)
    service = Service(load_serve(directory / "chiron.toml", [], None))
    try:
        await service.start()
        yield service
    finally:
        await service.stop(0.1)


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
    origin = Origin(url)
    try:
        body = json.dumps({"model": "toy", "temperature": 0, "ignore_eos": True} | fields).encode()
        headers = {"content-type": "application/json"}
        answer = await origin.fetch("POST", path, body=body, headers=headers, timeout_s=timeout_s)
    finally:
        await origin.close()
    assert answer.status == 200, answer.body
    found: dict[str, Any] = json.loads(answer.body)
    return found
