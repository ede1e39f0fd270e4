"""All relays in processes of their own, of this brain: which there are, who carries a request, and what they are told.

Each has a ``RelayLink``. One that dies takes its clients with it; one whose connection is lost may come back within
``REJOIN_S``. Those that stay while there is no brain are told the limits and how many they are, so that they can place
by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from chiron.core.types import Instance
from chiron.gateway.batch.call import BatchCall
from chiron.gateway.brain.desk import Desk
from chiron.gateway.brain.hearing import Hearing
from chiron.gateway.brain.relay_link import Adoption, FarCall, FarRun, LinkContext, RelayLink
from chiron.gateway.instances.engine import InstanceEngine, Placed, restart
from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import RIDE_S, Seldom
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.key_ring import KeyRing
from chiron.net.clock import LiveClock

REJOIN_S = 1.0
"""For so long what a relay that stays carries is kept when its connection is lost: it may be alive, and come back. Not
that of a relay whose process has ended, as far as that can be seen from here."""
PULSE_S = 0.25
"""Between two signs of life to relays that stay without their brain."""
TICK_S = 1.0
"""Between two looks at relays, and at what they should know of models."""
QUIET_MAX = 30
"""Looks at a relay that says nothing, though it should once a second, until it is taken to be dead."""


class Relays:
    """All relays of this brain."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        desk: Desk,
        models: Models,
        keys: KeyRing,
        engines: Mapping[int, InstanceEngine],
        responded: Callable[[int, int], None],
        listening: Callable[[RelayLink], None] = lambda link: None,
        left: Callable[[RelayLink, str], None] = lambda link, why: None,
        ride_s: float = RIDE_S,
        term: int = 0,
        superseded: Callable[[int], None] = lambda term: None,
        adoption: Adoption | None = None,
        protocol: int = m.VERSION,
        gateway: str = "",
    ) -> None:
        """``engines`` are those of instances that are ready; ``responded`` hears (status, count) of answers;
        ``listening`` hears of each relay that takes connections, ``left`` of each whose connection here has ended, and
        why. ``term``: this brain's, at most ``m.TERM_MAX``; ``superseded`` hears of a higher one, which means that
        another brain leads. ``adoption``: what becomes of what relays know from another brain; None: it is not
        counted. ``protocol``: the newest version that is spoken; ``gateway``: the name of this one, of several."""
        self._context = LinkContext(
            clock=clock,
            desk=desk,
            models=models,
            keys=keys,
            engines=engines,
            adoption=adoption,
            term=term,
            protocol=protocol,
            gateway=gateway,
            seldom=Seldom(),
            superseded=superseded,
            responded=responded,
            joined=self._joined,
            listening=listening,
            returned=self._returned,
            left=self._lost,
            away=self._hold,
        )
        self.models = models
        self.links: list[RelayLink] = []
        """Those that have said hello and are there."""
        self.draining = False
        self.late = 0
        """``RelayLink.late`` of those that are gone."""
        self.expects = 0
        """How many there are, whether they are here or not; 0: that is not known."""
        self.awaited: frozenset[str] = frozenset()
        """Nonces of those that the brain before this one spoke with."""
        self._clock = clock
        self._engines = engines
        self._adoption = adoption
        self._away: dict[str, RelayLink] = {}
        """Connections that were lost a moment ago, by their relays' nonces."""
        self._limits: dict[int, m.Limit] = {}
        """As last told to relays that stay."""
        self._looked_s = 0.0
        self._left = left
        self._ride_s = ride_s

    @property
    def own_placements(self) -> int:
        """Placements that relays chose while they had no brain."""
        return self._context.own_placements

    @property
    def expired(self) -> int:
        """Requests that relays gave up because they had none."""
        return self._context.expired

    def link(self, name: str) -> RelayLink:
        """The end of a connection to one more relay; its ``wire`` is the protocol."""
        link = RelayLink(self._context, name, ride_s=self._ride_s)
        link.hears = Hearing(link, self._context).hear
        return link

    def begin(self) -> None:
        """Posted."""
        self._clock.call_later(TICK_S, self._tick)
        self._clock.call_later(PULSE_S, self._pulse)

    def carry(self, engine: InstanceEngine, placed: Placed) -> FarRun | None:
        call = placed.request.payload
        if isinstance(call, FarCall):
            return call.link.carry(engine, placed)
        if not isinstance(call, BatchCall):
            return None
        link = call.link if isinstance(call.link, RelayLink) else None
        # What no relay has room for is sent to its engine from here.
        if link is None and (able := [each for each in self.links if each.has_room(call)]):
            link = min(able, key=lambda each: len(each.items))
            link.take_item(call, placed)
        if link is None and call.here:
            call.here = 0
            restart(placed)  # What came of it was at a relay that is gone.
        return link.carry(engine, placed) if link is not None else None

    def instance_up(self, engine: InstanceEngine) -> None:
        for link in self.links:
            link.wire.send(_up(engine))

    def instance_gone(self, instance: Instance) -> None:
        for link in self.links:
            link.wire.send(m.InstanceGone(instance.id))

    def drain(self, on: bool) -> None:
        """Requests that come are refused from now on (or taken again)."""
        self.draining = on
        for link in self.links:
            link.wire.send(m.Drain(on))

    @property
    def connections(self) -> int:
        return sum(link.health.connections for link in self.links)

    def _joined(self, link: RelayLink) -> None:
        """It has said hello."""
        for other in [each for each in self.links if link.nonce and each.nonce == link.nonce]:
            other.wire.give_up("it has come back by another connection")
        link.before = self._away.pop(link.nonce, None)
        self.links.append(link)
        link.tell_shapes()
        for engine in self._engines.values():
            link.wire.post(_up(engine))
        if link.nonce:
            self._note_limits()
            for limit in self._limits.values():
                link.wire.post(limit)
            link.wire.post(m.Pulse(self.sharing))
        link.wire.post(m.Drain(self.draining))
        if not link.returns:
            self._returned(link)

    def _returned(self, link: RelayLink) -> None:
        """It knows nothing that this brain does not know."""
        link.told = True
        if (before := link.before) is not None:
            link.before = None
            before.bury("the relay came back without it")
        link.wire.send(m.Ready())
        if self._adoption is not None and self._adoption.settling and self._all_have_told():
            self._adoption.told_all()

    def _all_have_told(self) -> bool:
        """False also where it is not known who is to tell: then the settling time is waited for."""
        told = [each.nonce for each in self.links if each.told]
        return 0 < self.expects <= len(told) or (bool(self.awaited) and self.awaited <= set(told))

    @property
    def known(self) -> frozenset[str]:
        """Nonces of relays that may run something: whoever follows this brain waits for them. While this one waits
        itself, those that it has not heard of yet are among them."""
        here = {each.nonce for each in self.links} | set(self._away)
        settling = self._adoption is not None and self._adoption.settling
        return frozenset(here | self.awaited if settling else here) - {""}

    @property
    def missing(self) -> int:
        """Relays that are known, and have not told."""
        told = {each.nonce for each in self.links if each.told}
        return max(len(self.known - told), self.expects - len(told))

    @property
    def sharing(self) -> int:
        """How many relays share the instances, as far as is known: one that is told too few takes more than its share
        if this brain dies."""
        return max(1, len(self.links), self.expects, len(self.known))

    def _lost(self, link: RelayLink, why: str) -> None:
        """Its connection has ended."""
        if link in self.links:
            self.links.remove(link)
            self.late += link.late
        self._left(link, why)

    def close(self) -> None:
        """Nobody wants to hear any more how processes end."""
        for link in (*self.links, *self._away.values()):
            if link.process is not None:
                link.process.close()

    def _hold(self, link: RelayLink, why: str) -> None:
        """It may come back, unless its process has ended."""
        self._away[link.nonce] = link

        def over() -> None:
            if self._away.get(link.nonce) is link:
                del self._away[link.nonce]
                link.bury(why)

        self._clock.call_later(REJOIN_S, over)
        if link.process is not None:
            link.process.when_ended(lambda: self._clock.post(over))

    def _pulse(self) -> None:
        self._clock.call_later(PULSE_S, self._pulse)
        pulse = m.Pulse(self.sharing)
        for link in self.links:
            if link.nonce:
                link.wire.send(pulse)

    def _note_limits(self) -> list[m.Limit]:
        """What has changed since the last look, which is told from now on."""
        changed = []
        for number, engine in self._engines.items():
            limit = m.Limit(number, engine.instance.max_batch_size, engine.instance.role)
            if limit != self._limits.get(number):
                self._limits[number] = limit
                changed.append(limit)
        for number in [each for each in self._limits if each not in self._engines]:
            del self._limits[number]
        return changed

    def _tell_limits(self) -> None:
        staying = [link for link in self.links if link.nonce]
        for limit in self._note_limits() if staying else ():
            for link in staying:
                link.wire.post(limit)

    def _tick(self) -> None:
        self._clock.call_later(TICK_S, self._tick)
        self._tell_limits()
        now_s, before_s = self._clock.elapsed_s(), self._looked_s
        self._looked_s = now_s
        for link in list(self.links):
            link.tell_shapes()
            # Looks that this process makes up for after a stall say nothing: what relays sent is still to be read.
            if now_s - before_s >= TICK_S / 2:
                link.quiet += 1
            if link.quiet > QUIET_MAX:
                link.wire.give_up(f"it (process {link.pid}) has said nothing for {QUIET_MAX} s")


def _up(engine: InstanceEngine) -> m.InstanceUp:
    instance = engine.instance
    return m.InstanceUp(instance.id, instance.model, instance.kind.name, engine.url)
