"""Instances, as a relay knows them: what the brain has told of each, and the connections to its engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import ProtocolError
from chiron.gateway.relay.uplink.tellers import RunTeller
from chiron.gateway.relay.upstream import EngineAddress, Upstream
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from chiron.net.memory import MemoryNetwork


class RelayInstances:
    """Those that the brain knows, and those that it does not know while something runs there."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        address_of: Callable[[str, str, str], EngineAddress],
        teller: Callable[[int], RunTeller],
        uncounted: Callable[[Upstream], None],
        stall_s: float,
        network: MemoryNetwork | None,
    ) -> None:
        """``address_of`` (model, kind, url) raises KeyError for what the config does not have; ``teller`` makes who
        tells of an instance; ``uncounted`` hears of one that the brain does not know: what runs there goes on."""
        self.upstreams: dict[int, Upstream] = {}
        """By id of instance."""
        self.known: dict[int, m.Known] = {}
        """As the brain last told of them."""
        self._clock = clock
        self._address_of = address_of
        self._make_teller = teller
        self._left_uncounted = uncounted
        self._stall_s = stall_s
        self._network = network
        self._tellers: dict[int, RunTeller] = {}
        self._confirmed: set[int] = set()
        """Instances that the present brain has told of."""
        self._uncounted: list[Upstream] = []
        """Of instances that it does not know, while something runs there."""
        self._closing: set[asyncio.Task[None]] = set()

    def up(self, said: m.InstanceUp) -> None:
        self._confirmed.add(said.instance)
        known = self.known.get(said.instance)
        if known is not None and (known.model, known.kind, known.url) == (said.model, said.kind, said.url):
            return
        if known is not None:
            self._leave(said.instance)
        try:
            address = self._address_of(said.model, said.kind, said.url)
        except KeyError:
            raise ProtocolError(f"instance {said.instance} is of model {said.model!r}, kind {said.kind!r}") from None
        self.known[said.instance] = m.Known(said.instance, said.model, said.kind, said.url, 0, "mixed")
        teller = self._tellers[said.instance] = self._make_teller(said.instance)
        origin = Origin(said.url, keepalive=address.row.keepalive, idle_max=1024, network=self._network)
        self.upstreams[said.instance] = Upstream(
            clock=self._clock, address=address, origin=origin, reports=teller, counts=teller
        )

    def readdress(self, changed: Callable[[str, str], bool]) -> None:
        """Instances of kinds and models that have ``changed`` are spoken to in another way from now on, or are no more:
        they are others once a brain tells of them."""
        for number, known in self.known.items():
            if known.url and changed(known.kind, known.model):
                self.known[number] = m.Known(number, known.model, known.kind, "", 0, known.role)

    def gone(self, instance: int) -> Upstream | None:
        """With all that runs there, which is to be dropped before it is ``retire``d; None: it was not here."""
        self._tellers.pop(instance, None)
        self.known.pop(instance, None)
        return self.upstreams.pop(instance, None)

    def limit(self, said: m.Limit) -> None:
        known = self.known.get(said.instance)
        if known is not None:
            self.known[said.instance] = replace(known, max_batch_size=said.max_batch_size, role=said.role)

    def watch(self) -> None:
        """Once a second: give up what is silent for too long, and engines at which nothing uncounted runs any more."""
        for upstream in (*self.upstreams.values(), *self._uncounted):
            upstream.watch(self._stall_s)
        for upstream in [each for each in self._uncounted if not each.runs]:
            self._uncounted.remove(upstream)
            self.retire(upstream)

    def tell_counts(self) -> None:
        for teller in self._tellers.values():
            teller.tell_counts()

    def begin_anew(self) -> None:
        """A brain that knows none of them is told of all, and how far each run has come."""
        self._confirmed.clear()
        for teller in self._tellers.values():
            teller.forget_counts()

    def leave_unknown(self) -> None:
        """The brain has told of all that it knows."""
        for instance in [each for each in self.upstreams if each not in self._confirmed]:
            self._leave(instance)

    def _leave(self, instance: int) -> None:
        """The brain does not know it: what runs there goes on, and nothing more is sent there."""
        upstream, teller = self.upstreams.pop(instance), self._tellers.pop(instance)
        self.known.pop(instance, None)
        teller.counted = False
        self._uncounted.append(upstream)
        self._left_uncounted(upstream)

    def retire(self, upstream: Upstream) -> None:
        task = asyncio.get_running_loop().create_task(upstream.origin.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
