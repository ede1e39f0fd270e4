"""Whatever relays say, and whatever crosses on the way: each placement and each request has one end.

Scripted relays speak to a brain over connections in memory. They answer late or never, say things twice, say things of
placements that are over, lose clients at any moment, and die. Between relays the order is any; within one it is that of
a stream. Afterwards nothing is left: no place is taken, nothing is counted as running, no client waits.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from chiron.core.types import Decision, Instance, ModelSpec, Request, RequestClass
from chiron.fleet.model import ColdStart
from chiron.gateway.brain.relay_link import RelayLink
from chiron.gateway.brain.relays import QUIET_MAX
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import Wire
from chiron.net.memory import MemoryNetwork
from chiron.policies.registry import POLICIES, make_policy
from real_path import Site
from scenario_factory import PROFILE, kind_of
from virtual_loop import run_virtual

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=86_400.0)


@dataclass
class Told:
    """A request as its relay knows it."""

    places: list[int] = field(default_factory=list)
    """Numbers of its placements that have not ended."""
    asked: list[int] = field(default_factory=list)
    """Those of them that it was told to stop."""
    first: bool = False
    left: bool = False
    ends: list[m.End] = field(default_factory=list)


class ScriptedRelay:
    """Does what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.dead = False
        self.requests: dict[int, Told] = {}
        self.ended: set[int] = set()
        """Placements that it has reported an end of."""
        self.said: list[Any] = []
        self._of: dict[int, Told] = {}
        self._at: dict[int, int] = {}
        self.wire = Wire(
            name="brain",
            kind=m.Down,
            opened=lambda: None,
            received=self._received,
            closed=lambda why: None,
            ride_s=0.0,
        )

    def say(self, message: Any) -> None:
        if not self.dead:
            self.said.append(message)
            self.wire.send(message)

    def arrive(self, cls: RequestClass) -> None:
        number = len(self.requests) + 1
        self.requests[number] = Told()
        self.say(
            m.Arrive(
                number=number,
                request_id=f"r{number}",
                model="m0",
                cls=cls.name,
                ttft_s=cls.ttft_s,
                itl_s=cls.itl_s,
                key="",
                input_tokens=10,
                peers=("somebody",),
                sequences=1,
                streams=True,
                prompt_bytes=40,
                collected=not cls.interactive,
            )
        )

    def leave(self, number: int, told: Told) -> None:
        """Its client goes; what ran for it is stopped, also if it is placed only after this."""
        if not told.left and not told.ends:
            told.left = True
            self.say(m.Left(number, 1 if told.first else 0))
            for run in list(told.places):
                self.end(told, run, "evicted")

    def end(self, told: Told, run: int, how: str) -> None:
        if how == "evicted":
            self.say(m.Evicted(run, 0, 1 if told.first else 0))
        elif how == "lost":
            self.say(m.Lost(run, 503, "no", False, told.first, 0, 1 if told.first else 0))
        elif how == "refused":
            self.say(m.Answered(run, 400, 0, 0, 0))
        else:
            if not told.first:
                self.begin(told, run)
            self.say(m.Answered(run, 200, 5, 10, 1))
        self.over(told, run)

    def begin(self, told: Told, run: int) -> None:
        told.first = True
        self.say(m.FirstToken(run, 1))

    def over(self, told: Told, run: int) -> None:
        told.places.remove(run)
        told.first = False
        self.ended.add(run)
        if run in told.asked:
            told.asked.remove(run)

    def open(self) -> list[Told]:
        """Requests that have not ended, as far as it knows."""
        return [told for told in self.requests.values() if not told.ends or told.places]

    def old(self) -> list[Any]:
        """What it said of placements that are over, and of first tokens."""
        return [said for said in self.said if getattr(said, "run", 0) in self.ended or isinstance(said, m.FirstToken)]

    def die(self) -> None:
        self.dead = True
        self.wire.close("it dies")

    def _received(self, messages: Any) -> None:
        for said in messages:
            match said:
                case m.Place():
                    told = self._of[said.run] = self.requests[said.number]
                    self._at[said.run] = said.instance
                    assert not told.ends, "nothing is placed after its end"
                    assert not told.places, "one placement at a time"
                    told.places.append(said.run)
                    if told.left:
                        self.end(told, said.run, "evicted")
                case m.Evict():
                    told = self._of[said.run]
                    if said.run in told.places:
                        told.asked.append(said.run)
                case m.End():
                    self.requests[said.number].ends.append(said)
                case m.InstanceGone():
                    for told in self.requests.values():
                        for run in [run for run in told.places if self._at[run] == said.instance]:
                            self.over(told, run)
                case _:
                    pass


class Ends:
    """A journal that only knows which requests have ended."""

    wants_events = False

    def __init__(self) -> None:
        self.ids: list[int] = []

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None:
        self.ids.append(request.id)

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


STEPS = ("chat", "night", "begin", "finished", "lost", "refused", "evicted", "leave", "again", "die", "fail", "wait")
Step = tuple[str, int, int]


