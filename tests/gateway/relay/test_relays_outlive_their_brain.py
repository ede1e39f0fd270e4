"""A brain dies: streams go on, what comes is held, and the next brain is told what runs, once."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from chiron.core.types import Request
from chiron.gateway.batch.call import BatchCall
from chiron.gateway.brain.desk import AGAIN_MAX
from chiron.gateway.brain.relays import ADOPTED_MAX, REJOIN_S
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import Wire
from chiron.gateway.relay.alone import UNABLE_S
from chiron.gateway.relay.body import read_body
from chiron.gateway.relay.front import WAIT_MAX_S
from chiron.gateway.relay.joining import StaySettings
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from chiron.runtime.replay import replay
from chiron.store.port import Item
from outliving_site import NIGHT, STEP_S, Brain, OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual

NEVER_S = 1e6


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
        assert sorted(request.tokens_done for request in brain.ends.requests) == sorted([*running.values(), 4, 4])
        assert brain.gateway.plane.open_requests == 0
        assert [engine.most for engine in site.engines] == [2, 2]
        assert brain.fleet.used == {1: "memory:engine-0", 2: "memory:engine-1"}
        again = replay(brain.log)
        assert (again.difference, again.placements) == ("", 6)
        kinds = {line["k"] for line in brain.log[1:] if line["event"] == "in"}
        assert {"take_over", "adopt_instance", "adopt_running", "told_all", "submit"} <= kinds
        assert sorted(number for engine in site.engines for number in engine.seen) == [1, 2, 3, 4, 5, 6]
        await site.close()

    run_virtual(main())


def test_a_brain_waits_for_the_relays_that_the_one_before_it_spoke_with_and_for_no_others() -> None:
    """It does not know how many there are."""

    async def main() -> None:
        site = OutlivingSite(relays=2)
        first = await site.lead()
        await asyncio.sleep(1.0)
        known = first.relays.known
        assert len(known) == 2
        site.kill()
        second = await site.lead(settle_s=60.0, awaited=known)
        await asyncio.sleep(1.0)
        assert not second.gateway.plane.settling
        site.kill()
        site.relays[0].uplink.close()  # Its machine is gone.
        await asyncio.sleep(0.1)
        third = await site.lead(settle_s=5.0, awaited=known)
        await asyncio.sleep(1.0)
        assert third.gateway.plane.settling
        assert third.relays.known == known, "if this one dies as well, the next one waits for both"
        assert site.relays[1].uplink.alone.relays == 2, "nobody takes more than its share meanwhile"
        await asyncio.sleep(5.0)
        assert not third.gateway.plane.settling
        assert len(third.relays.known) == site.relays[1].uplink.alone.relays == 1
        await site.close()

    run_virtual(main())


def test_streams_are_counted_on_instances_that_the_next_fleet_has_yet_to_find() -> None:
    async def main() -> None:
        site = OutlivingSite()
        await site.lead()
        await asyncio.sleep(1.0)
        for number in range(1, 4):
            site.ask(number, 40)
        await asyncio.sleep(1.0)
        site.kill()
        site.found_after_s = 2.0
        site.ask(4, 4)
        site.ask(5, 4)
        brain = await site.lead()
        await asyncio.sleep(1.5)
        plane = brain.gateway.plane
        assert not plane.settling, "all have told"
        assert sum(len(instance.requests) for instance in plane.instances.values()) == 3
        assert [parts(site.clients[number])[0] for number in (4, 5)] == [0, 0], "nothing goes where nobody has looked"
        await asyncio.sleep(10.0)
        for number, tokens in ((1, 40), (2, 40), (3, 40), (4, 4), (5, 4)):
            assert parts(site.clients[number]) == (200, whole_stream(number, tokens))
        assert max(engine.most for engine in site.engines) <= site.slots
        assert sorted(brain.fleet.used) == [1, 2], "the same instances, under their numbers"
        assert not replay(brain.log).difference
        await site.close()

    run_virtual(main())


@pytest.mark.parametrize(
    ("changed", "counted"),
    [({"context_tokens": 50_000}, True), ({"api_key": "another"}, False), ({"engine": "vllm"}, False)],
)
def test_what_runs_is_counted_unless_its_engine_is_spoken_to_in_another_way(
    changed: dict[str, Any], counted: bool
) -> None:
    async def main() -> None:
        site = OutlivingSite(engines=1)
        await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 30)
        await asyncio.sleep(0.5)
        site.kill()
        site.kind = replace(site.kind, **changed)
        for relay in site.relays:
            relay.renew(site.models().by_name, [site.kind])
        brain = await site.lead()
        await asyncio.sleep(1.0)
        plane = brain.gateway.plane
        assert sum(len(instance.requests) for instance in plane.instances.values()) == counted
        await asyncio.sleep(10.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 30))
        await site.close()

    run_virtual(main())


@pytest.mark.parametrize("comes", [True, False])
def test_a_request_for_a_model_that_only_the_next_brain_may_have_waits_for_it(comes: bool) -> None:
    async def main() -> None:
        site = OutlivingSite(models_change=True)
        await site.lead()
        await asyncio.sleep(1.0)
        (relay,) = site.relays
        relay.renew({}, [])
        site.ask(1, 4)
        await asyncio.sleep(0.1)
        assert parts(site.clients[1])[0] == 404, "whoever has a brain knows what it has"
        site.kill()
        await asyncio.sleep(0.1)
        for number in (2, 3):
            site.ask(number, 4)
        await asyncio.sleep(0.1)
        site.clients[3].transport.abort()
        await asyncio.sleep(1.0)
        assert parts(site.clients[2])[0] == 0
        if comes:
            site.connecting = lambda: relay.renew(site.models().by_name, [site.kind])
            await site.lead()
        await asyncio.sleep(3.0 if comes else WAIT_MAX_S)
        assert parts(site.clients[2]) == (200, whole_stream(2, 4)) if comes else parts(site.clients[2])[0] == 404
        assert sum(3 in engine.seen for engine in site.engines) == 0, "its client has left"
        assert relay.front._waiting == {}
        await site.close()

    run_virtual(main())


def test_what_ended_meanwhile_is_counted_once_with_the_time_that_it_took() -> None:
    async def main() -> None:
        site = OutlivingSite()
        await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 7)
        site.ask(2, 5, stream=False)
        site.ask(3, 6, cls="night")
        leaver = site.ask(4, 40)
        await asyncio.sleep(0.3)
        site.kill()
        leaver.transport.abort()
        await asyncio.sleep(3.0)
        assert [parts(site.clients[number])[0] for number in (1, 2, 3)] == [200, 200, 200], "nobody waits for a brain"
        assert len(site.relays[0].uplink.alone.untold) == 4
        stands = " This relay has had no control plane for 3 s: 0 of its requests wait, it carries 0."
        assert site.relays[0].uplink.how_it_stands() == stands

        brain = await site.lead()
        await asyncio.sleep(1.0)
        ended = brain.ends.requests
        assert sorted(request.outcome for request in ended) == ["cancelled", "finished", "finished", "finished"]
        assert sorted(request.tokens_done for request in ended if request.outcome == "finished") == [1, 6, 7]
        (streamed,) = [request for request in ended if request.tokens_done == 7]
        assert streamed.finish_s - streamed.first_token_s == pytest.approx(7 * STEP_S, abs=0.01)
        assert streamed.first_token_s - streamed.arrival_s == pytest.approx(STEP_S, abs=0.01)
        assert not site.relays[0].uplink.alone.untold
        await site.close()

    run_virtual(main())


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


def test_a_brain_that_is_over_is_refused_and_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        site = OutlivingSite()
        await site.lead(term=7)
        await asyncio.sleep(1.0)
        site.kill()
        old = await site.lead(term=6)
        await asyncio.sleep(2.0)
        assert old.relays.links == []
        assert set(old.superseded) == {7}
        site.ask(1, 4)
        await asyncio.sleep(0.1)
        assert parts(site.clients[1])[0] == 0
        site.kill()
        await site.lead(term=8)
        await asyncio.sleep(2.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 4))
        await site.close()

    run_virtual(main())
    assert "term is 6, and there has been one of term 7" in caplog.text


def test_what_runs_where_the_next_brain_knows_nothing_goes_on_uncounted() -> None:
    async def main() -> None:
        site = OutlivingSite(engines=3)
        await site.lead()
        await asyncio.sleep(1.0)
        for number in range(1, 7):
            site.ask(number, 30)
        await asyncio.sleep(0.5)
        site.kill()
        lost = site.urls.pop()
        brain = await site.lead()
        await asyncio.sleep(0.6)
        plane = brain.gateway.plane
        assert plane.open_requests == 4
        assert {i.sequences for i in plane.instances.values() if i.state == "ready"} == {2}
        assert lost not in [upstream.address.url for upstream in site.relays[0].uplink.upstreams.values()]
        await asyncio.sleep(10.0)
        assert [parts(client) for client in site.clients.values()] == [
            (200, whole_stream(number, 30)) for number in site.clients
        ]
        assert len(brain.ends.requests) == 4
        assert site.relays[0].uplink.held == {}
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
        site.relays[0].uplink.close()
        site.relays[0].uplink.wire.abort()
        await asyncio.sleep(REJOIN_S / 2)
        assert brain.gateway.plane.open_requests == 1
        await asyncio.sleep(REJOIN_S)
        assert brain.gateway.plane.open_requests == 0
        assert [i.sequences for i in brain.gateway.plane.instances.values()] == [0, 0]
        await site.close()

    run_virtual(main())


def test_items_of_batches_end_with_their_brain() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        done: list[Request] = []

        def submit(brain: Brain, tokens: int) -> None:
            asked = json.dumps({"model": "m0", "prompt": [1, tokens], "max_tokens": tokens}).encode()
            item = Item(
                batch_id="b",
                index=0,
                custom_id="c",
                model="m0",
                endpoint="/v1/completions",
                body=asked,
                deadline_s=1e9,
                attempts=0,
                owner="",
            )
            call = BatchCall(item, read_body(asked, False), 1 << 20, lambda call, request: done.append(request))
            call.request = Request(1000, "m0", NIGHT, brain.clock.now_s, 2, call)
            brain.clock.post(lambda: brain.gateway.inputs.submit(call.request))  # type: ignore[arg-type]

        submit(brain, 40)
        await asyncio.sleep(1.0)
        assert [engine.running.total() for engine in site.engines] == [0, 1]
        site.kill()
        await asyncio.sleep(0.1)
        assert [engine.running.total() for engine in site.engines] == [0, 0], "the store has it"
        assert site.relays[0].uplink.held == {}
        second = await site.lead()
        await asyncio.sleep(1.0)
        submit(second, 8)
        await asyncio.sleep(3.0)
        assert [request.outcome for request in done] == ["finished"]
        assert done[0].payload.result().ok
        await site.close()

    run_virtual(main())


def test_a_brain_takes_no_more_of_what_waits_than_a_few_times_its_queue() -> None:
    async def main() -> None:
        site = OutlivingSite(stay=StaySettings(fall_back_s=NEVER_S))
        await site.lead()
        await asyncio.sleep(1.0)
        site.kill()
        for number in range(1, 13):
            site.ask(number, 4)
        await asyncio.sleep(0.1)
        await site.lead(queue_max=1)
        await asyncio.sleep(10.0)
        assert [parts(client)[0] for client in site.clients.values()] == [200] * AGAIN_MAX + [429] * (12 - AGAIN_MAX)
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


def test_a_stream_that_began_as_its_instance_failed_is_not_begun_again() -> None:
    async def main() -> None:
        site = OutlivingSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        link = brain.relays.links[0]
        link._hear = {**link._hear, m.FirstToken: lambda said: None}  # It has not come yet.
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


def test_a_brain_counts_no_more_of_what_is_said_to_run_than_can_be() -> None:
    async def main() -> None:
        site = OutlivingSite(engines=1)
        await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 40)
        await asyncio.sleep(0.5)
        (held,) = site.relays[0].uplink.held.values()
        site.kill()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        said = held.running(site.relays[0].uplink.clock.now_s)
        for number in range(100, 200):
            request = msgspec.structs.replace(said.request, number=number)
            site.relays[0].uplink.send(msgspec.structs.replace(said, request=request, run=m.OWN_FROM + number))
        await asyncio.sleep(0.5)
        (instance,) = brain.gateway.plane.instances.values()
        assert len(instance.requests) == brain.gateway.plane.open_requests == ADOPTED_MAX * site.slots
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
