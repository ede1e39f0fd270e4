"""Real requests among refused, lost, failed and cancelled ones, over sockets: only the real ones teach anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

from chiron.control.learning import Mix
from chiron.net.server import Incoming
from live_gateway import until
from scripted_engine import SSE, Reader, ScriptedEngine, before, body, chunk

TOKENS = (3, 40, 7, 12, 25)


def act(incoming: Incoming) -> None:
    """As the prompt says: how many tokens to make, or what to do instead."""
    said = incoming.body.split(b"please ")[1].split(b" ")[0].decode()
    if said.isdigit() and int(said) < 400:
        incoming.start(200, SSE)
        usage = {"prompt_tokens": 90, "completion_tokens": int(said)}
        incoming.write(b"".join(chunk("a") for _ in range(int(said) - 1)) + chunk("b", usage=usage))
        incoming.write(b"data: [DONE]\n\n")
        incoming.finish()
    elif said.isdigit():
        incoming.respond(int(said), b'{"error": {"message": "no"}}')
    elif said == "hang-up":
        incoming.abort()
    # Else it waits, until its client leaves.


def asking(what: object, characters: int = 360) -> bytes:
    return body(messages=[{"role": "user", "content": f"please {what} " + characters * "x"}], stream=True)


def test_a_history_of_failures_teaches_what_its_real_requests_teach(tmp_path: Path) -> None:
    async def told() -> None:
        engine = ScriptedEngine(act)
        async with before(tmp_path, engine) as (service, origin):
            plane = service.plane
            state = plane.models["m"]
            arrived = []
            for tokens in TOKENS:
                for never in (400, 422) if arrived else (400, 422, 500, "hang-up"):
                    await Reader(origin, asking(never, 9_000)).end()
                gone = Reader(origin, asking("wait", 9_000))
                await until(lambda: plane.open_requests, "it has come")
                gone.call.cancel()
                await until(lambda: not plane.open_requests, "it is gone")
                assert (await Reader(origin, asking(tokens)).end()).status == 200
                arrived.append(tokens)
            tally = service.journal.tallies["m", "chat"]
            assert tally.outcomes == {"finished": 5, "rejected": 10, "failed": 2, "cancelled": 5, "shed": 0}
            assert (tally.attained, tally.missed) == (5, 2), "failures are ours, refusals and cancels are not"
            mix, real = state.learner.mixes["chat"], Mix(state.classes["chat"])
            assert (mix.seen, mix.finished) == (5, 5)
            for tokens in TOKENS:
                real.made(tokens)
            assert (mix.output_mean, mix.output_square) == (real.output_mean, real.output_square)
            assert mix.input_mean < 200, "and not of prompts of more than 2,000 tokens"
            memory = (plane.fleet_state or {}).get("m")
            remembered = memory.history.counts.sum() if memory is not None else 0.0
            assert remembered + sum(a.requests for a in state.arrivals(service.clock.elapsed_s() + 1.0)) == 5
            instance = next(iter(plane.instances.values()))
            assert instance.prefill_square_total < 5 * 200**2
            assert state.itl_missed == 0.0
            assert plane.models["m"].planned["mixed"] == 1

    asyncio.run(told())
