"""Whenever brains die, hang, come back and are cut off, and engines lose what they run: each request has one end, and
each stream is whole, unless its engine lost it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chiron.gateway.relay.uplink.joining import StaySettings
from outliving_site import OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual

STEPS = ("chat", "piece", "night", "kill", "hang", "cut", "lead", "leave", "wait", "wait longer", "lose")
Step = tuple[str, int, int]
PATIENT = 3600.0
WAITING = re.compile(rb": waiting: [^\n]*\n\n")
"""A stream that has waited for long is told what for."""


class Trial:
    """Two relays before two engines with two places each."""

    def __init__(self, *, silent_s: float) -> None:
        self.notices = silent_s < PATIENT
        """Relays give a brain up that hangs."""
        stay = StaySettings(hold_s=PATIENT, fall_back_s=silent_s, fall_back_batch_s=PATIENT)
        self.site = OutlivingSite(relays=2, stay=stay)
        self.tokens: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        self.left: set[int] = set()
        self.lost = False
        """Engines have lost what they ran."""

    async def play(self, steps: list[Step]) -> None:
        await self.site.lead()
        await asyncio.sleep(1.0)
        for step, which, pick in steps:
            await self._do(step, which, pick)
            for _ in range(pick % 4):
                await asyncio.sleep(0)
        if self.site.brain is None:
            await self.site.lead()
        for _ in range(120):
            await asyncio.sleep(1.0)
            if self._idle():
                break

    def _idle(self) -> bool:
        brain = self.site.brain
        assert brain is not None
        plane = brain.gateway.plane
        here = len(brain.engines.live) == len(self.site.engines)
        held = any(relay.uplink.held for relay in self.site.relays)
        return here and not (plane.settling or plane.open_requests or held)

    async def _do(self, step: str, which: int, pick: int) -> None:
        site = self.site
        if step in ("chat", "piece", "night"):
            number = len(self.tokens) + 1
            self.tokens[number], self.kinds[number] = 1 + pick, step
            cls = "night" if step == "night" else "chat"
            site.ask(number, 1 + pick, relay=which, cls=cls, stream=step == "chat")
        elif step == "leave" and (there := [n for n in self.tokens if n not in self.left]):
            number = there[pick % len(there)]
            self.left.add(number)
            site.clients[number].transport.abort()
        elif step == "lose":
            self.lost = True
            site.network.cut(f"engine-{which}")
            site.network.listen(f"engine-{which}", site.engines[which].server.accept)
        elif step == "lead" and site.brain is None:
            await site.lead(settle_s=0.5 + pick / 10.0)
        elif step in ("kill", "hang", "cut") and site.brain is not None:
            if step == "cut":
                if links := site.brain.links:
                    links[pick % len(links)].abort()
            elif step == "kill" or not self.notices:
                site.kill()
            else:
                site.hang()
        elif step.startswith("wait"):
            await asyncio.sleep(pick / 100.0 if step == "wait" else pick / 5.0)

    def check(self) -> None:
        site = self.site
        for number in self.tokens.keys() - self.left:
            assert self._answer(number), (number, self.kinds[number], parts(site.clients[number]))
        for brain in site.brains:
            assert all(len(each) == 1 for each in brain.ends.outcomes.values()), "one end for each that it knew"
        assert site.brain is not None
        plane, engines = site.brain.gateway.plane, site.brain.engines
        assert plane.open_requests == 0
        assert site.brain.gateway.desk.open == {}
        assert len(engines.live) == 2
        for engine in engines.live.values():
            instance, seen = engine.instance, engine.observer
            assert instance.requests == instance.evicting == engine.runs == {}
            assert (instance.sequences, instance.kv_reserved_tokens) == (0, 0)
            assert (seen.inside, seen.decoding, seen.held_tokens) == (0, 0, 0)
        for relay in site.relays:
            uplink = relay.uplink
            assert (uplink.held, uplink.runs, uplink.alone.waiting) == ({}, {}, {})
            assert not uplink.alone.untold
            assert [upstream.sequences for upstream in uplink.instances.upstreams.values()] == [0, 0]
        assert all(engine.running.total() == 0 for engine in site.engines)

    def _answer(self, number: int) -> bool:
        status, body = parts(self.site.clients[number])
        body = WAITING.sub(b"", body)
        stream = whole_stream(number, self.tokens[number])
        if self.lost and (status in (502, 503) or b"engine_lost" in body):
            return True
        if self.lost and self.kinds[number] == "piece" and body:
            return stream.startswith(body)
        if self.kinds[number] != "night":
            return (status, body) == (200, stream)
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in stream.split(b"\n\n")[:-2]]
        return status == 200 and json.loads(body)["choices"][0]["text"] == "".join(texts)


CHATS: list[Step] = [
    ("chat", 0, 20),
    ("chat", 1, 25),
    ("chat", 0, 9),
    ("night", 1, 12),
    ("chat", 0, 3),
    ("piece", 1, 8),
]


@pytest.mark.parametrize("silent_s", [1e6, 1.0], ids=["held", "placed by relays"])
@example([*CHATS, ("wait", 0, 30), ("kill", 0, 0), ("chat", 0, 2), ("wait longer", 0, 10), ("lead", 0, 0)])
@example([*CHATS, ("wait", 0, 30), ("hang", 0, 0), ("chat", 1, 2), ("wait longer", 0, 20), ("lead", 0, 30)])
@example([*CHATS, ("kill", 0, 0), ("leave", 0, 0), ("leave", 0, 5), ("lead", 0, 30), ("kill", 0, 1), ("lead", 0, 2)])
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 30)), max_size=30))
@settings(max_examples=4, deadline=None)
def test_each_request_has_one_end(silent_s: float, steps: list[Step]) -> None:
    async def main() -> None:
        trial = Trial(silent_s=silent_s)
        await trial.play(steps)
        trial.check()
        if silent_s > PATIENT and not trial.lost:
            assert max(engine.most for engine in trial.site.engines) <= trial.site.slots
            tried = Counter(number for engine in trial.site.engines for number in engine.seen)
            for number, kind in trial.kinds.items():
                assert tried[number] <= 1 or kind == "night", "nothing runs twice, unless it was evicted"
        await trial.site.close()

    run_virtual(main())
