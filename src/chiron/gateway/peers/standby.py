"""The brain's place in a gateway that stands by: connections of its relays are handed on to whoever leads.

So a relay always connects to its own gateway, knows nothing of others, and holds no key. While nobody is known to lead
the connection is closed at once: the relay tries again.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from chiron.gateway.peers.leadership import Peer
from chiron.gateway.peers.wires import API, HANDSHAKE_S, RELAY, PipeEnd
from chiron.gateway.processes.start import RelayStart
from chiron.net.renewing import RenewingContext

log = logging.getLogger("chiron.gateways")

CONNECTIONS_MAX = 4096
"""Of this gateway's relays, at a time."""
LOOK_S = 2.0
"""Between two looks at whether the other end of a connection leads still."""


class Standby:
    """``open`` may follow ``close``, and itself."""

    def __init__(
        self,
        *,
        start: RelayStart,
        contexts: Mapping[str, RenewingContext],
        leader: Callable[[], Peer | None],
        lost: Callable[[], None],
        handshake_s: float = HANDSHAKE_S,
        look_s: float = LOOK_S,
    ) -> None:
        """``contexts`` by what a connection is for; ``leader``: who leads now; ``lost`` is called when a connection to
        it has ended, or cannot be made."""
        self._start = start
        self._contexts = contexts
        self._leader = leader
        self._lost = lost
        self._handshake_s = handshake_s
        self._look_s = look_s
        self._servers: list[asyncio.Server] = []
        self._near: set[PipeEnd] = set()
        self._tasks: dict[asyncio.Task[None], str] = {}
        """With what their connections are for."""
        self._said = ""

    async def open(self) -> None:
        if self._servers:
            return
        for path, purpose in ((self._start.brain_path, RELAY), (self._start.api_path, API)):
            self._servers.append(await self._listen(path, purpose))

    async def close(self) -> None:
        """Relays look for another brain."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for task in list(self._tasks):
            task.cancel()
        for end in list(self._near):
            end.close()

    def cut_relays(self) -> None:
        """They come again at once, and look at what is in force before that."""
        for task in [task for task, purpose in self._tasks.items() if purpose == RELAY]:
            task.cancel()

    async def _listen(self, path: Path, purpose: str) -> asyncio.Server:
        def came(near: PipeEnd) -> None:
            if len(self._near) >= CONNECTIONS_MAX:
                near.close()
                return
            self._near.add(near)
            task = asyncio.get_running_loop().create_task(self._hand_on(near, purpose))
            self._tasks[task] = purpose
            task.add_done_callback(self._tasks.pop)

        return await asyncio.get_running_loop().create_unix_server(lambda: PipeEnd(came), path)

    async def _hand_on(self, near: PipeEnd, purpose: str) -> None:
        far = PipeEnd()
        try:
            peer = self._leader()
            if peer is None or not await self._reach(peer, purpose, far):
                return
            near.join(far)
            await self._until_gone(peer, far)
            if isinstance(far.error, ssl.SSLError):
                self._say(f"{peer.name} at {peer.host}:{peer.port} refuses this gateway: {far.error}")
            if purpose == RELAY:
                self._lost()
        except asyncio.CancelledError:
            far.abort()
            raise
        finally:
            self._near.discard(near)
            near.close()

    async def _until_gone(self, peer: Peer, far: PipeEnd) -> None:
        """Cut off once another gateway leads: a machine that is gone says nothing, and does not close either."""
        while not far.gone.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await far.gone.wait()
            if not far.gone.is_set() and self._leader() not in (None, peer):
                far.abort()

    async def _reach(self, peer: Peer, purpose: str, far: PipeEnd) -> bool:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._handshake_s):
                context = self._contexts[purpose].current()
                transport, _ = await loop.create_connection(
                    lambda: far, peer.host, peer.port, ssl=context, server_hostname=peer.host
                )
        except (OSError, TimeoutError) as error:
            self._say(
                f"{peer.name}, which leads, cannot be reached at {peer.host}:{peer.port}: {str(error) or 'no answer'}"
            )
            self._lost()
            return False
        if transport.get_extra_info("ssl_object").selected_alpn_protocol() != purpose:
            self._say(f"{peer.host}:{peer.port} is no gateway that this one can speak with")
            transport.abort()
            return False
        self._said = ""
        return True

    def _say(self, words: str) -> None:
        """Once."""
        if words != self._said:
            log.warning("%s", words)
        self._said = words
