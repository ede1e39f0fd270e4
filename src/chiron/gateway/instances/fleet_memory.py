"""What a fleet has to know at the next start, in a store that several gateways share: any of them may lead then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from chiron.fleet.waiting import pause
from chiron.store.port import StoreDamaged, StoreError

log = logging.getLogger("chiron.gateway")

AGAIN_S = 5.0
"""After the store could not be used."""

_T = TypeVar("_T")


class Store(Protocol):
    """As far as it is used."""

    async def save_learned(self, name: str, data: bytes) -> None: ...

    async def load_learned(self, name: str) -> bytes | None: ...


class FleetMemory:
    """Implements ``Memory``."""

    def __init__(self, opened: asyncio.Event, store: Callable[[], Store], again_s: float = AGAIN_S) -> None:
        """``store`` may be called once ``opened`` is set."""
        self._opened = opened
        self._store = store
        self._again_s = again_s

    async def load(self, name: str) -> bytes | None:
        try:
            return await self._asked(lambda store: store.load_learned(name))
        except StoreDamaged as error:
            log.warning("%s", error)
            return None

    async def save(self, name: str, data: bytes) -> None:
        await self._asked(lambda store: store.save_learned(name, data))

    async def _asked(self, ask: Callable[[Store], Awaitable[_T]]) -> _T:
        await self._opened.wait()
        said = ""
        while True:
            try:
                return await ask(self._store())
            except StoreDamaged:
                raise
            except StoreError as error:
                if str(error) != said:
                    log.warning("the store cannot be asked where this gateway had instances: %s; retrying", error)
                said = str(error)
            await pause(self._again_s)
