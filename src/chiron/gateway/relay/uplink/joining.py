"""A relay that outlives its brain: its connection to whoever leads, made again and again.

Who starts the relay knows how a brain is found (``Connect``). Each try has its own ``Wire``; one that does not get as
far as both hellos within ``HELLO_MAX_S`` is given up: a process that hangs still accepts connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields

from chiron.core.backoff import doubled_s
from chiron.gateway.port.messages import VERSION, VERSION_MIN
from chiron.gateway.port.wire import Wire

log = logging.getLogger("chiron.relay")

AGAIN_MIN_S, AGAIN_MAX_S = 0.05, 0.5
"""Between two tries: a new brain should be found well within the time that it needs to start."""
HELLO_MAX_S = 3.0

Connect = Callable[[Callable[[], Wire]], Awaitable[object]]
"""Opens a connection to the brain that leads now, with the protocol that its argument makes, as asyncio's
``create_unix_connection`` and ``create_connection`` do. Raises OSError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaySettings:
    """Of a relay that stays when its brain is gone: ``[relays]`` in the config."""

    hold_s: float = 10.0
    """For so long a new interactive request waits for a brain; then it gets 503 with Retry-After. Three times what a
    new brain should need."""
    hold_max: int = 10_000
    """Requests that wait, beyond which new ones get 503 at once."""
    hold_max_bytes: int = 256 << 20
    """Of their bodies."""
    kept_max: int = 50_000
    """Ends that nobody could be told, kept for the next brain."""
    fall_back_s: float = 1.0
    """A brain that has said nothing for so long is gone, connected or not: the relay places requests itself."""
    fall_back_batch_s: float = 300.0
    """For so long without a brain it places requests of the batch class, too."""
    protocol: int = VERSION
    """The newest version of the messages between relays and brain that this gateway speaks: an older one while some
    gateways are to be older than the next change."""

    def __post_init__(self) -> None:
        if not VERSION_MIN <= self.protocol <= VERSION:
            raise ValueError(f"protocol is {self.protocol}; it must be {VERSION_MIN} to {VERSION}")
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                key = each.name.removesuffix("_s")
                raise ValueError(f"{key} is {getattr(self, each.name)}; it must be above 0")


class Joining:
    """Keeps a connection to the brain. ``run`` is for a task of its own."""

    def __init__(self, connect: Connect, make_wire: Callable[[], Wire]) -> None:
        self._connect = connect
        self._make_wire = make_wire
        self._changed = asyncio.Event()
        """A wire has said hello, or is over."""

    def changed(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        failures, time_s = 0, asyncio.get_running_loop().time
        while True:
            wire = self._make_wire()
            self._changed.clear()
            try:
                async with asyncio.timeout(HELLO_MAX_S):
                    await self._connect(lambda wire=wire: wire)  # type: ignore[misc]
                    await self._until(lambda wire=wire: wire.up or wire.over)  # type: ignore[misc]
            except (OSError, TimeoutError) as error:
                log.debug("the brain cannot be reached: %r", error)
                wire.abort()
            if wire.up:
                up_s = time_s()
                await self._until(lambda wire=wire: wire.over)  # type: ignore[misc]
                if time_s() - up_s >= HELLO_MAX_S:  # Else they do not get on: each try costs both.
                    failures = 0
            await asyncio.sleep(doubled_s(AGAIN_MIN_S, AGAIN_MAX_S, failures))
            failures += 1

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._changed.wait()
            self._changed.clear()
