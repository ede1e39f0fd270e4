"""Leases of items, in memory only.

A lease does not outlive the process that took it, and the directory has one process: writing leases down would cost a
write per item and buy nothing. After a crash every item without a result is simply pending. Only the writer's thread
touches this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappush

from chiron.store.jobs.database import Database, Transaction
from chiron.store.jobs.rows import OPEN, item_index
from chiron.store.sums import STATE_FACTOR, Row

KEYS_MAX = 500
"""Keys in one statement."""

Undo = Callable[[], None]


class LaneLeases:
    """Leases in one batch for one model. Every item before ``cursor`` has ended, is leased or is in ``released``."""

    __slots__ = ("cursor", "input_bytes", "input_bytes_square", "leased", "released")

    def __init__(self) -> None:
        self.cursor = 0
        """Index from which on no item has been leased."""
        self.released: list[int] = []
        """A heap of indices that came back."""
        self.leased: dict[int, int] = {}
        """Index to input bytes."""
        self.input_bytes = 0
        self.input_bytes_square = 0

    def take(self, index: int, input_bytes: int) -> None:
        self.leased[index] = input_bytes
        self.input_bytes += input_bytes
        self.input_bytes_square += input_bytes * input_bytes

    def give_up(self, index: int) -> int:
        input_bytes = self.leased.pop(index)
        self.input_bytes -= input_bytes
        self.input_bytes_square -= input_bytes * input_bytes
        return input_bytes


class Leases:
    """Implements ``jobs.database.Leases``."""

    def __init__(self) -> None:
        self._batches: dict[int, dict[int, LaneLeases]] = {}

    def lane(self, batch: int, lane: int) -> LaneLeases:
        """Leases of the model that has number ``lane`` in the batch."""
        lanes = self._batches.setdefault(batch, {})
        found = lanes.get(lane)
        if found is None:
            found = lanes[lane] = LaneLeases()
        return found

    def count(self, db: Database, batch: int) -> int:
        """Leased items of a batch."""
        return sum(len(lane.leased) for lane in self._batches.get(batch, {}).values())

    def end(self, batch: int, lane: int, index: int, undo: list[Undo]) -> bool:
        """The item is nobody's any more; False if it was nobody's."""
        found = self._batches.get(batch, {}).get(lane)
        if found is None or index not in found.leased:
            return False
        input_bytes = found.give_up(index)
        undo.append(lambda: found.take(index, input_bytes))
        return True

    def release(self, batch: int, lane: int, index: int, undo: list[Undo]) -> bool:
        """The item is to be leased again; False if it was nobody's."""
        if not self.end(batch, lane, index, undo):
            return False
        # Taking this back leaves the index among the released, where leasing finds it leased and skips it.
        heappush(self.lane(batch, lane).released, index)
        return True

    def drop(self, transaction: Transaction, batch: int) -> None:
        """The batch has ended."""
        lanes = self._batches.pop(batch, None)
        if lanes is not None:
            transaction.undo.append(lambda: self._batches.update({batch: lanes}))

    def close(self, transaction: Transaction, batch: int, state: int, keys: Sequence[int]) -> list[Row]:
        """Give open items their final state; they are nobody's any more."""
        closed: list[Row] = []
        for start in range(0, len(keys), KEYS_MAX):
            some = keys[start : start + KEYS_MAX]
            closed += transaction.db.execute(
                f"UPDATE items SET state = ?, sum = sum + ? WHERE state = {OPEN} AND key IN ({marks(some)})"
                " RETURNING key, lane, input_bytes, custom_id",
                (state, state * STATE_FACTOR, *some),
            ).fetchall()
        for item in closed:
            self.end(batch, item["lane"], item_index(item["key"]), transaction.undo)
        return closed


def marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))
