"""While there is no brain relays hold, place and cut off by themselves, within bounds."""

from __future__ import annotations

import asyncio

from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from chiron.gateway.relay.uplink.alone import UNABLE_S
from chiron.gateway.relay.uplink.joining import StaySettings
from outliving_site import STEP_S, OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual

NEVER_S = 1e6


def test_what_waits_for_a_brain_is_bounded_in_time_number_and_bytes() -> None:
    async def main() -> None:
        site = OutlivingSite(stay=StaySettings(hold_s=2.0, hold_max=2, hold_max_bytes=400, fall_back_s=NEVER_S))
        await site.lead()
        await asyncio.sleep(1.0)
        site.kill()
        await asyncio.sleep(0.1)
        site.ask(1, 4)
        site.ask(2, 400)
        site.ask(3, 4)  # One too many.
        await asyncio.sleep(0.1)
        assert [parts(site.clients[number])[0] for number in (1, 2, 3)] == [0, 0, 503]
        await asyncio.sleep(2.5)
        for number in (1, 2, 3):
            status, body = parts(site.clients[number])
            assert (status, b"retry-after: 1" in b"".join(site.clients[number].received).lower()) == (503, True)
            assert b"control plane" in body
        site.ask(4, 4, padding=400)
        await asyncio.sleep(0.1)
        assert parts(site.clients[4])[0] == 503, "too large"
        site.ask(5, 4)
        brain = await site.lead()
        await asyncio.sleep(5.0)
        assert parts(site.clients[5]) == (200, whole_stream(5, 4))
        assert brain.relays.expired == 2
        await site.close()

    run_virtual(main())


def test_a_stream_whose_engine_fails_meanwhile_ends_with_an_error_and_one_that_has_not_begun_runs_again() -> None:
    async def main() -> None:
        site = OutlivingSite()
        await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 30)
        await asyncio.sleep(1.0)
        site.ask(2, 30)
        await asyncio.sleep(STEP_S / 2)
        site.kill()
        for engine in site.engines:
            await engine.server.close(0)
        await asyncio.sleep(0.5)
        assert b"engine was lost" in parts(site.clients[1])[1]
        assert parts(site.clients[2])[0] == 0
        brain = await site.lead()
        await asyncio.sleep(20.0)
        assert parts(site.clients[2]) == (200, whole_stream(2, 30))
        assert sorted(request.outcome for request in brain.ends.requests) == ["failed", "finished"]
        await site.close()

    run_virtual(main())


def test_relays_place_what_waits_once_the_brain_has_been_silent() -> None:
    async def main() -> None:
        site = OutlivingSite(slots=4, relays=2, stay=StaySettings(hold_s=30.0, fall_back_s=1.0, fall_back_batch_s=4.0))
        await site.lead()
        await asyncio.sleep(2.5)  # Relays have been told how full an instance may be.
        site.kill()
        for number in range(1, 7):
            site.ask(number, 40)
        await asyncio.sleep(0.5)
        assert all(engine.running.total() == 0 for engine in site.engines), "a brain may come within a second"
        await asyncio.sleep(1.0)
        assert [engine.running.total() for engine in site.engines] == [2, 2], "half of each: there are two relays"
        site.ask(7, 8, relay=1, cls="night")
        await asyncio.sleep(0.5)
        assert [engine.running.total() for engine in site.engines] == [3, 2]
        await asyncio.sleep(2.5)
        site.ask(8, 8, relay=1, cls="night")
        site.ask(9, 8, relay=1)
        await asyncio.sleep(1.5)
        ran = [number for engine in site.engines for number in engine.seen]
        assert (8 in ran, 9 in ran) == (False, True), "no batch work after a while"

        brain = await site.lead()
        await asyncio.sleep(0.6)
        assert sum(i.sequences for i in brain.gateway.plane.instances.values()) == brain.gateway.plane.open_requests
        await asyncio.sleep(20.0)
        assert all(parts(client)[0] == 200 for client in site.clients.values())
        assert len(brain.ends.requests) == 9
        assert brain.relays.own_placements == 6
        assert max(engine.most for engine in site.engines) <= 4
        await site.close()

    run_virtual(main())


