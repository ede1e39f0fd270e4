"""The relays of a gateway, as its brain sees them come and go.

They come by themselves: each connects to a Unix socket of the brain's. Who makes them, and makes them again, is the
keeper. One that hangs is given up here; the keeper kills it, since as long as it has its listening socket, the kernel
hands it its share of new connections, and nobody answers them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from chiron.gateway.brain.relay_link import RelayLink
from chiron.gateway.brain.relays import Relays
from chiron.gateway.port.messages import Stop
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.relays")

START_MAX_S = 60.0
"""For so long a relay may take to listen."""
STOP_S = 5.0
"""Beyond the grace period."""
LEFT_TELL_S = 0.5
"""A relay that has left is logged after so long: in a gateway that stops, relays may hear of it before the brain."""
LINKS_MAX = 1024
"""Connections of relays, at a time."""


class Workers:
    """The relays of one gateway."""

    def __init__(self, *, clock: LiveClock, count: int) -> None:
        self.relays: Relays | None = None
        """Set before relays can come; it tells this of those that listen, and that have left."""
        self.started = 0
        """Relays that have taken connections, ever."""
        self._clock = clock
        self._count = count
        self._numbers = 0
        self._open = 0
        self._own: set[RelayLink] = set()
        """Relays of this gateway; others are of other gateways."""
        self._stopping = False
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def open(self, path: Path) -> None:
        """From now on they can come."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accept_own, path)

    async def wait(self) -> None:
        """Until all of them take connections. Raises OSError if they do not."""
        try:
            async with asyncio.timeout(START_MAX_S):
                while self._listening < self._count:
                    await self._wait()
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"relays did not start within {START_MAX_S:g} s; see the log") from None

    async def stop(self, grace_s: float) -> None:
        """Let open requests of this gateway's relays end for so long."""
        self._close()
        for link in self._own:
            link.wire.send(Stop(grace_s))
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s + STOP_S):
                while self._own:
                    await self._wait()
        for link in list(self._own):
            log.error("%s did not end in time", link.name)
            link.wire.close("it did not end in time")

    async def part(self, grace_s: float) -> None:
        """Let all relays go on without this brain."""
        self._close()
        assert self.relays is not None
        for link in list(self.relays.links):
            link.wire.close("another brain follows")

    def _close(self) -> None:
        self._stopping = True
        if self._server is not None:
            self._server.close()

    def listens(self, link: RelayLink) -> None:
        self.started += 1
        self._news.set()

    def left(self, link: RelayLink, why: str) -> None:
        self._open -= 1
        self._own.discard(link)
        self._news.set()
        if not self._stopping and link.pid:
            asyncio.get_running_loop().call_later(LEFT_TELL_S, self._tell_left, link, why)

    def _tell_left(self, link: RelayLink, why: str) -> None:
        if not self._stopping:
            log.error("%s (process %d) has left: %s", link.name, link.pid, why)

    @property
    def _listening(self) -> int:
        assert self.relays is not None
        return sum(link.listens for link in self.relays.links if link in self._own)

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()

    def accept(self) -> Any:
        """The end of the connection to one more relay."""
        link = self._make()
        return link.wire if link is not None else _Refused()

    def _accept_own(self) -> Any:
        link = self._make()
        if link is None:
            return _Refused()
        self._own.add(link)
        return link.wire

    def _make(self) -> RelayLink | None:
        assert self.relays is not None
        if self._stopping or self._open >= LINKS_MAX:
            return None
        self._open += 1
        self._numbers += 1
        link = self.relays.link(f"relay {self._numbers}")
        self._clock.post(lambda: self._expect(link))
        return link

    def _expect(self, link: RelayLink) -> None:
        self._clock.call_later(START_MAX_S, lambda: self._require(link))

    def _require(self, link: RelayLink) -> None:
        """By now it listens, or it never will."""
        if not (link.listens or link.gone):
            link.wire.give_up(f"it did not listen within {START_MAX_S:g} s")


class _Refused(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
