"""A cascade's second call is known for what it is to whichever brain leads, also to one of an older protocol."""

from __future__ import annotations

import asyncio
from math import inf

import pytest

from cascade_outliving import CascadeSite
from chiron.gateway.port.messages import TURNS_FROM, VERSION
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from chiron.gateway.relay.uplink.joining import StaySettings
from outliving_site import STEP_S, parts, whole_stream
from virtual_loop import run_virtual


def only_the_cascade(requests_per_minute: float) -> KeyRing:
    return KeyRing([Key(name="k", hash=hash_secret(b"s"), models=("c",), requests_per_minute=requests_per_minute)])


@pytest.mark.parametrize("dies_s", [0.0, 0.5, 1.5])
def test_another_brain_goes_on_with_either_call(dies_s: float) -> None:
    """The first call takes a second or so, and so does the second."""

    async def main() -> None:
        site = CascadeSite(keys=only_the_cascade(inf))
        await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 8, model="c", secret="s")
        await asyncio.sleep(dies_s)
        site.kill()
        await asyncio.sleep(0.2)
        brain = await site.lead()
        await asyncio.sleep(6.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 8))
        assert [number for engine in site.engines for number in engine.seen] == [1, 1]
        assert brain.gateway.plane.open_requests == 0
        site.ask(2, 2, model="m0", secret="s")
        await asyncio.sleep(1.0)
        assert parts(site.clients[2])[0] == 403
        site.ask(3, 2, model="c", secret="s")
        await asyncio.sleep(2.0)
        tally = brain.gateway.desk.cascades.tallies["c", "chat"]
        known = 2 if dies_s < 1.0 else 1  # It has heard of the first request's first call, too.
        assert (tally.requests, dict(tally.escalated), tally.answered_then) == (known, {"unjudged": known}, known)
        assert tally.share == 1.0
        assert not any(link.hears.__self__._turns for link in brain.relays.links)
        await site.close()

    run_virtual(main())


def test_a_request_whose_second_call_begins_without_a_connection_counts_once() -> None:
    """The first call ends while the brain cannot be told: of the key's two requests a minute one is left."""

    async def main() -> None:
        site = CascadeSite(keys=only_the_cascade(2.0))
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 8, model="c", secret="s")
        await asyncio.sleep(1.0)
        assert [number for engine in site.engines for number in engine.seen] == [1]
        site.door.cut("brain")
        await asyncio.sleep(0.3)
        assert not site.engines[0].running.total() + site.engines[1].running.total()
        site.door.listen("brain", brain.accept)
        await asyncio.sleep(3.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 8))
        for number, status in ((2, 200), (3, 429)):
            site.ask(number, 1, model="c", secret="s")
            await asyncio.sleep(1.0)
            assert parts(site.clients[number])[0] == status
        tally = brain.gateway.desk.cascades.tallies["c", "chat"]
        assert tally.answered_first + tally.answered_then <= tally.requests == 2
        await site.close()

    run_virtual(main())


@pytest.mark.parametrize(
    ("dies_s", "away_s", "another"),
    [
        pytest.param(0.2, 0.5, True, id="shown while there is none"),
        pytest.param(0.6, 0.2, True, id="shown before, over afterwards"),
        pytest.param(0.2, 2.0, True, id="shown and over while there is none"),
        pytest.param(0.6, 2.0, True, id="shown before, over while there is none"),
        pytest.param(0.2, 0.5, False, id="shown while the connection is lost"),
        pytest.param(0.6, 0.2, False, id="shown before the connection is lost"),
    ],
)
def test_a_first_answer_that_will_do_counts_whenever_its_brain_is_gone(
    dies_s: float, away_s: float, another: bool
) -> None:
    """Its client can read it from the third of eight tokens on, 0.4 s after it asked."""

    async def main() -> None:
        site = CascadeSite(after_tokens=3, logprob=-0.1)
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 8, model="c")
        await asyncio.sleep(dies_s)
        if another:
            site.kill()
        else:
            site.door.cut("brain")
        await asyncio.sleep(away_s)
        if another:
            brain = await site.lead()
        else:
            site.door.listen("brain", brain.accept)
        await asyncio.sleep(4.0)
        status, body = parts(site.clients[1])
        assert (status, body.count(b'"text"'), body.endswith(b"data: [DONE]\n\n")) == (200, 8, True)
        tally = brain.gateway.desk.cascades.tallies["c", "chat"]
        assert (tally.requests, tally.answered_first, dict(tally.escalated)) == (1, 1, {})
        assert tally.ttft.sum == pytest.approx(3 * STEP_S, abs=0.05)
        assert brain.gateway.plane.open_requests == 0
        await site.close()

    run_virtual(main())


@pytest.mark.parametrize("version", [TURNS_FROM - 1, VERSION])
def test_of_older_versions_nothing_is_told_and_all_is_answered(version: int) -> None:
    async def main() -> None:
        site = CascadeSite(stay=StaySettings(protocol=version))
        brain = await site.lead()
        await asyncio.sleep(1.0)
        site.ask(1, 4, model="c")
        await asyncio.sleep(4.0)
        assert parts(site.clients[1]) == (200, whole_stream(1, 4))
        assert bool(brain.gateway.desk.cascades.tallies) == (version >= TURNS_FROM)
        await site.close()

    run_virtual(main())


def test_nothing_is_kept_of_a_call_for_a_model_that_the_brain_serves_no_more() -> None:
    async def main() -> None:
        site = CascadeSite()
        brain = await site.lead()
        await asyncio.sleep(1.0)
        del brain.relays.models.by_name["m0"]  # type: ignore[attr-defined]
        site.ask(1, 4, model="c")
        await asyncio.sleep(1.0)
        assert parts(site.clients[1])[0] == 404
        (link,) = brain.relays.links
        assert not link.hears.__self__._turns  # type: ignore[attr-defined]
        await site.close()

    run_virtual(main())
