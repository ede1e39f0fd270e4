"""A batch store that is opened beside everything else, and the runner that begins once it is.

A store that has no room, or that takes long to open because it is mended or brought up to date, holds up batches only:
it is tried again until there is room.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from chiron.gateway.batch.runner import BatchRunner
from chiron.net.clock import LiveClock
from chiron.store.port import Batch, BatchStore, StoreError, StoreFull, StoreUnavailable

log = logging.getLogger("chiron.gateway")

OPEN_WAIT_S = 10.0
"""For so long a start waits for the store; it then goes on without it."""
OPEN_AGAIN_MIN_S, OPEN_AGAIN_MAX_S = 1.0, 30.0
"""Between two tries to open a store that has no room."""
BATCHES_PERIOD_S = 1.0
"""Between two looks at the store for the status page."""


class StoreOpening:
    """Opens a store, starts its runner, and looks at its batches. ``close`` leaves both as they are."""

    def __init__(
        self, store: BatchStore, runner: BatchRunner, *, clock: LiveClock, data: Path, opened: asyncio.Event
    ) -> None:
        """``data``: the gateway's directory; ``opened`` is set once the store can be asked."""
        self.batches: list[Batch] = []
        """As of the last look."""
        self._store = store
        self._runner = runner
        self._clock = clock
        self._data = data
        self._opened = opened
        self._tried = asyncio.Event()
        """Set once the store could not be opened for want of room."""
        self._opening: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def begin(self) -> bool:
        """Open it; False: it is not open yet, and what is wrong is said, or will be."""
        self._opening = asyncio.get_running_loop().create_task(self.open_store())
        tried = asyncio.ensure_future(self._tried.wait())
        await asyncio.wait((self._opening, tried), timeout=OPEN_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        tried.cancel()
        if self._opening.done():
            await self._opening
        elif not self._store.unavailable:
            self._store.unavailable = f"{self._data}: the store is being opened; it may be repaired or upgraded"
            log.warning("%s", self._store.unavailable)
        return self._opening.done()

    async def start_runner(self) -> None:
        """Now, or as soon as the store is open."""
        assert self._opening is not None
        if self._opening.done():
            await self._start_runner()
        else:
            self._starting = asyncio.get_running_loop().create_task(self._start_batches(self._opening))

    def look(self) -> None:
        """Again and again, for the status page."""
        self._clock.call_later(BATCHES_PERIOD_S, self.look)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._read_batches())

    def close(self) -> None:
        for task in (self._starting, self._opening, self._looking):
            if task is not None:
                task.cancel()

    async def open_store(self) -> None:
        """Raises StoreError at the first try for anything but a lack of room, or a server that is away."""
        delay_s = OPEN_AGAIN_MIN_S
        while True:
            try:
                await self._store.open()
                self._opened.set()
                return
            except StoreError as error:
                if not isinstance(error, StoreFull | StoreUnavailable) and not self._tried.is_set():
                    raise
                if str(error) != self._store.unavailable:
                    log.error("batches and files are not served: %s; retrying", error)
                self._store.unavailable = str(error)
                self._tried.set()
            await asyncio.sleep(delay_s)
            delay_s = min(OPEN_AGAIN_MAX_S, 2.0 * delay_s)

    async def _start_runner(self) -> None:
        """The server of a store may go just when it is open."""
        delay_s = OPEN_AGAIN_MIN_S
        while True:
            try:
                return await self._runner.start()
            except StoreUnavailable as error:
                log.warning("batches are not run: %s; retrying", error)
            await asyncio.sleep(delay_s)
            delay_s = min(OPEN_AGAIN_MAX_S, 2.0 * delay_s)

    async def _start_batches(self, opening: asyncio.Task[None]) -> None:
        try:
            await opening
            await self._start_runner()
        except Exception:
            log.exception("batches and files are not served until a restart")
            self._store.unavailable = self._store.unavailable or "the store could not be opened; see the log"
        else:
            log.info("batches and files are served")

    async def _read_batches(self) -> None:
        try:
            self.batches = await self._store.list_batches(None, limit=100)
        except StoreUnavailable:
            self.batches = []  # It was told why.
        except StoreError as error:
            log.warning("the status page shows no batches: %s", error)
