"""Operations on items: lease, finish, release, and what is pending. They run on the writer's thread."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from heapq import heappop
from itertools import groupby
from pathlib import Path
from zlib import crc32

from chiron.store.batches import SELECT_BATCH, batch_row, change_batch, check_work, checked_batch, end_if_idle
from chiron.store.database import FAILED, INDEX_MAX, OK, OPEN, item_index, item_key, write_row
from chiron.store.directory import disk_error, file_path
from chiron.store.leases import LaneLeases, Leases
from chiron.store.port import NO_TOKENS, RUNNING, Ended, Item, PendingWork, TokenUsage
from chiron.store.progress import count_ends
from chiron.store.results import id_size
from chiron.store.sums import ATTEMPT_FACTOR, ITEM_COLUMNS, STATE_FACTOR, item_fits, result_sum
from chiron.store.writer import Transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A leased item whose body is still to be read from the file."""

    batch_id: str
    owner: str
    endpoint: str
    deadline_s: float
    input_file_id: str
    index: int
    custom_id: str
    model: str
    attempts: int
    offset: int
    bytes: int
    body_sum: int | None


def lease(
    db: sqlite3.Connection,
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
                found.append(_leased(row, model, item))
            else:
                number = item_index(item["key"]) + 1
                damaged(f"batch {row['id']!r}, request {number} of the input: its row in the database is damaged")
    lanes.close()
    return found


def _leased(row: sqlite3.Row, model: str, item: sqlite3.Row) -> Leased:
    return Leased(
        batch_id=row["id"],
        owner=row["owner"],
        endpoint=row["endpoint"],
        deadline_s=row["expires_s"],
        input_file_id=row["input_file_id"],
        index=item_index(item["key"]),
        custom_id=item["custom_id"],
        model=model,
        attempts=item["attempts"],
        offset=item["offset"],
        bytes=item["bytes"],
        body_sum=item["body_sum"],
    )


def _take(
    db: sqlite3.Connection, lane: LaneLeases, batch: int, number: int, limit: int, bytes_max: float
) -> list[sqlite3.Row]:
    """Lease up to ``limit`` open items of a lane: first those that came back, then on from the cursor."""
    taken: list[sqlite3.Row] = []
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
            found += [_with_body(item, body) for item, body in zip(several, bodies, strict=True)]
    return found, lost


def _damage(leased: Leased, body: bytes) -> str:
    if leased.body_sum is None or crc32(body) == leased.body_sum:
        return ""
    return (
        f"The input file {leased.input_file_id} is damaged on the server's disk: the bytes from {leased.offset} to "
        f"{leased.offset + leased.bytes} are no longer what they were when the batch was accepted."
    )


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


def _with_body(leased: Leased, body: bytes) -> Item:
    damage = _damage(leased, body)
    return Item(
        batch_id=leased.batch_id,
        index=leased.index,
        custom_id=leased.custom_id,
        model=leased.model,
        endpoint=leased.endpoint,
        body=b"" if damage else body,
        deadline_s=leased.deadline_s,
        attempts=leased.attempts,
        owner=leased.owner,
        damage=damage,
    )


_ITEM = f"SELECT {', '.join(ITEM_COLUMNS)}, sum FROM items"
_ONE_OPEN = f"{_ITEM} WHERE key = ? AND state = {OPEN}"
_NEXT_OPEN = f"{_ITEM} WHERE key >= ? AND key < ? AND lane = ? AND state = {OPEN} ORDER BY key"


@dataclass(slots=True)
class _Sums:
    """What a lane no longer has open."""

    items: int = 0
    input_bytes: int = 0
    input_bytes_square: int = 0
    id_bytes: int = 0


@dataclass(slots=True)
class _Gains:
    """What a batch has gained in results."""

    items: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    """Bytes of lines with their line breaks."""
    lanes: defaultdict[int, _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    written: list[tuple[int, bytes, int]] = field(default_factory=list)
    usage: TokenUsage = NO_TOKENS

    def add(self, state: int, size: int, item: sqlite3.Row, usage: TokenUsage) -> None:
        self.usage = TokenUsage(*(a + b for a, b in zip(self.usage, usage, strict=True)))
        self.items[state] += 1
        self.sizes[state] += size
        sums = self.lanes[item["lane"]]
        sums.items += 1
        sums.input_bytes += item["input_bytes"]
        sums.input_bytes_square += item["input_bytes"] ** 2
        sums.id_bytes += id_size(item["custom_id"])


def finish(transaction: Transaction, leases: Leases, ended: Sequence[Ended], now_s: float) -> None:
    by_batch: dict[str, list[Ended]] = {}
    for one in ended:
        by_batch.setdefault(one.batch_id, []).append(one)
    for batch_id, results in by_batch.items():
        row = transaction.db.execute(f"{SELECT_BATCH} WHERE id = ?", (batch_id,)).fetchone()
        if row is None or row["status"] not in RUNNING:
            continue  # It ended without these; they are listed there as expired or cancelled.
        checked_batch(row)
        gains = _keep(transaction, leases, row["no"], results)
        if gains.lanes:
            _count(transaction.db, row, gains, now_s)
        left = row["total"] - row["completed"] - row["failed"] - gains.items.total()
        if not left or row["status"] != "in_progress":
            end_if_idle(transaction, leases, batch_id, now_s)


def _keep(transaction: Transaction, leases: Leases, batch: int, results: Sequence[Ended]) -> _Gains:
    """Write the lines of items that have none."""
    gains = _Gains()
    lines: dict[int, tuple[bytes, int, TokenUsage]] = {}
    for result in results:
        # Of two results for one item the first counts.
        lines.setdefault(item_key(batch, result.index), (result.line, OK if result.ok else FAILED, result.usage))
    for state in (OK, FAILED):
        keys = [key for key, (_, of_state, _) in lines.items() if of_state == state]
        for start in range(0, len(keys), _KEYS_MAX):
            for item in _close(transaction.db, state, keys[start : start + _KEYS_MAX]):
                line, _, usage = lines[item["key"]]
                leases.end(batch, item["lane"], item_index(item["key"]), transaction.undo)
                gains.add(state, len(line) + 1, item, usage)
                gains.written.append((item["key"], line, result_sum(item["key"], state, line)))
    transaction.db.executemany("INSERT INTO results(key, line, sum) VALUES(?, ?, ?)", gains.written)
    return gains


_KEYS_MAX = 500
"""Keys in one statement."""


def _close(db: sqlite3.Connection, state: int, keys: Sequence[int]) -> list[sqlite3.Row]:
    """Give open items their final state; returns those that were open."""
    marks = ", ".join("?" * len(keys))
    return db.execute(
        f"UPDATE items SET state = ?, sum = sum + ? WHERE state = {OPEN} AND key IN ({marks})"
        " RETURNING key, lane, input_bytes, custom_id",
        (state, state * STATE_FACTOR, *keys),
    ).fetchall()


def _count(db: sqlite3.Connection, row: sqlite3.Row, gains: _Gains, now_s: float) -> None:
    recent = tuple((start, count) for start, count in json.loads(row["recent"]))
    usage = [a + b for a, b in zip(json.loads(row["usage"]), gains.usage, strict=True)]
    change_batch(
        db,
        row,
        completed=row["completed"] + gains.items[OK],
        failed=row["failed"] + gains.items[FAILED],
        output_bytes=row["output_bytes"] + gains.sizes[OK],
        error_bytes=row["error_bytes"] + gains.sizes[FAILED],
        recent=json.dumps(count_ends(recent, gains.items.total(), now_s)),
        usage=json.dumps(usage),
    )
    for lane, sums in gains.lanes.items():
        work = db.execute("SELECT * FROM work WHERE batch = ? AND lane = ?", (row["no"], lane)).fetchone()
        left = dict(check_work(work))
        for name in ("items", "input_bytes", "input_bytes_square", "id_bytes"):
            left[name] -= getattr(sums, name)
        write_row(db, "work", left)


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


def pending(db: sqlite3.Connection, leases: Leases) -> list[PendingWork]:
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
