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
from chiron.gateway.brain.hearing import ADOPTED_MAX
from chiron.gateway.port import messages as m
from chiron.gateway.relay.body import read_body
from chiron.gateway.relay.front import WAIT_MAX_S
from chiron.gateway.relay.uplink.joining import StaySettings
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
        site.relays[0].uplink.link.close()  # Its machine is gone.
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
        assert lost not in [upstream.address.url for upstream in site.relays[0].uplink.instances.upstreams.values()]
        await asyncio.sleep(10.0)
        assert [parts(client) for client in site.clients.values()] == [
            (200, whole_stream(number, 30)) for number in site.clients
        ]
        assert len(brain.ends.requests) == 4
        assert site.relays[0].uplink.held == {}
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
            site.relays[0].uplink.link.send(msgspec.structs.replace(said, request=request, run=m.OWN_FROM + number))
        await asyncio.sleep(0.5)
        (instance,) = brain.gateway.plane.instances.values()
        assert len(instance.requests) == brain.gateway.plane.open_requests == ADOPTED_MAX * site.slots
        await site.close()

    run_virtual(main())
