"""A loop on a thread of its own: what runs there waits for nothing that this process computes meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class OwnLoop:
    """Begins at once. ``close`` cuts off what runs there."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the coroutine returns that ``make`` makes there. Cancelled here, it is cancelled there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(make(), self._loop))

    def call(self, function: Callable[[], None]) -> None:
        """Soon, and there."""
        self._loop.call_soon_threadsafe(function)

    async def close(self) -> None:
        if not self._loop.is_closed():
            await self.run(_end_others)
            self.call(self._loop.stop)
            await asyncio.to_thread(self._thread.join)
            self._loop.close()


async def _end_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
