"""An HTTP/1.1 server for the gateway's hot path: asyncio, httptools, and as little per request as can be.

A handler is a plain function that gets a complete request and answers at once or later, from anywhere on the loop.
Requests that belong to an ASGI application go to it with their body streamed (``net.asgi``). One connection serves one
request at a time; what a client pipelines waits in order.

Limits: bytes and number of headers, bytes of a body and of all bodies, connections, and how long a client may take to
send its head, its body, or to read its answer. One sweep a second enforces the times, so a request costs no timer.
Each peer has a share (``net.shares``); when connections, memory or file descriptors are short, the slowest go first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl as ssl_module
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from heapq import nlargest
from math import inf
from typing import Any

from chiron.net.connection import Connection, Handler, Screen
from chiron.net.incoming import Header as Header
from chiron.net.incoming import Incoming as Incoming
from chiron.net.incoming import error_body as error_body
from chiron.net.limits import ServerLimits as ServerLimits
from chiron.net.shares import Proxies, Shares

log = logging.getLogger("chiron.http")

SHED_AFTER_S = 2.0
"""Who has been idle or late for less is not sent away."""
LOOK_AGAIN_S = 0.5
FILES_KEPT = 64
BACKLOG = 2048
ACCEPTED_AT_ONCE = 16


class HttpServer:
    """A listening server. ``serve`` makes one."""

    def __init__(
        self,
        handle: Handler,
        limits: ServerLimits,
        app: Handler | None,
        is_app: Callable[[Incoming], bool] | None,
        screen: Screen | None = None,
    ) -> None:
        self.handle = handle
        self.limits = limits
        self.app = app
        self.is_app = is_app
        self.screen = screen
        self.port = 0
        self.connections: set[Connection] = set()
        self.closing = False
        self.open = 0
        """Connections that count: those that were told to go do not."""
        self.held_bytes = 0
        """Bodies of requests that are not answered yet."""
        self.shed = 0
        """Connections that had to go so far because others needed the room."""
        self.proxies = Proxies(limits.trusted_proxies)
        self.connection_shares = Shares(limits.connections_max, limits.peer_share)
        self.body_shares = Shares(limits.bodies_max_bytes, limits.peer_share, least=limits.body_max_bytes)
        self._nobody_before_s = 0.0
        """No request is slow enough to be cut off before this: each check costs time."""
        self._shed_told_s = -inf
        self.now_s = 0.0
        """Seconds, as of the last sweep."""
        self.date_line = b""
        self._loop = asyncio.get_running_loop()
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._drained: asyncio.Event = asyncio.Event()
        self._sweep()

    def accept(self) -> Any:
        """The protocol of one more client: what a listening socket asks for, or a test with a transport of its own."""
        return Connection(self)

    async def listen(
        self, host: str, port: int, path: str | None, ssl: ssl_module.SSLContext | None, *, reuse_port: bool = False
    ) -> None:
        factory = self.accept
        if path is not None:
            self._listener = await self._loop.create_unix_server(factory, path=path, backlog=BACKLOG)
            return
        # Who does not get through a handshake is not counted yet, so it has no longer than for a head.
        handshake_s = self.limits.header_timeout_s if ssl is not None else None
        self._listener = await self._loop.create_server(
            factory,
            host,
            port,
            ssl=ssl,
            backlog=ACCEPTED_AT_ONCE,
            ssl_handshake_timeout=handshake_s,
            reuse_port=reuse_port or None,
        )
        for wire in self._listener.sockets:
            # asyncio takes it for what it accepts in one go, before anybody can refuse; the system's is longer.
            with socket.fromfd(wire.fileno(), wire.family, wire.type) as same:
                same.listen(BACKLOG)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self, grace_s: float = 5.0) -> None:
        """Accept nothing more, let open requests end for up to ``grace_s``, then cut them off."""
        self.closing = True
        if self._listener is not None:
            self._listener.close()
        for connection in [c for c in self.connections if c.idle]:
            connection.close()
        if self.connections and grace_s > 0:
            self._drained.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), grace_s)
        for connection in list(self.connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        # Aborted transports say goodbye on the next turn of the loop.
        await asyncio.sleep(0)

    def listening(self) -> list[int]:
        """File descriptors of its listening sockets."""
        return [each.fileno() for each in self._listener.sockets] if self._listener is not None else []

    def make_room(self) -> bool:
        """Close some of the connections that are idle or slow, the slowest first. False: none is."""
        return self._cut_slow(max(1, self.limits.connections_max // 100), lambda connection: True)

    def free_memory(self) -> bool:
        """Refuse the bodies that come slowest, until the others have room. False: there is none for all the same."""
        most = self.limits.bodies_max_bytes
        while self.held_bytes > most and self._cut_slow(1, lambda connection: connection.reads_body):
            pass
        return self.held_bytes <= most

    def _cut_slow(self, count: int, fits: Callable[[Connection], bool]) -> bool:
        now_s = self._loop.time()
        if now_s < self._nobody_before_s:
            return False
        late = [(c.late_s(now_s), id(c), c) for c in self.connections if fits(c)]
        slowest = [c for late_s, _, c in nlargest(count, late) if late_s >= SHED_AFTER_S]
        for connection in slowest:
            connection.give_way()
        self.shed += len(slowest)
        if not slowest:
            self._nobody_before_s = now_s + LOOK_AGAIN_S
        elif now_s >= self._shed_told_s + 60.0:
            self._shed_told_s = now_s
            log.warning("short of connections or memory: idle and slow clients are disconnected (%d so far)", self.shed)
        return bool(slowest)

    def lacks_files(self, descriptor: int) -> bool:
        """Whether a connection with this number leaves too few of them for engines and files."""
        most = self.limits.files_max
        return descriptor >= most - min(FILES_KEPT, most // 4)

    def left(self, connection: Connection) -> None:
        if self.closing and not self.connections:
            self._drained.set()

    def _sweep(self) -> None:
        self.now_s = self._loop.time()
        self.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        for connection in [c for c in self.connections if c.deadline_s < self.now_s]:
            connection.expire()
        self._sweeper = self._loop.call_later(1.0, self._sweep)


async def serve(
    handle: Handler,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    path: str | None = None,
    ssl: ssl_module.SSLContext | None = None,
    limits: ServerLimits | None = None,
    app: Any = None,
    is_app: Callable[[Incoming], bool] | None = None,
    screen: Screen | None = None,
    streamed: Handler | None = None,
    reuse_port: bool = False,
) -> HttpServer:
    """Listen on ``host:port`` (0: a free one; see ``HttpServer.port``) or on the unix socket ``path``.

    Requests for which ``is_app`` is true go to the ASGI application ``app`` (all of them, if only ``app`` is given
    and ``is_app`` is not), or to the handler ``streamed`` in its place. ``screen`` sees the head of each one for
    ``handle``, of pipelined ones too, before memory is spent on its body. ``reuse_port``: other processes listen on the
    same port, and the system spreads connections over them.
    """
    hosted = streamed
    if app is not None:
        from chiron.net.asgi import host_app

        hosted = host_app(app)
        if is_app is None:
            is_app = _always
    server = HttpServer(handle, limits or ServerLimits(), hosted, is_app, screen)
    await server.listen(host, port, path, ssl, reuse_port=reuse_port)
    return server


def _always(_: Incoming) -> bool:
    return True
