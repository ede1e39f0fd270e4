"""A client of the gateway without a socket."""

from __future__ import annotations

import asyncio
from typing import Any


class Client(asyncio.Transport):
    """One client's connection without a socket: keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[bytes] = []
        self.closed = False
        self.protocol: asyncio.Protocol | None = None

    def write(self, data: Any) -> None:
        self.received.append(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
