"""The process at the other end of a Unix socket: a connection that has ended says nothing of it, its end does."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

_CREDENTIALS = struct.Struct("3i")


class PeerProcess:
    """Holds a file descriptor until it is closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(cls, transport: asyncio.BaseTransport | None) -> PeerProcess | None:
        """As the kernel names it, not as it says itself. None: it cannot be known, as of another machine."""
        wire = transport.get_extra_info("socket") if transport is not None else None
        if wire is None or wire.family != socket.AF_UNIX:
            return None
        try:
            told = wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return cls(os.pidfd_open(_CREDENTIALS.unpack(told)[0]))
        except (AttributeError, OSError):  # Not on Linux, or of another container.
            return None

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call once it has ended, if that is before ``close``."""
        if self._descriptor < 0:
            return

        def ended() -> None:
            self.close()
            call()

        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, ended)

    def close(self) -> None:
        """Harmless twice."""
        if self._loop is not None:
            self._loop.remove_reader(self._descriptor)
            self._loop = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
