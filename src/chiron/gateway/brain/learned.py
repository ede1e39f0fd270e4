"""What the control plane has learned, kept in the store: every minute, at the stop, and read at the start.

Taken on the loop, which costs a fraction of a millisecond for each model; made into bytes on a thread. Nothing depends
on it: what cannot be kept or read is said in the log, and the gateway learns anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from chiron.control.learned import Learned, LearnedError, from_bytes
from chiron.net.clock import LiveClock
from chiron.runtime.input_log import Inputs
from chiron.store.port import BatchStore, StoreError

log = logging.getLogger("chiron.learned")

NAME = "control"
"""Under which the store keeps it."""
PERIOD_S = 60.0


class LearnedKeeper:
    """``wall_s`` tells the Unix time."""

    def __init__(self, *, store: BatchStore, clock: LiveClock, plane: Inputs, wall_s: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._plane = plane
        self._wall_s = wall_s
        self._found: Learned | None = None
        self._saving: asyncio.Task[None] | None = None
        self._failed = ""
        self._begun = False

    async def read(self) -> None:
        """Before ``begin``, once the store is open. With a store that is not, all is learned anew."""
        try:
            data = await self._store.load_learned(NAME)
            self._found = from_bytes(data) if data is not None else None
        except (StoreError, LearnedError) as error:
            log.warning("what was learned before is not used: %s", error)

    def begin(self) -> None:
        """Posted, before the control plane begins: give it what was read, and keep what it learns from now on."""
        self._begun = True
        found, self._found = self._found, None
        if found is not None:
            for note in self._plane.restore(found, self._wall_s() - found.wall_s):
                log.warning("of what was learned before is left out: %s", note)
        self._clock.call_later(PERIOD_S, self._due)

    def _due(self) -> None:
        self._clock.call_later(PERIOD_S, self._due)
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._save(self._plane.learned(self._wall_s())))

    async def close(self) -> None:
        """Keep what has been learned to the end, before the store is closed. Whoever was stopped before it began knows
        nothing: what is kept stays."""
        if not self._begun:
            return
        if self._saving is not None:
            await self._saving
        await self._save(self._plane.learned(self._wall_s()))

    async def _save(self, learned: Learned) -> None:
        try:
            await self._store.save_learned(NAME, await asyncio.to_thread(learned.to_bytes))
        except (StoreError, ValueError) as error:
            if str(error) != self._failed:
                log.warning("what was learned cannot be kept: %s", error)
            self._failed = str(error)
        else:
            self._failed = ""
