"""A process that the keeper has made: its end of the socket between them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

ALIVE_S = 0.5
"""Between two signs of life."""
_UNREAD_MAX_BYTES = 4096
_LINE_MAX_BYTES = 64


class KeeperLink(asyncio.Protocol):
    """``stop`` hears the number of the signal that asks the gateway to stop, ``alone`` that all relays have ended
    since, ``gone`` that the keeper is gone."""

    def __init__(
        self,
        *,
        stop: Callable[[int], None],
        gone: Callable[[], None],
        alone: Callable[[], None] = lambda: None,
        beside: socket.socket | None = None,
    ) -> None:
        """``beside``: another descriptor of the same socket, for ``say_at_once``."""
        self._stop = stop
        self._alone = alone
        self._gone = gone
        self._beside = beside
        self._unread = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def say(self, word: str) -> None:
        """Unless the keeper does not read."""
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() < _UNREAD_MAX_BYTES:
            transport.write(f"{word}\n".encode())

    def say_at_once(self, word: str) -> None:
        """From any thread, also while the loop computes; unless the keeper does not read."""
        if self._beside is not None:
            with suppress(OSError):
                self._beside.send(f"{word}\n".encode(), socket.MSG_DONTWAIT)

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._say_alive()

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._unread = self._unread[-_LINE_MAX_BYTES:]
        for line in lines:
            if line.isdigit():
                self._stop(int(line))
            elif line == b"alone":
                self._alone()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self.close()
            self._gone()

    def _say_alive(self) -> None:
        self.say("alive")
        self._timer = asyncio.get_running_loop().call_later(ALIVE_S, self._say_alive)
