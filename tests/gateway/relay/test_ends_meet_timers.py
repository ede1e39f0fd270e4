"""An engine's last word comes in the same turn of the loop as a timer that takes the request away from that engine.

The timer was due before, so it counts first: what the engine said then is about work that is no longer there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chiron.control.plane import ControlPlane
from chiron.core.types import Request
from chiron.net.server import Incoming
from live_gateway import until
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
REST = chunk("ne") + chunk("", **LAST) + chunk("", choices=[], usage=USAGE) + b"data: [DONE]\n\n"


def ends(incoming: Incoming) -> None:
    incoming.write(REST)
    incoming.finish()


def dies(incoming: Incoming) -> None:
    incoming.abort()


def evict(plane: ControlPlane, request: Request) -> None:
    assert request.instance is not None
    plane._evictor.evict(plane.models[request.model], request)


@pytest.mark.parametrize("last", [ends, dies])
def test_work_that_is_evicted_as_it_ends_is_answered_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: Callable[[Incoming], None]
) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine) as (service, origin):
            reader = Reader(origin, body(service_tier="flex"))
            await until(lambda: engine.seen, "it runs")
            engine.seen[0].start(200, SSE)
            engine.seen[0].write(chunk("fi"))
            (request,) = service.desk.open.values()
            await until(lambda: request.first_token_s >= 0.0, "it has a token")
            service.clock.call_later(0.0, lambda: evict(service.plane, request))
            last(engine.seen[0])
            await until(lambda: len(engine.seen) == 2, "it runs again")
            engine.seen[1].start(200, SSE)
            engine.seen[1].write(chunk("fi"))
            ends(engine.seen[1])
            answer = json.loads((await reader.end()).data)
            assert answer["choices"][0]["message"]["content"] == "fine"
            (live,) = service.engines.live.values()
            assert (live.runs, live.observer.inside, service.plane.open_requests) == ({}, 0, 0)
        assert len(engine.seen) == 2

    asyncio.run(main())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("last", [ends, dies])
def test_a_request_that_runs_out_of_time_as_it_ends_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: Callable[[Incoming], None]
) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine) as (service, origin):
            reader = Reader(origin, body(stream=True))
            await until(lambda: engine.seen, "it runs")
            engine.seen[0].start(200, SSE)
            engine.seen[0].write(chunk("fi"))
            await until(lambda: reader.data, "it has a token")
            (request,) = service.desk.open.values()
            service.clock.call_later(0.0, lambda: service.plane.cancel(request))
            last(engine.seen[0])
            await reader.end()
            await until(lambda: not service.desk.open, "it is over")
            (live,) = service.engines.live.values()
            assert (live.runs, live.observer.inside, service.plane.open_requests) == ({}, 0, 0)
            assert live.instance.requests == live.instance.evicting == {}

    asyncio.run(main())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
