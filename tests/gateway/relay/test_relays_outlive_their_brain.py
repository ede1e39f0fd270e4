"""A brain dies: streams go on, what comes is held, and the next brain is told what runs, once."""

from __future__ import annotations

import asyncio

from outliving_site import OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual


def test_streams_go_on_and_what_comes_is_held_until_another_brain_leads() -> None:
    async def main() -> None:
        site = OutlivingSite()
        await site.lead()
        await asyncio.sleep(1.0)
        running = {number: 20 + number for number in range(1, 5)}
        for number, tokens in running.items():
            site.ask(number, tokens)
        site.ask(5, 4)  # No room: it waits.
        await asyncio.sleep(0.5)
        assert sum(engine.running.total() for engine in site.engines) == 4
        site.kill()
        await asyncio.sleep(0.2)
        site.ask(6, 4)
        await asyncio.sleep(0.3)
        assert parts(site.clients[6])[0] == 0

        brain = await site.lead()
        await asyncio.sleep(0.6)  # Longer than a relay waits before it tries again.
        assert not brain.gateway.plane.settling
        assert {i.sequences for i in brain.gateway.plane.instances.values()} == {2}
        assert brain.gateway.plane.open_requests == 6
        await asyncio.sleep(10.0)

        for number in site.clients:
            assert parts(site.clients[number]) == (200, whole_stream(number, running.get(number, 4)))
        assert all(len(each) == 1 for each in brain.ends.outcomes.values())
        assert sorted(brain.ends.tokens.values()) == sorted([*running.values(), 4, 4])
        assert brain.gateway.plane.open_requests == 0
        assert [engine.most for engine in site.engines] == [2, 2]
        assert brain.fleet.used == {1: "memory:engine-0", 2: "memory:engine-1"}
        assert sorted(number for engine in site.engines for number in engine.seen) == [1, 2, 3, 4, 5, 6]
        await site.close()

    run_virtual(main())
