"""The speed and ETA of a batch: pure functions of what the store records about it."""

from __future__ import annotations

from chiron.store.port import Batch

SLOT_S = 10
"""Ends of items are counted per so many seconds: enough for a rate over a minute, and a few numbers per batch."""
SLOTS = 6
"""Slots that make up the minute; the one under way is one of them."""

Slots = tuple[tuple[int, int], ...]


def count_ends(recent: Slots, items: int, now_s: float) -> Slots:
    """``recent`` with ``items`` more ends at ``now_s``, and without what is too old to matter."""
    slot = _slot(now_s)
    counts = dict(recent)
    counts[slot] = counts.get(slot, 0) + items
    return tuple(sorted((start, count) for start, count in counts.items() if start > slot - SLOTS * SLOT_S))


def items_per_s(batch: Batch, now_s: float) -> float:
    """Items ended per second over the last minute, or since the batch began if that is less."""
    first = _slot(now_s) - (SLOTS - 1) * SLOT_S
    ended = sum(count for start, count in batch.recent if start >= first)
    began_s = batch.created_s if batch.in_progress_s is None else batch.in_progress_s
    return ended / max(1.0, now_s - max(first, began_s))


def eta_s(batch: Batch, now_s: float) -> float | None:
    """Seconds until the last item ends at the present rate; None when the batch is not running or nothing has ended.

    A batch that ended nothing in the last minute is judged by its average so far.
    """
    if batch.status != "in_progress" or batch.in_progress_s is None:
        return None
    ended = batch.completed + batch.failed
    rate = items_per_s(batch, now_s) or ended / max(1.0, now_s - batch.in_progress_s)
    return (batch.total - ended) / rate if rate > 0 else None


def _slot(now_s: float) -> int:
    return int(now_s // SLOT_S) * SLOT_S
