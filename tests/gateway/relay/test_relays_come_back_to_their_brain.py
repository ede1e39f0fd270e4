"""A relay and its brain lose each other, and what they had goes on where it was."""

from __future__ import annotations

import asyncio

from chiron.gateway.brain.relays import REJOIN_S
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import Wire
from chiron.gateway.relay.uplink.joining import StaySettings
from outliving_site import OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual


def test_a_brain_that_hangs_is_given_up_when_something_waits() -> None:
    async def main() -> None:
        site = OutlivingSite(stay=StaySettings(fall_back_s=1.0))
        await site.lead()
        await asyncio.sleep(2.5)
        site.ask(1, 60)
        await asyncio.sleep(0.5)
        site.hang()
        await asyncio.sleep(3.0)
        assert site.relays[0].uplink.wire.up, "nobody needs it"
        site.ask(2, 4)
        await asyncio.sleep(0.5)
        assert not site.relays[0].uplink.wire.up
        await asyncio.sleep(2.0)
        assert parts(site.clients[2]) == (200, whole_stream(2, 4))
        await site.lead()
        await asyncio.sleep(8.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 60))
        await site.close()

    run_virtual(main())


def test_a_relay_that_comes_back_to_the_brain_that_it_lost_goes_on_where_it_was() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        for number in range(1, 9):
            site.ask(number, 10 + number)
        waits, leaves = site.ask(9, 5), site.ask(10, 5)
        await asyncio.sleep(0.5)
        for pause_s in (0.01, 0.6, 0.3):
            brain.links[-1].abort()
            await asyncio.sleep(0.01)
            leaves.transport.abort()
            await asyncio.sleep(pause_s)
        await asyncio.sleep(20.0)
        for number in range(1, 9):
            assert parts(site.clients[number]) == (200, whole_stream(number, 10 + number))
        assert parts(waits)[0] == 200
        outcomes = [request.outcome for request in brain.ends.requests]
        assert sorted(outcomes) == ["cancelled", *["finished"] * 9]
        assert [engine.most for engine in site.engines] == [2, 2]
        assert (brain.relays.links[0].before, len(brain.relays.links)) == (None, 1)
        await site.close()

    run_virtual(main())


def test_a_relay_that_does_not_come_back_is_forgotten_soon() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 100)
        await asyncio.sleep(0.5)
        site.relays[0].uplink.link.close()
        site.relays[0].uplink.wire.abort()
        await asyncio.sleep(REJOIN_S / 2)
        assert brain.gateway.plane.open_requests == 1
        await asyncio.sleep(REJOIN_S)
        assert brain.gateway.plane.open_requests == 0
        assert [i.sequences for i in brain.gateway.plane.instances.values()] == [0, 0]
        await site.close()

    run_virtual(main())


def test_a_stream_that_began_as_its_instance_failed_is_not_begun_again() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        link = brain.relays.links[0]
        hears = link.hears
        link.hears = lambda said: None if isinstance(said, m.FirstToken) else hears(said)  # It has not come yet.
        site.ask(1, 30)
        await asyncio.sleep(0.5)
        (request,) = brain.gateway.desk.open.values()
        instance = request.instance
        assert instance is not None
        brain.clock.post(lambda: brain.engines.instance_failed(instance, "it is gone"))
        await asyncio.sleep(6.0)
        _, body = parts(site.clients[1])
        assert body.count(b"1.0 ") == 1
        assert b"engine was lost" in body
        assert [request.outcome for request in brain.ends.requests] == ["failed"]
        await site.close()

    run_virtual(main())


def test_what_ended_at_the_relay_while_its_brain_had_begun_it_anew_ends_there_too() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 4, cls="night")
        site.ask(2, 40)
        await asyncio.sleep(0.3)
        site.door.forget("brain")
        brain.links[-1].abort()
        await asyncio.sleep(0.1)
        (request,) = [each for each in brain.gateway.desk.open.values() if not each.interactive]
        assert request.instance is not None
        evictor, state = brain.gateway.plane._evictor, brain.gateway.plane.models["m0"]
        brain.clock.post(lambda: evictor.evict(state, request))
        await asyncio.sleep(0.5)
        assert parts(site.clients[1])[0] == 200
        assert request.outcome is None
        site.door.listen("brain", brain.accept)
        await asyncio.sleep(1.0)
        made = len(brain.links)
        await asyncio.sleep(5.0)
        assert (len(brain.links), made) == (2, 2), "it came back once"
        assert parts(site.clients[2]) == (200, whole_stream(2, 40))
        assert all(len(each) == 1 for each in brain.ends.outcomes.values())
        assert brain.gateway.plane.open_requests == 0
        await site.close()

    run_virtual(main())


def test_a_brain_that_breaks_off_each_time_is_asked_less_often() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        accept = brain.accept

        def breaks_off() -> Wire:
            wire = accept()
            wire._received = lambda messages: wire.give_up("it does not like what it hears")
            return wire

        await asyncio.sleep(4.0)
        site.door.forget("brain")
        site.door.listen("brain", breaks_off)
        brain.links[-1].abort()
        await asyncio.sleep(10.0)
        assert 10 < len(brain.links) < 30
        site.door.forget("brain")
        site.door.listen("brain", accept)
        await asyncio.sleep(1.0)
        site.ask(1, 4)
        await asyncio.sleep(2.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 4))
        await site.close()

    run_virtual(main())


def test_a_client_whose_instance_failed_while_its_relay_was_away_hears_that_it_did() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 30)
        await asyncio.sleep(0.5)
        site.door.forget("brain")
        brain.links[-1].abort()
        await asyncio.sleep(0.1)
        (request,) = brain.gateway.desk.open.values()
        instance = request.instance
        assert instance is not None
        brain.clock.post(lambda: brain.engines.instance_failed(instance, "it is gone"))
        site.door.listen("brain", brain.accept)
        await asyncio.sleep(2.0)
        assert b"engine was lost" in parts(site.clients[1])[1]
        assert [engine.running.total() for engine in site.engines] == [0, 0]
        await site.close()

    run_virtual(main())
