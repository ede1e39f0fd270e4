"""Which ChironModels are in force is said by the gateway that leads, in the store; the others take that over.

Each time that another one leads, or the same one anew, what it says is read before anybody is sent there: so a relay
knows each model that its leader does, and whoever leads goes on with what was in force, whatever it knew itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from chiron.gateway.settings import ServeConfig
from chiron.store.port import StoreError

log = logging.getLogger("chiron.gateways")

IN_FORCE = "chiron-models"
"""Where the store has them."""
LOOK_S = 0.05
"""Between two looks at who leads."""
AGAIN_S = 1.0
"""After the store could not be read."""


class Models(Protocol):
    """Of this gateway."""

    def take(self, saved: bytes) -> None:
        """What is in force; bytes that cannot be are left out, and said."""

    def renewed(self) -> ServeConfig | None:
        """The config, if it has other models than the last time."""


class Saved(Protocol):
    """What the leader has saved."""

    async def load(self) -> bytes | None:
        """None: nothing, or what was read the last time. Raises StoreError."""


class SharedModels:
    """``follow`` is for a task of its own."""

    def __init__(
        self,
        models: Models,
        saved: Saved,
        leader: Callable[[], object],
        late: Callable[[], None] = lambda: None,
    ) -> None:
        """``leader``: who leads now, another object for each time that somebody begins to; ``late`` is called when
        others turn out to be in force than whoever was sent there knows."""
        self._models = models
        self._saved = saved
        self._leader = leader
        self._late = late
        self._reading = asyncio.Lock()
        """``follow`` and ``config`` may read at a time, and what one has read is no news for the other."""
        self._taken = 0
        """How often there was news."""
        self._known_of: object = None
        """Whose models are known."""
        self._said = ""

    @property
    def known(self) -> bool:
        """The models of whoever leads now are known here."""
        return self._known_of == self._leader()

    async def follow(self) -> None:
        while True:
            leader, taken = self._leader(), self._taken
            read = await self.read()
            if self._known_of == leader and self._taken != taken:
                self._late()
            self._known_of = leader  # Also without the store: nobody can have changed them without it.
            with suppress(TimeoutError):
                async with asyncio.timeout(None if read else AGAIN_S):
                    while self._leader() == leader:
                        await asyncio.sleep(LOOK_S)

    async def read(self) -> bool:
        """False: the store cannot be read."""
        async with self._reading:
            return await self._read()

    async def _read(self) -> bool:
        try:
            saved = await self._saved.load()
        except StoreError as error:
            if str(error) != self._said:
                log.warning("which ChironModels are in force cannot be read: %s", error)
            self._said = str(error)
            return False
        self._said = ""
        if saved is not None:
            await asyncio.to_thread(self._models.take, saved)
            self._taken += 1
        return True

    async def config(self) -> ServeConfig | None:
        """As it is in force, if that is not what it was."""
        await self.read()
        return await asyncio.to_thread(self._models.renewed)
