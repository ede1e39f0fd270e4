"""GPUs of this machine, handed out and taken back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

_Wait = tuple[int, asyncio.Future[tuple[str, ...]], Callable[[Sequence[str]], Sequence[str]]]


class Devices:
    """First come, first served: an instance that needs four is not overtaken for ever by those that need one."""

    def __init__(self, names: Sequence[str]) -> None:
        if len(set(names)) != len(names):
            raise ValueError(f"devices are {list(names)}; each may be named once")
        self.names = tuple(names)
        self._free = list(names)
        self._waiting: deque[_Wait] = deque()

    @property
    def free(self) -> int:
        return len(self._free)

    async def take(
        self, count: int, timeout_s: float, prefer: Callable[[Sequence[str]], Sequence[str]] = tuple
    ) -> tuple[str, ...] | None:
        """``count`` devices, or None if that many did not become free within ``timeout_s`` seconds. ``prefer`` orders
        those that are free, the best first, in the moment in which some are handed out."""
        place: asyncio.Future[tuple[str, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, place, prefer))
        self._serve()
        try:
            await asyncio.wait((place,), timeout=timeout_s)
        except asyncio.CancelledError:
            # Cancelled in the moment in which they were handed out.
            if place.done():
                self.give(place.result())
            raise
        finally:
            if not place.done():
                place.cancel()
                self._serve()
        return None if place.cancelled() else place.result()

    def give(self, devices: Sequence[str]) -> None:
        self._free += devices
        self._free.sort(key=self.names.index)
        self._serve()

    def _serve(self) -> None:
        waiting = self._waiting
        while waiting and (waiting[0][1].cancelled() or waiting[0][0] <= len(self._free)):
            count, place, prefer = waiting.popleft()
            if not place.cancelled():
                taken = tuple(prefer(self._free)[:count])
                self._free = [name for name in self._free if name not in taken]
                place.set_result(taken)
