"""Where the leader is reached by the relays of other gateways.

Nothing is read of a connection before its handshake has shown a certificate of our authority; how many there are, and
how long each may take, is limited.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any, cast

from chiron.gateway.peers.wires import API, HANDSHAKE_S, RELAY, PipeEnd
from chiron.net.renewing import RenewingContext

log = logging.getLogger("chiron.gateways")

BACKLOG = 128
AGAIN_S = 0.5
"""After a connection could not be accepted, for want of file descriptors."""
CONNECTIONS_MAX = 4096
"""In their handshakes, and to the HTTP server, at a time. Those of relays are counted by the brain."""
TELL_S = 1.0
"""Between two words on connections that were refused."""


class ListenError(Exception):
    """Other gateways cannot be let in. The message says why."""


class Door:
    """``relay`` makes the protocol of one more relay; requests go to the server at ``api_path``."""

    def __init__(
        self,
        *,
        context: RenewingContext,
        relay: Callable[[], Any],
        api_path: Path,
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        self.refused = 0
        self._context = context
        self._relay = relay
        self._api_path = api_path
        self._handshake_s = handshake_s
        self._told_s = -inf
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, host: str, port: int) -> int:
        """Returns the port. Raises ListenError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ListenError(f"gateways.listen: cannot listen on {host}, port {port}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener))
        found: int = self._listener.getsockname()[1]
        return found

    def close(self) -> None:
        """Relays that are there already stay."""
        if self._accepting is not None and self._listener is not None:
            self._accepting.cancel()
            self._listener.close()
        for task in list(self._tasks):
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        # Not a server of the loop's: that would say nothing of handshakes that fail, and not count those under way.
        loop = asyncio.get_running_loop()
        while True:
            try:
                wire, address = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("no connection can be accepted at gateways.listen: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            if len(self._tasks) >= CONNECTIONS_MAX:
                wire.close()
                self._say_refused(address[0], f"more than {CONNECTIONS_MAX} connections")
                continue
            task = loop.create_task(self._receive(wire, address[0]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _receive(self, wire: socket.socket, address: str) -> None:
        loop, guest = asyncio.get_running_loop(), _Guest()
        try:
            # Not the protocol that it returns: uvloop's is TLS's.
            transport, _ = await loop.connect_accepted_socket(
                lambda: guest, wire, ssl=self._context.current(), ssl_handshake_timeout=self._handshake_s
            )
        except (OSError, TimeoutError) as error:
            self._say_refused(address, str(error) or "it ended in the middle of the handshake")
            return
        purpose = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        if purpose == RELAY:
            guest.give_way(transport, self._relay(), transport.resume_reading)
        elif purpose == API:
            await self._pass_on(guest, transport, address)
        else:
            transport.abort()
            self._say_refused(address, "it does not say what for")

    async def _pass_on(self, guest: _Guest, transport: asyncio.Transport, address: str) -> None:
        far, near = PipeEnd(), PipeEnd()
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: near, str(self._api_path))
        except OSError as error:
            self._say_refused(address, f"the HTTP server cannot be reached: {error}")
            transport.abort()
            return
        except asyncio.CancelledError:
            transport.abort()
            raise
        guest.give_way(transport, far, lambda: far.join(near))
        try:
            await far.gone.wait()
        finally:
            far.abort()
            near.close()

    def _say_refused(self, address: str, why: str) -> None:
        """One word a second: whoever scans ports is not to fill the log."""
        self.refused += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._told_s >= TELL_S:
            self._told_s = now_s
            log.warning("a connection from %s to gateways.listen is refused: %s", address, why)


class _Guest(asyncio.Protocol):
    """Somebody whose certificate is good, until it is known what for."""

    def __init__(self) -> None:
        self._early: list[bytes] = []
        self._lost: list[Exception | None] = []

    def give_way(self, transport: asyncio.Transport, protocol: asyncio.Protocol, read: Callable[[], None]) -> None:
        """What came since the handshake is the other protocol's; ``read`` lets it have what comes."""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for data in self._early:
            protocol.data_received(data)
        read()
        for error in self._lost:
            protocol.connection_lost(error)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).pause_reading()

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.append(exc)