def test_a_relay_serves_no_more_once_a_request_has_found_no_engine_for_all_of_its_wait() -> None:
    """Others may lead, and know where engines are by now. It comes back: they may lack a brain as well."""

    async def main() -> None:
        site = OutlivingSite(engines=1, slots=1, stay=StaySettings(hold_s=4.0))
        uplink = site.relays[0].uplink
        await site.lead()
        await asyncio.sleep(2.5)
        site.kill()
        site.ask(1, 80)  # Eleven seconds with its wait.
        await asyncio.sleep(1.5)
        site.ask(2, 4)  # Full. It waits from now on, and nothing is answered meanwhile.
        await asyncio.sleep(3.5)
        assert uplink.serves
        await asyncio.sleep(1.0)
        assert (parts(site.clients[2])[0], uplink.serves) == (503, False)
        await asyncio.sleep(6.0)
        assert (parts(site.clients[1]), uplink.serves) == ((200, whole_stream(1, 80)), True), "an engine answers"

        site.network.cut("engine-0")
        site.ask(3, 4)
        await asyncio.sleep(5.0)
        assert (parts(site.clients[3])[0], uplink.serves) == (503, False)
        await asyncio.sleep(UNABLE_S - 5.0)
        assert not uplink.serves
        await asyncio.sleep(6.0)
        assert uplink.serves, "if all are like this one, nobody else would take a request"
        site.ask(4, 4)
        await asyncio.sleep(5.0)
        assert not uplink.serves
        await site.lead()
        await asyncio.sleep(1.0)
        assert uplink.serves, "a brain leads"
        await site.close()

    run_virtual(main())


def test_while_engines_answer_a_wait_in_vain_says_that_they_are_busy_and_no_more() -> None:
    async def main() -> None:
        site = OutlivingSite(engines=1, slots=1, stay=StaySettings(hold_s=4.0))
        uplink = site.relays[0].uplink
        await site.lead()
        await asyncio.sleep(2.5)
        site.kill()
        for number in range(1, 6):
            site.ask(number, 16)
        serves = []
        for _ in range(40):
            await asyncio.sleep(0.25)
            serves.append(uplink.serves)
        assert all(serves)
        assert [parts(client)[0] for client in site.clients.values()].count(503) >= 2
        await site.close()

    run_virtual(main())


def test_what_takes_too_long_is_cut_off_though_no_brain_counts_it() -> None:
    async def main() -> None:
        site = OutlivingSite(engines=3, request_timeout_s=5.0)
        await site.lead()
        await asyncio.sleep(1.0)
        for number in range(1, 7):
            site.ask(number, 400, stream=number % 2 == 0)
        await asyncio.sleep(0.5)
        site.kill()
        site.urls.pop()
        uncounted = [number for number in site.engines[2].running if site.engines[2].running[number]]
        await site.lead()
        await asyncio.sleep(1.0)
        site.kill()  # Of the others nobody knows any more, either.
        await asyncio.sleep(6.0)
        assert len(uncounted) == 2
        assert [engine.running.total() for engine in site.engines] == [0, 0, 0]
        for number, client in site.clients.items():
            status, body = parts(client)
            assert (status == 200 and b"longer than 5 s" in body) if number % 2 == 0 else body or status == 504
        assert site.relays[0].uplink.held == {}
        brain = await site.lead()
        await asyncio.sleep(1.0)
        assert [request.outcome for request in brain.ends.requests] == ["cancelled"] * 4
        await site.close()

    run_virtual(main())


def test_a_key_owes_a_minute_at_the_most_for_what_nobody_counted() -> None:
    async def main() -> None:
        key = Key(name="k", hash=hash_secret(b"s"), requests_per_minute=4)
        site = OutlivingSite(keys=KeyRing([key]), stay=StaySettings(fall_back_s=1.0))
        await site.lead()
        await asyncio.sleep(2.5)
        site.kill()
        for number in range(1, 21):  # Over five minutes: within what the key allows.
            site.ask(number, 2, secret="s")
            await asyncio.sleep(15.0)
        await site.lead()
        await asyncio.sleep(76.0)
        site.ask(21, 2, secret="s")
        await asyncio.sleep(5.0)
        assert [parts(client)[0] for client in site.clients.values()] == [200] * 21
        await site.close()

    run_virtual(main())


def test_relays_together_place_no_more_than_there_are_places() -> None:
    async def main() -> None:
        site = OutlivingSite(engines=1, slots=3, relays=2, stay=StaySettings(hold_s=30.0, fall_back_s=1.0))
        await site.lead()
        await asyncio.sleep(2.5)
        site.kill()
        for number in range(1, 7):
            site.ask(number, 8, relay=number % 2)
        await asyncio.sleep(15.0)
        assert all(parts(client)[0] == 200 for client in site.clients.values())
        assert site.engines[0].most == 2
        await site.close()

    run_virtual(main())
