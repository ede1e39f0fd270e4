"""A program that a client names is known to the brain, and to the one after it."""

from __future__ import annotations

import asyncio

from cascade_outliving import CascadeSite
from outliving_site import OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual


def test_a_program_is_told_to_each_brain() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 60, headers=["x-chiron-program: agent-7"])
        site.ask(2, 60)
        await asyncio.sleep(0.5)
        assert sorted(request.program for request in brain.gateway.plane.unfinished()) == ["", "agent-7"]
        site.kill()
        await asyncio.sleep(0.2)
        brain = await site.lead()
        await asyncio.sleep(1.0)
        assert sorted(request.program for request in brain.gateway.plane.unfinished()) == ["", "agent-7"]
        await asyncio.sleep(10.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 60))
        await site.close()

    run_virtual(main())


def test_both_calls_of_a_cascade_are_of_the_program() -> None:
    async def main() -> None:
        site = CascadeSite(after_tokens=3, logprob=-9.0)
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 60, model="c", headers=["x-chiron-program: agent-7"])
        seen: dict[int, str] = {}
        for _ in range(20):
            await asyncio.sleep(0.1)
            seen |= {request.id: request.program for request in brain.gateway.plane.unfinished()}
        assert list(seen.values()) == ["agent-7", "agent-7"]
        await asyncio.sleep(10.0)
        await site.close()

    run_virtual(main())


def test_a_bad_name_is_refused_before_anything_is_asked() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 60, headers=["x-chiron-program: two words"])
        await asyncio.sleep(0.5)
        status, body = parts(site.clients[1])
        assert status == 400
        assert b"x-chiron-program" in body
        assert not list(brain.gateway.plane.unfinished())
        await site.close()

    run_virtual(main())
