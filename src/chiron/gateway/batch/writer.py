"""Results on their way to the store: many at a time, and none forgotten while the disk is full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from chiron.gateway.batch.settings import RunnerClock, RunnerSettings, back_off
from chiron.store.port import BatchStore, Ended, Item

log = logging.getLogger("chiron.batch")

Place = tuple[str, int]
"""An item: batch id and index."""


class ResultWriter:
    """Takes results, and items that go back without one, and writes them in groups. ``run`` does the work."""

    def __init__(
        self, *, store: BatchStore, clock: RunnerClock, tuning: RunnerSettings, on_return: Callable[[], None]
    ) -> None:
        """``on_return`` is called when items are back in the store, or the store has room again."""
        self._store = store
        self._clock = clock
        self._tuning = tuning
        self._on_return = on_return
        self._results: list[Ended] = []
        self._returned: dict[bool, list[Place]] = {True: [], False: []}
        """Items to give back, by whether that was a failed attempt."""
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self.paused = ""
        """Why nothing is written, if it is not: the store's complaint."""

    @property
    def unwritten(self) -> int:
        return len(self._results)

    @property
    def full(self) -> bool:
        """No more work should be taken: its results would pile up here."""
        return bool(self.paused) or len(self._results) >= self._tuning.unwritten_max

    def add(self, ended: Ended) -> None:
        self._results.append(ended)
        self._wake(at_once=len(self._results) >= self._tuning.finish_max)

    def give_back(self, items: Iterable[Item], *, failed: bool) -> None:
        self._returned[failed].extend((item.batch_id, item.index) for item in items)
        self._wake(at_once=False)

    def close(self) -> None:
        """``run`` returns once all is written, or at the first failure."""
        self._closing = True
        self._due.set()

    async def run(self) -> None:
        delay_s = self._tuning.backoff_min_s
        while True:
            await self._due.wait()
            self._due.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            while self._results or any(self._returned.values()):
                try:
                    await self._write()
                except Exception as error:
                    self.paused = f"results cannot be written: {error}"
                    if self._closing:
                        return
                    delay_s = await back_off(self._clock, self._tuning, "writing results", error, delay_s)
                    continue
                delay_s = self._tuning.backoff_min_s
                if self.paused:
                    self.paused = ""
                    log.info("results are written again")
                    self._on_return()
            if self._closing:
                return

    async def _write(self) -> None:
        """One group. What could not be written stays."""
        chunk = self._results[: self._tuning.finish_max]
        if chunk:
            await self._store.finish(chunk, self._clock.wall_s(self._clock.now_s))
            del self._results[: len(chunk)]
        for failed, places in self._returned.items():
            count = len(places)
            if count:
                await self._store.release(places[:count], failed)
                del places[:count]
                self._on_return()

    def _wake(self, *, at_once: bool) -> None:
        if at_once:
            self._due.set()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._tuning.finish_wait_s, self._due.set)
