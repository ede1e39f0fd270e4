"""Heaps of instances by figures that change: what the routers over such heaps share.

Each change of an instance pushes a new entry, under a number of its own. One with an earlier number is stale: it is
dropped when it surfaces, and all of them together once they are most of a heap. So a change costs O(log n), amortised,
and nobody looks for an entry inside a heap.
"""

from __future__ import annotations

from heapq import heapify

from chiron.core.types import Instance

Entry = tuple[float, int, int, Instance]
"""The figure, the instance's id for ties, the number of the change, the instance."""


class Changes:
    """The router's note about an instance (``Instance.index``)."""

    __slots__ = ("last", "open")

    def __init__(self) -> None:
        self.open = True
        """It takes work."""
        self.last = 0
        """Number of its last change."""


def opened(instance: Instance) -> bool:
    """It takes work from now on. False: it did already."""
    if instance.index is None:
        instance.index = Changes()
        return True
    changes: Changes = instance.index
    was, changes.open = changes.open, True
    return not was


def closed(instance: Instance) -> bool:
    """It takes none any more: all its entries are stale. False: it took none before."""
    changes: Changes = instance.index
    was, changes.open = changes.open, False
    changes.last += 1
    return was


def current(heap: list[Entry]) -> list[Entry]:
    """Without those that are stale."""
    kept = [entry for entry in heap if entry[2] == entry[3].index.last]
    heapify(kept)
    return kept