class Trial:
    """A brain over two small instances, and two relays."""

    def __init__(self) -> None:
        kind = kind_of(PROFILE, max_num_seqs=2)
        self.ends = Ends()
        self.site = Site(
            models=[ModelSpec(name="m0", kinds=(kind,), min_instances=2, max_instances=2)],
            classes=[CHAT, NIGHT],
            profiles={kind.name: PROFILE},
            policy=make_policy("chiron", POLICIES["chiron"].settings()),
            journal=self.ends,
            cold_start=ColdStart(node_start_s=0.0, model_load_s=0.5, warm_load_s=0.5, jitter=0.0),
            batch_class="night",
        )
        self.brain = self.site.gateway.open_to_relays(responded=lambda status, count: None, ride_s=0.0)
        self._door = MemoryNetwork(asyncio.get_running_loop().call_soon)
        self._door.listen("brain", self._accept)
        self.links: list[RelayLink] = []
        self.relays: list[ScriptedRelay] = []
        self.all: list[ScriptedRelay] = []
        self.site.begin({"m0": 2})

    def _accept(self) -> Wire:
        self.links.append(self.brain.link("a relay"))
        return self.links[-1].wire

    def join(self) -> ScriptedRelay:
        relay = ScriptedRelay()
        self.all.append(relay)
        self._door.connect("brain", lambda: relay.wire)
        return relay

    async def settle(self) -> None:
        """Until everything that is on its way has arrived."""
        for _ in range(12):
            await asyncio.sleep(0)

    async def sleep(self, seconds: float) -> None:
        """Relays that live say so, as they do once a second."""
        for _ in range(int(seconds)):
            await asyncio.sleep(1.0)
            for relay in self.relays:
                if not relay.dead:
                    relay.wire.send(m.Health(0, 0, 0.0))

    async def play(self, steps: list[Step]) -> None:
        self.relays = [self.join(), self.join()]
        await self.settle()
        for step, which, pick in steps:
            await self._do(step, which, pick)
            for _ in range(pick % 3):
                await asyncio.sleep(0)
        await self.settle()
        for _ in range(100):
            if not any(relay.open() for relay in self.relays):
                break
            for relay in self.relays:
                for told in relay.open():
                    for run in list(told.places):
                        relay.end(told, run, "evicted" if run in told.asked else "finished")
            await self.settle()
            await self.sleep(1.0)
        await self.sleep(20.0)  # Whatever engines were avoided for, and whatever was restarted.

    async def _do(self, step: str, which: int, pick: int) -> None:
        relay = self.relays[which]
        if step in ("chat", "night"):
            relay.arrive(CHAT if step == "chat" else NIGHT)
        elif step == "die":
            relay.die()
            self.relays[which] = self.join()
        elif step == "fail":
            live = list(self.site.engines.live.values())
            if live:
                failed = live[pick % len(live)].instance
                self.site.clock.post(lambda: self.site.engines.instance_failed(failed, "so it fails"))
        elif step == "wait":
            await asyncio.sleep(0.3)
        elif step == "again" and relay.old():
            relay.say(relay.old()[pick % len(relay.old())])
        else:
            self._of_one(relay, step, pick)

    def _of_one(self, relay: ScriptedRelay, step: str, pick: int) -> None:
        if step == "leave":
            if waiting := [(number, told) for number, told in relay.requests.items() if not told.left]:
                relay.leave(*waiting[pick % len(waiting)])
            return
        running = [(told, run) for told in relay.open() for run in told.places]
        if step == "evicted":
            running = [(told, run) for told, run in running if run in told.asked]
        if not running:
            return
        told, run = running[pick % len(running)]
        if step == "begin":
            relay.begin(told, run)
        elif step in ("finished", "lost", "refused", "evicted"):
            relay.end(told, run, step)


FULL: list[Step] = [("wait", 0, 0)] * 3 + [("night", 0, 2)] * 4


@example([*FULL, ("chat", 1, 2), ("chat", 1, 2), ("die", 0, 0), ("wait", 0, 0)])  # While it is asked to evict.
@example([*FULL, ("begin", 0, 2), ("leave", 0, 0), ("die", 0, 0)])
@example([*FULL, ("begin", 0, 2), ("finished", 0, 2), ("again", 0, 0), ("again", 0, 1), ("fail", 0, 0)])
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 30)), max_size=40))
@settings(max_examples=8, deadline=None)
def test_nothing_is_left_of_any_placement(steps: list[Step]) -> None:
    async def main() -> None:
        trial = Trial()
        await trial.play(steps)
        plane, engines = trial.site.gateway.plane, trial.site.engines
        arrived = sum(len(relay.requests) for relay in trial.all)

        assert plane.open_requests == 0
        assert len(trial.ends.ids) == len(set(trial.ends.ids)) <= arrived
        for relay in trial.relays:
            assert all(len(told.ends) == 1 for told in relay.requests.values()), "one end for each"
        for relay in trial.all:
            assert all(len(told.ends) <= 1 for told in relay.requests.values())
        for link in trial.links:
            assert (link.calls, link.runs) == ({}, {})
        for engine in engines.live.values():
            instance, seen = engine.instance, engine.observer
            assert instance.requests == instance.evicting == engine.runs == {}
            assert (instance.sequences, instance.kv_reserved_tokens) == (0, 0)
            assert (seen.inside, seen.decoding, seen.held_tokens) == (0, 0, 0)
        assert trial.site.gateway.desk.open == {}
        await trial.site.close()

    run_virtual(main())


def test_a_relay_that_hangs_is_taken_to_be_dead() -> None:
    async def main() -> None:
        trial = Trial()
        relay = trial.join()
        trial.relays = [relay]
        await trial.settle()
        await trial.sleep(QUIET_MAX + 5.0)
        assert len(trial.brain.links) == 1, "it says something once a second"
        relay.arrive(CHAT)
        await trial.settle()
        assert trial.site.gateway.plane.open_requests == 1
        await asyncio.sleep(QUIET_MAX - 2.0)
        assert len(trial.brain.links) == 1
        await asyncio.sleep(5.0)
        await trial.settle()
        assert trial.brain.links == []
        assert trial.site.gateway.plane.open_requests == 0
        await trial.site.close()

    run_virtual(main())
