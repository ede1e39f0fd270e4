"""A relay's connection to its brain: the one that leads now, and the next one when that is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Any

from chiron.gateway.port import messages as m
from chiron.gateway.port.wire import ProtocolError, Seldom, Wire
from chiron.gateway.relay.uplink.joining import Connect, Joining
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.relay")

LOOK_S = 0.25
"""Between two looks at whether the brain says anything."""


class BrainLink:
    """Says who this relay is, hands on what the brain says, and finds another brain for a relay that stays."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        take: Callable[[Any], None],
        opened: Callable[[bool], None],
        gone: Callable[[str], None],
        ride_s: float,
        connect: Connect | None,
        protocol: int,
        gateway: str,
    ) -> None:
        """``take`` gets each message; ``opened`` hears of each brain that has said hello, and whether there was one
        before; ``gone`` hears why there is none any more. With ``connect`` the relay stays, and ``begin`` has it find
        a brain, again and again."""
        self.clock = clock
        self.stays = connect is not None
        self.term = 0
        """The highest that a brain has had."""
        self.heard_s = 0.0
        """When the brain last said something."""
        self.joined = False
        """A brain has said hello before."""
        self.stopped = False
        """No brain is looked for any more."""
        self._take = take
        self._opened_again = opened
        self._gone = gone
        self._ride_s = ride_s
        self._nonce = token_hex(8) if connect is not None else ""
        self._protocol, self._gateway, self._seldom = protocol, gateway, Seldom()
        self._looked_s = 0.0
        self._silent_looks = 0
        self.wire = self._make_wire()
        self._joining = Joining(connect, self._renew_wire) if connect is not None else None
        self._joins: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Find a brain, and another one whenever it is gone; for a relay that stays."""
        assert self._joining is not None
        self._joins = asyncio.get_running_loop().create_task(self._joining.run())

    def close(self) -> None:
        """Look for no brain any more."""
        self.stopped = True
        if self._joins is not None:
            self._joins.cancel()
            self._joins = None

    def send(self, message: m.Message) -> None:
        """Soon; to nobody, if there is no brain."""
        if self.wire.up:
            self.wire.send(message)

    def post(self, message: m.Message) -> None:
        """With the next, or a little later."""
        if self.wire.up:
            self.wire.post(message)

    def silent_s(self) -> float:
        """For how long the brain has said nothing; to be asked every ``LOOK_S``."""
        now_s, before_s = self.clock.elapsed_s(), self._looked_s
        self._looked_s = now_s
        # Looks that this process makes up for after a stall say nothing: what the brain sent is still to be read.
        if now_s - before_s >= LOOK_S / 2:
            self._silent_looks += 1
        return self._silent_looks * LOOK_S

    def _make_wire(self) -> Wire:
        wire = Wire(
            name="the brain",
            kind=m.Down,
            opened=self._opened,
            received=self._received,
            closed=lambda why: self._closed(wire, why),
            ride_s=self._ride_s,
            hello=m.Hello(
                version=self._protocol,
                version_min=m.VERSION_MIN,
                term=self.term,
                nonce=self._nonce,
                returns=self.joined,
                gateway=self._gateway,
            ),
            greeted=self._greeted,
            seldom=self._seldom,
        )
        return wire

    def _renew_wire(self) -> Wire:
        self.wire = self._make_wire()
        return self.wire

    def _greeted(self, hello: m.Hello) -> None:
        if hello.term < self.term:
            raise ProtocolError(f"its term is {hello.term}, and there has been one of term {self.term}: it is over")
        self.term = hello.term

    def _opened(self) -> None:
        self.clock.post(self._begin)
        if self._joining is not None:
            self._joining.changed()

    def _begin(self) -> None:
        self.heard_s, self._silent_looks = self.clock.now_s, 0
        again, self.joined = self.joined, True
        self._opened_again(again)

    def _closed(self, wire: Wire, why: str) -> None:
        if self._joining is not None:
            self._joining.changed()
        if wire is self.wire:
            self._gone(why)

    def _received(self, messages: Sequence[Any]) -> None:
        self._silent_looks = 0
        self.heard_s = self.clock.elapsed_s()

        def take() -> None:
            for message in messages:
                try:
                    self._take(message)
                except ProtocolError:
                    raise
                except Exception:
                    log.exception("%s of the brain could not be taken in", type(message).__name__)

        self.clock.post(take)
