"""What an operator reads of batches: which go on after a start, and which have ended, and how."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from math import inf

from chiron.core.units import show_duration
from chiron.store.port import ENDED, Batch, BatchStore, NotFound, PendingWork, StoreError

log = logging.getLogger("chiron.batch")


class BatchLog:
    """Says each once. The store ends batches by itself, so those that have nothing left to run are looked up."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store
        self._open: dict[str, None] = {}
        """Batches that had work when last looked at, in the order in which they came."""

    def resumed(self, pending: Iterable[PendingWork], unvalidated: Iterable[Batch], wall_s: float) -> None:
        """What the last process left."""
        left: dict[str, int] = {}
        due_s: dict[str, float] = {}
        for work in pending:
            left[work.batch_id] = left.get(work.batch_id, 0) + work.items
            due_s[work.batch_id] = min(work.deadline_s, due_s.get(work.batch_id, inf))
        for id, items in left.items():
            if items:
                log.info("batch %s continues: %d items left, due in %s", id, items, _in_s(due_s[id] - wall_s))
        for batch in unvalidated:
            log.info("batch %s continues: its input is validated again", batch.id)

    def saw(self, batch_id: str) -> None:
        """An item of it was taken out of the store, maybe before anybody saw it waiting."""
        self._open[batch_id] = None

    async def look(self, pending: Iterable[PendingWork], in_flight: Collection[str]) -> None:
        """``pending`` work of the store, and batches of which items are out."""
        busy = dict.fromkeys((*(work.batch_id for work in pending if work.items), *in_flight))
        for id in [id for id in self._open if id not in busy]:
            try:
                batch = await self._store.get_batch(id, None)
            except NotFound:
                del self._open[id]
                continue
            except StoreError as error:
                log.debug("batch %s: not known whether it has ended: %s", id, error)
                continue
            if batch.status in ENDED:
                del self._open[id]
                _say_ended(batch)
        self._open |= busy


def _say_ended(batch: Batch) -> None:
    at_s = getattr(batch, f"{batch.status}_s") or batch.created_s
    log.info(
        "batch %s ended: %s after %s, %d of %d items done, %d failed",
        batch.id,
        batch.status,
        show_duration(round(max(0.0, at_s - batch.created_s))),
        batch.completed,
        batch.total,
        batch.failed,
    )


def _in_s(seconds: float) -> str:
    return show_duration(round(seconds)) if seconds > 0.0 else "no time: it expires"
