"""Connections in memory: asyncio protocols of one process joined without a socket.

Both ends are what they are over TCP (the same protocols, the same bytes), so a gateway and its engines can run in one
process, under virtual time too. ``carry`` says when what is written arrives: on the loop's next turn
(``loop.call_soon``), or after the time that a wire takes, by a clock. Whatever it is, it must keep the order in which
it is asked.

An end that does not read holds its writer up, as a socket whose buffers are full does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from chiron.core.clock import Callback

Accept = Callable[[], Any]
"""Makes the protocol of one more client: what asyncio calls one, derived from its class or not."""
HIGH_BYTES = 64 * 1024
"""Unread bytes from which a writer is held up, unless it says otherwise."""


class MemoryNetwork:
    """Servers by name, and connections to them."""

    def __init__(self, carry: Callable[[Callback], object]) -> None:
        self._carry = carry
        self._servers: dict[str, Accept] = {}
        self._ends: dict[str, dict[MemoryTransport, None]] = {}
        """Of open connections, the servers' ends, in the order in which they were made."""

    def listen(self, name: str, accept: Accept) -> None:
        assert name not in self._servers, f"{name!r} is taken"
        self._servers[name] = accept

    def forget(self, name: str) -> None:
        """No new connections to this name; open ones stay."""
        self._servers.pop(name, None)

    def cut(self, name: str) -> None:
        """A server's process dies: it listens no more, and its connections are reset, the oldest first."""
        self.forget(name)
        for end in list(self._ends.get(name, ())):
            end.abort()

    def connect(self, name: str, factory: Accept) -> Any:
        """A client's protocol, connected. Raises ConnectionRefusedError."""
        accept = self._servers.get(name)
        if accept is None:
            raise ConnectionRefusedError(f"nobody listens on memory:{name}")
        client, server = MemoryTransport(self._carry), MemoryTransport(self._carry)
        client.peer, server.peer = server, client
        ends = self._ends.setdefault(name, {})
        ends[server] = None
        server.on_end = lambda: ends.pop(server, None)

        def arrive() -> None:
            if not server.is_closing():
                server.join(accept())

        self._carry(arrive)
        return client.join(factory())


class MemoryTransport(asyncio.Transport):
    """One end of a connection."""

    peer: MemoryTransport

    def __init__(self, carry: Callable[[Callback], object]) -> None:
        super().__init__()
        self._carry = carry
        self._protocol: Any = None
        self._closing = False
        self._lost = False
        self._reading = True
        self._unread: deque[bytes | None] = deque()
        """What has arrived while the protocol did not read; None: the other end has said all."""
        self._unsent_bytes = 0
        """Written here and not yet read there."""
        self._high_bytes, self._low_bytes = HIGH_BYTES, HIGH_BYTES // 4
        self._held_up = False
        self.on_end: Callable[[], object] = lambda: None

    def join(self, protocol: Any) -> Any:
        self._protocol = protocol
        protocol.connection_made(self)
        return protocol

    # -- what the protocol at this end asks ----------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if self._closing or not data:
            return
        block, peer = bytes(data), self.peer
        self._unsent_bytes += len(block)
        if not self._held_up and self._unsent_bytes > self._high_bytes and self._protocol is not None:
            self._held_up = True
            self._protocol.pause_writing()
        self._carry(lambda: peer.arrive(block))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        peer = self.peer
        self._carry(lambda: peer.arrive(None))

    def close(self) -> None:
        """What has been written still arrives."""
        if not self._closing:
            self.write_eof()
            self._end()

    def abort(self) -> None:
        if not self._closing:
            peer = self.peer
            self._carry(lambda: peer.reset())
            self._end()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            asyncio.get_running_loop().call_soon(self._read)

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = HIGH_BYTES if high is None else high
        self._low_bytes = self._high_bytes // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    # -- what comes from the other end ---------------------------------------------------------------------------

    def arrive(self, block: bytes | None) -> None:
        if not self._closing:
            self._unread.append(block)
            self._read()

    def reset(self) -> None:
        if not self._closing:
            self._stop()
            self._lose(ConnectionResetError("the other end broke the connection off"))

    def taken(self, count: int) -> None:
        """The other end has read so many of the bytes written here."""
        self._unsent_bytes -= count
        if self._held_up and self._unsent_bytes <= self._low_bytes and not self._closing:
            self._held_up = False
            assert self._protocol is not None
            self._protocol.resume_writing()

    def _read(self) -> None:
        while self._unread and self._reading and not self._closing:
            block = self._unread.popleft()
            assert self._protocol is not None
            if block is not None:
                self._protocol.data_received(block)
                self.peer.taken(len(block))
            elif not self._protocol.eof_received():
                self.close()

    def _end(self) -> None:
        """The protocol is in the middle of something: it is told of the end on the loop's next turn."""
        self._stop()
        asyncio.get_running_loop().call_soon(self._lose, None)

    def _stop(self) -> None:
        self._closing = True
        self._unread.clear()
        self.on_end()

    def _lose(self, error: Exception | None) -> None:
        if not self._lost and self._protocol is not None:
            self._lost = True
            self._protocol.connection_lost(error)
