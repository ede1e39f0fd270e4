"""Items: results that come in, and what leasing one gives."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from chiron.store.jobs.batches import SELECT_BATCH, change_batch, check_work, checked_batch, end_if_idle
from chiron.store.jobs.database import Database, Leases, Transaction
from chiron.store.jobs.results import id_size
from chiron.store.jobs.rows import FAILED, OK, item_index, item_key, write_row
from chiron.store.port import NO_TOKENS, RUNNING, Ended, Item, TokenUsage
from chiron.store.progress import count_ends
from chiron.store.sums import COLUMNS, Row, result_sum


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


def leased_item(row: Row, model: str, item: Row) -> Leased:
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


def with_body(leased: Leased, body: bytes) -> Item:
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


def _damage(leased: Leased, body: bytes) -> str:
    if leased.body_sum is None or crc32(body) == leased.body_sum:
        return ""
    return (
        f"The input file {leased.input_file_id} is damaged on the server's disk: the bytes from {leased.offset} to "
        f"{leased.offset + leased.bytes} are no longer what they were when the batch was accepted."
    )


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
        for item in leases.close(transaction, batch, state, keys) if keys else ():
            line, _, usage = lines[item["key"]]
            gains.add(state, len(line) + 1, item, usage)
            gains.written.append((item["key"], line, result_sum(item["key"], state, line)))
    transaction.db.insert_rows("results", ("key", "line", "sum"), gains.written, False)
    return gains


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

    def add(self, state: int, size: int, item: Row, usage: TokenUsage) -> None:
        self.usage = TokenUsage(*(a + b for a, b in zip(self.usage, usage, strict=True)))
        self.items[state] += 1
        self.sizes[state] += size
        sums = self.lanes[item["lane"]]
        sums.items += 1
        sums.input_bytes += item["input_bytes"]
        sums.input_bytes_square += item["input_bytes"] ** 2
        sums.id_bytes += id_size(item["custom_id"])


def _count(db: Database, row: Row, gains: _Gains, now_s: float) -> None:
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
        left = dict(zip((*COLUMNS["work"], "sum"), check_work(work), strict=True))
        for name in ("items", "input_bytes", "input_bytes_square", "id_bytes"):
            left[name] -= getattr(sums, name)
        write_row(db, "work", left)
