"""Errors of clients: what an engine refuses for what is wrong with it is neither attained nor missed, and no load."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from chiron.gateway.reporting.status import status
from chiron.net.server import Incoming
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk

GOOD = chunk("a") + chunk("b", usage={"prompt_tokens": 5, "completion_tokens": 2}) + b"data: [DONE]\n\n"


def act(incoming: Incoming) -> None:
    """As the first word of the prompt says."""
    said = int(incoming.body.split(b"status ")[1][:3]) if b"status " in incoming.body else 200
    if said == 200:
        incoming.start(200, SSE)
        incoming.write(GOOD)
        incoming.finish()
    else:
        incoming.respond(said, b'{"error": {"message": "n: 2 is not supported"}}')


def asking(code: int, stream: bool) -> bytes:
    return body(messages=[{"role": "user", "content": f"status {code} " + 4000 * "x"}], stream=stream)


@pytest.mark.parametrize("stream", [True, False])
def test_refused_requests_are_a_category_of_their_own_and_teach_nothing(tmp_path: Path, stream: bool) -> None:
    async def told() -> None:
        async with before(tmp_path, ScriptedEngine(act)) as (service, origin):
            for _ in range(3):
                await Reader(origin, body(stream=True)).end()
            state = service.plane.models["m"]
            known = state.learner.mixes["chat"].view()
            for code in (400, 404, 413, 422, 400):
                refused = await Reader(origin, asking(code, stream)).end()
                assert refused.status == code
                assert b"not supported" in refused.data, "in the engine's own words"
            seen = status(service.plane.snapshot(), service.journal, service.around())
            (cls,) = [c for c in seen["models"][0]["classes"] if c["arrived"]]
            assert (cls["finished"], cls["rejected"], cls["failed"]) == (3, 5, 0)
            assert (cls["attained"], cls["missed"]) == (3, 0)
            assert seen["client_errors"] == 5
            page = service.metrics.render().decode()
            assert re.search(r'chiron_requests_total\{[^}]*outcome="rejected"\} 5.0', page)
            assert service.result().summary["attainment"] == {"chat": 1.0}
            assert state.learner.mixes["chat"].view() == known
            memory = (service.plane.fleet_state or {}).get("m")
            remembered = memory.history.counts.sum() if memory is not None else 0.0
            assert remembered + sum(a.requests for a in state.arrivals(service.clock.elapsed_s() + 1.0)) == 3
            square = next(iter(service.plane.instances.values())).prefill_square_total
            assert square < 3 * 100**2, "no prompt that was refused was prefilled"

    asyncio.run(told())


@pytest.mark.parametrize("code", [401, 403, 501])
def test_what_an_engine_says_of_the_gateway_is_a_failure(tmp_path: Path, code: int) -> None:
    async def told() -> None:
        async with before(tmp_path, ScriptedEngine(act)) as (service, origin):
            assert (await Reader(origin, asking(code, False)).end()).status == code
            tally = service.journal.tallies["m", "chat"]
            assert (tally.outcomes["failed"], tally.outcomes["rejected"], tally.missed) == (1, 0, 1)

    asyncio.run(told())
