"""Operations on items: lease, finish, release, and what is pending. They run on the writer's thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from heapq import heappop
from itertools import groupby
from pathlib import Path

from chiron.store.directory import disk_error, file_path
from chiron.store.jobs.batches import batch_row
from chiron.store.jobs.database import Database, Transaction
from chiron.store.jobs.items import Leased, leased_item, with_body
from chiron.store.jobs.rows import INDEX_MAX, OPEN, item_index, item_key
from chiron.store.port import Item, PendingWork
from chiron.store.sqlite.leases import LaneLeases, Leases
from chiron.store.sums import ATTEMPT_FACTOR, ITEM_COLUMNS, Row, item_fits


def lease(
    db: Database,
    leases: Leases,
    model: str,
    limit: int,
    before_deadline_s: float | None,
    bytes_max: float,
    damaged: Callable[[str], None] = lambda what: None,
    besides: Collection[str] = (),
) -> list[Leased]:
    """The cost grows with ``limit`` and the number of running batches, not with their items. ``damaged`` hears of items
    whose rows are damaged: these stay leased and run for nobody until the store is mended."""
    found: list[Leased] = []
    lanes = db.execute(
        "SELECT batch, lane, work.items, id, owner, endpoint, expires_s, input_file_id FROM batches JOIN work"
        " ON work.batch = batches.no WHERE status = 'in_progress' AND work.model = ? AND work.items > 0"
        " AND (? IS NULL OR expires_s < ?) ORDER BY expires_s, no",
        (model, before_deadline_s, before_deadline_s),
    )
    for row in lanes:
        if len(found) >= limit or bytes_max <= 0:
            break
        lane = leases.lane(row["batch"], row["lane"])
        if row["items"] <= len(lane.leased) or row["id"] in besides:
            continue
        batch_row(db, row["batch"])  # Checked before anything is taken from it.
        taken = _take(db, lane, row["batch"], row["lane"], limit - len(found), bytes_max)
        bytes_max -= sum(item["bytes"] for item in taken)
        for item in taken:
            if item_fits(item):
                found.append(leased_item(row, model, item))
            else:
                number = item_index(item["key"]) + 1
                damaged(f"batch {row['id']!r}, request {number} of the input: its row in the database is damaged")
    lanes.close()
    return found


def _take(db: Database, lane: LaneLeases, batch: int, number: int, limit: int, bytes_max: float) -> list[Row]:
    """Lease up to ``limit`` open items of a lane: first those that came back, then on from the cursor."""
    taken: list[Row] = []
    while len(taken) < limit and bytes_max > 0 and lane.released:
        index = heappop(lane.released)
        row = db.execute(_ONE_OPEN, (item_key(batch, index),)).fetchone()
        if row is not None and index not in lane.leased:
            lane.take(index, row["input_bytes"])
            bytes_max -= row["bytes"]
            taken.append(row)
    if len(taken) == limit or bytes_max <= 0:
        return taken
    fresh = db.execute(_NEXT_OPEN, (item_key(batch, lane.cursor), item_key(batch + 1, 0), number))
    for row in fresh:
        lane.take(item_index(row["key"]), row["input_bytes"])
        bytes_max -= row["bytes"]
        taken.append(row)
        if len(taken) == limit or bytes_max <= 0:
            lane.cursor = item_index(row["key"]) + 1
            break
    else:
        # Nothing is left: what comes back of a rare model does not make us look for more of it again.
        lane.cursor = INDEX_MAX
    fresh.close()
    return taken


def read_bodies(directory: Path, leased: Sequence[Leased]) -> tuple[list[Item], list[str]]:
    """The items with their bodies, and the ids of batches whose input file does not hold them any more."""
    found: list[Item] = []
    lost: list[str] = []
    for batch_id, group in groupby(leased, key=lambda item: item.batch_id):
        several = list(group)
        bodies = _bodies(file_path(directory, several[0].input_file_id), several)
        if any(len(body) != item.bytes for body, item in zip(bodies, several, strict=True)):
            lost.append(batch_id)
        else:
            found += [with_body(item, body) for item, body in zip(several, bodies, strict=True)]
    return found, lost


def _bodies(path: Path, leased: Sequence[Leased]) -> list[bytes]:
    """Short where the file is."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [os.pread(descriptor, item.bytes, item.offset) for item in leased]
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return [b""] * len(leased)
    except OSError as error:
        raise disk_error(error, path) from error


_ITEM = f"SELECT {', '.join(ITEM_COLUMNS)}, sum FROM items"
_ONE_OPEN = f"{_ITEM} WHERE key = ? AND state = {OPEN}"
_NEXT_OPEN = f"{_ITEM} WHERE key >= ? AND key < ? AND lane = ? AND state = {OPEN} ORDER BY key"


def release(transaction: Transaction, leases: Leases, items: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
    numbers: dict[str, int | None] = {}
    for batch_id, index in items:
        if batch_id not in numbers:
            row = transaction.db.execute("SELECT no FROM batches WHERE id = ?", (batch_id,)).fetchone()
            numbers[batch_id] = None if row is None else row["no"]
        no = numbers[batch_id]
        item = no and transaction.db.execute("SELECT lane FROM items WHERE key = ?", (item_key(no, index),)).fetchone()
        if not no or not item:
            continue
        if leases.release(no, item["lane"], index, transaction.undo) and failed_attempt:
            transaction.db.execute(
                "UPDATE items SET attempts = attempts + 1, sum = sum + ? WHERE key = ?",
                (ATTEMPT_FACTOR, item_key(no, index)),
            )


def pending(db: Database, leases: Leases) -> list[PendingWork]:
    rows = db.execute(
        "SELECT batch, lane, work.model, items, input_bytes, input_bytes_square, id, expires_s FROM batches JOIN work"
        " ON work.batch = batches.no WHERE status = 'in_progress' AND items > 0 ORDER BY expires_s, no, lane"
    )
    found = []
    for row in rows:
        lane = leases.lane(row["batch"], row["lane"])
        if row["items"] > len(lane.leased):
            found.append(
                PendingWork(
                    batch_id=row["id"],
                    model=row["model"],
                    deadline_s=row["expires_s"],
                    items=row["items"] - len(lane.leased),
                    input_bytes=row["input_bytes"] - lane.input_bytes,
                    input_bytes_square=row["input_bytes_square"] - lane.input_bytes_square,
                )
            )
    return found
