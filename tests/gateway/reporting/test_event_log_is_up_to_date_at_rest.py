"""Lines of the event log are made several at a time; the last ones do not wait for more to happen."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.net.server import Incoming
from chiron.telemetry.event_log import read_event_log
from live_gateway import until
from scripted_engine import ScriptedEngine, before


def engine(incoming: Incoming) -> None:
    incoming.respond(200, b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}')


def log_of(service: Service) -> set[str]:
    path = service.config.event_log
    assert path is not None
    return {event["event"] for event in read_event_log(path)} if path.exists() else set()


def test_the_end_of_the_last_request_is_in_the_log_though_nothing_more_happens(tmp_path: Path) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(engine)) as (service, origin):
            body = json.dumps({"model": "m", "prompt": "hi"}).encode()
            answer = await Origin.fetch(origin, "POST", "/v1/completions", body=body)
            assert answer.status == 200, answer
            await until(lambda: {"arrival", "ended"} <= log_of(service), "its end is in the log")

    asyncio.run(main())
