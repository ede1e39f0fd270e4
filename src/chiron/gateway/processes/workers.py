"""Sees to it that there are as many relays as there should be, on a port of their own.

One that ends is started again after a pause, which doubles while relays end soon after their start. What ran for it has
ended by then (``brain.relays``). One that hangs, or is stopped, is killed: as long as it has its listening socket, the
kernel hands it its share of new connections, and nobody answers them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from contextlib import suppress
from typing import Protocol

from chiron.core.backoff import doubled_s
from chiron.gateway.brain.relays import RelayLink, Relays
from chiron.gateway.processes.fork_server import RelayStart
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.relays")

START_MAX_S = 60.0
"""For so long a relay may take to listen."""
AGAIN_MIN_S, AGAIN_MAX_S = 0.1, 10.0
STEADY_S = 10.0
"""A relay that ends later than this after its start has worked."""
STOP_S = 5.0
"""Beyond the grace period."""


class RelayProcesses(Protocol):
    """Relays by name."""

    def spawn(self, name: str, brain: socket.socket, start: RelayStart) -> None:
        """Make one that speaks to the other end of this socket. Raises OSError."""

    def kill(self, name: str) -> None:
        """At once, unless it has ended."""


class Port:
    """An address that relays share. It is kept from others by a socket here that listens to nobody."""

    def __init__(self, sockets: list[socket.socket], number: int) -> None:
        self.number = number
        self._sockets = sockets

    def close(self) -> None:
        for each in self._sockets:
            each.close()


async def reserve(host: str, port: int) -> Port:
    """Raises OSError: it is in use, or not ours. 0 is any that is free."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if port:
                with socket.socket(family, kind, protocol) as probe:  # Another gateway's relays would let us in.
                    _bind(probe, (address[0], port, *address[2:]))
            wire = socket.socket(family, kind, protocol)
            sockets.append(wire)
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _bind(wire, (address[0], port, *address[2:]))
            port = port or wire.getsockname()[1]
    except OSError:
        for each in sockets:
            each.close()
        raise
    return Port(sockets, port)


def _bind(wire: socket.socket, address: tuple[object, ...]) -> None:
    if wire.family == socket.AF_INET6:
        wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # As asyncio listens.
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wire.bind(address)


class Workers:
    """The relays of one gateway."""

    def __init__(self, *, clock: LiveClock, processes: RelayProcesses, start: RelayStart) -> None:
        self.relays: Relays | None = None
        """Set before ``begin``; it tells this of relays that listen, and that have left."""
        self.started = 0
        """Relays, ever."""
        self._clock = clock
        self._processes = processes
        self._start = start
        self._began_s: dict[str, float] = {}
        self._failures = 0
        self._stopping = False
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """All of them, until they take connections. Raises OSError if they do not."""
        for _ in range(self._start.relays):
            self._clock.post(self._make)
        try:
            async with asyncio.timeout(START_MAX_S):
                while self._listening < self._start.relays:
                    await self._wait()
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"relays did not start within {START_MAX_S:g} s; see the log") from None

    async def stop(self, grace_s: float) -> None:
        """Let open requests end for so long."""
        self._stopping = True
        assert self.relays is not None
        self.relays.stop(grace_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s + STOP_S):
                while self.relays.links:
                    await self._wait()
        for link in list(self.relays.links):
            log.error("%s did not end in time", link.name)
            link.wire.close("it did not end in time")

    def listens(self, link: RelayLink) -> None:
        self._news.set()

    def left(self, link: RelayLink, why: str) -> None:
        self._news.set()
        if self._stopping:
            return
        self._processes.kill(link.name)
        now_s = self._clock.now_s
        steady = link.listens and now_s - self._began_s.pop(link.name, now_s) >= STEADY_S
        self._failures = 0 if steady else self._failures + 1
        pause_s = doubled_s(AGAIN_MIN_S, AGAIN_MAX_S, max(0, self._failures - 1))
        log.error("%s has ended (%s); another is started in %.1f s", link.name, why, pause_s)
        self._clock.call_later(pause_s, self._make)

    @property
    def _listening(self) -> int:
        assert self.relays is not None
        return sum(link.listens for link in self.relays.links)

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()

    def _make(self) -> None:
        """Posted."""
        if self._stopping:
            return
        assert self.relays is not None
        self.started += 1
        link = self.relays.link(f"relay {self.started}")
        self._began_s[link.name] = self._clock.now_s
        self._clock.call_later(START_MAX_S, lambda: self._require(link))
        task = asyncio.get_running_loop().create_task(self._connect(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _require(self, link: RelayLink) -> None:
        """By now it listens, or it never will."""
        if not (link.listens or link.gone):
            link.wire.give_up(f"it did not listen within {START_MAX_S:g} s")

    async def _connect(self, link: RelayLink) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            self._processes.spawn(link.name, theirs, self._start)
        except OSError as error:
            log.error("no relay can be started (%s): restart the gateway", error)
        finally:
            theirs.close()
        await asyncio.get_running_loop().create_unix_connection(lambda: link.wire, sock=ours)
