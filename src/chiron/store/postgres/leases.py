"""Who has which item, written down: several gateways lease from one job.

A holder is a gateway from one start to its end. It says every few seconds, by the server's clock, until when it is to
be believed alive; what a holder has that is over is leased to others. So a lease costs one small change of its item's
row, and none to be kept. ``leased`` has the sums over what each holder has, in rows of its own: holders do not wait for
one another. Rows that another gateway is leasing at this moment are skipped.

If the server's clock jumps ahead, holders seem over until they say it again, and items may run twice. If it is set
back, they seem alive in a future that no lease reaches: that counts as over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from chiron.store.jobs.batches import batch_row
from chiron.store.jobs.database import Database, Transaction
from chiron.store.jobs.items import Leased, leased_item
from chiron.store.jobs.rows import OPEN, QUOTED, item_index, item_key
from chiron.store.port import PendingWork
from chiron.store.sums import ATTEMPT_FACTOR, STATE_FACTOR, Row, item_fits

ALIVE: Final = "until BETWEEN clock_timestamp() AND clock_timestamp() + INTERVAL '2 hours'"
"""Of a holder. A lease lasts for an hour at most."""
RETURNED: Final = 0
"""The holder of an item that came back."""
RESCAN_S: Final = 30.0
"""So often items are looked for from the first one on: a gateway that was cut off while it leased may have left some
behind."""
_ITEM: Final = f"SELECT {', '.join(QUOTED)}, sum FROM items"


@dataclass(slots=True)
class Holder:
    """This gateway. Implements ``jobs.database.Leases``. Only the writer's thread touches it."""

    no: int = -1
    cursors: dict[tuple[int, int], int] = field(default_factory=dict)
    """By batch and lane: nobody leased an item from there on, as far as we know."""
    rescan_at_s: float = 0.0

    def count(self, db: Database, batch: int) -> int:
        row = db.execute(
            "SELECT CAST(coalesce(sum(items), 0) AS BIGINT) AS items FROM leased WHERE batch = ?", (batch,)
        )
        return int(row.fetchone()["items"])

    def drop(self, transaction: Transaction, batch: int) -> None:
        transaction.db.execute("DELETE FROM leased WHERE batch = ?", (batch,))
        span = (item_key(batch, 0), item_key(batch + 1, 0))
        transaction.db.execute("DELETE FROM returned WHERE key >= ? AND key < ?", span)
        for place in [place for place in self.cursors if place[0] == batch]:
            del self.cursors[place]

    def close(self, transaction: Transaction, batch: int, state: int, keys: Sequence[int]) -> list[Row]:
        db = transaction.db
        closed: list[Row] = db.execute(
            f"WITH was AS (SELECT key, holder FROM items WHERE key = ANY(?) AND state = {OPEN} FOR UPDATE)"
            " UPDATE items SET state = ?, sum = sum + ?, holder = NULL FROM was WHERE items.key = was.key"
            " RETURNING items.key, lane, input_bytes, custom_id, was.holder",
            (list(keys), state, state * STATE_FACTOR),
        ).fetchall()
        if back := [row["key"] for row in closed if row["holder"] == RETURNED]:
            db.execute("DELETE FROM returned WHERE key = ANY(?)", (back,))
        _count(db, batch, [row for row in closed if row["holder"]], -1)
        return closed


def _count(db: Database, batch: int, items: Sequence[Row], sign: int) -> None:
    """Add items, with lane, holder and input_bytes, to what their holders have, or subtract them."""
    sums: dict[tuple[int, int], list[int]] = {}
    for row in items:
        found = sums.setdefault((row["lane"], row["holder"]), [0, 0, 0])
        for place, more in enumerate((1, row["input_bytes"], row["input_bytes"] ** 2)):
            found[place] += sign * more
    for (lane, holder), (count, size, square) in sorted(sums.items()):
        if sign > 0:
            db.execute(
                "INSERT INTO leased(batch, lane, holder, items, input_bytes, input_bytes_square)"
                " VALUES(?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (batch, lane, holder) DO UPDATE SET items = leased.items + excluded.items,"
                " input_bytes = leased.input_bytes + excluded.input_bytes,"
                " input_bytes_square = leased.input_bytes_square + excluded.input_bytes_square",
                (batch, lane, holder, count, size, square),
            )
        else:
            db.execute(
                "UPDATE leased SET items = items + ?, input_bytes = input_bytes + ?,"
                " input_bytes_square = input_bytes_square + ? WHERE batch = ? AND lane = ? AND holder = ?",
                (count, size, square, batch, lane, holder),
            )


def lease(
    db: Database,
    holder: Holder,
    model: str,
    limit: int,
    before_deadline_s: float | None,
    bytes_max: float,
    damaged: Callable[[str], None],
    besides: Collection[str],
    now_s: float,
) -> list[Leased]:
    """``now_s``: of any clock that runs on. Items whose rows are damaged stay leased and run for nobody."""
    if now_s >= holder.rescan_at_s:
        holder.cursors.clear()
        holder.rescan_at_s = now_s + RESCAN_S
    found: list[Leased] = []
    bound = "" if before_deadline_s is None else " AND expires_s < ?"
    lanes = db.execute(
        "SELECT batch, lane, work.items, id, owner, endpoint, expires_s, input_file_id,"
        " CAST((SELECT coalesce(sum(leased.items), 0) FROM leased"
        "  WHERE leased.batch = work.batch AND leased.lane = work.lane) AS BIGINT) AS leased"
        " FROM batches JOIN work ON work.batch = batches.no WHERE status = 'in_progress' AND work.model = ?"
        f" AND work.items > 0{bound} ORDER BY expires_s, no",
        (model,) if before_deadline_s is None else (model, before_deadline_s),
    ).fetchall()
    for row in lanes:
        if len(found) >= limit or bytes_max <= 0:
            break
        if row["items"] <= row["leased"] or row["id"] in besides:
            continue
        batch_row(db, row["batch"])  # Checked before anything is taken from it.
        taken = _take(db, holder, row["batch"], row["lane"], limit - len(found), bytes_max)
        bytes_max -= sum(item["bytes"] for item in taken)
        for item in taken:
            if item_fits(item):
                found.append(leased_item(row, model, item))
            else:
                number = item_index(item["key"]) + 1
                damaged(f"batch {row['id']!r}, request {number} of the input: its row in the database is damaged")
    return found


def _take(db: Database, holder: Holder, batch: int, lane: int, limit: int, bytes_max: float) -> list[Row]:
    """Lease up to ``limit`` open items of a lane: first those that came back, then on from the cursor."""
    end = item_key(batch + 1, 0)
    back = db.execute(
        "SELECT key FROM returned WHERE key >= ? AND key < ? AND lane = ? ORDER BY key LIMIT ? FOR UPDATE SKIP LOCKED",
        (item_key(batch, 0), end, lane, limit),
    ).fetchall()
    taken: list[Row] = []
    if back:
        keys = [row["key"] for row in back]
        rows = db.execute(f"{_ITEM} WHERE key = ANY(?) ORDER BY key", (keys,)).fetchall()
        taken = _first(rows, bytes_max)
        db.execute("DELETE FROM returned WHERE key = ANY(?)", ([row["key"] for row in taken],))
        bytes_max -= sum(row["bytes"] for row in taken)
    if len(taken) < limit and bytes_max > 0:
        start = holder.cursors.get((batch, lane), item_key(batch, 0))
        rows = db.execute(
            f"{_ITEM} WHERE key >= ? AND key < ? AND lane = ? AND state = {OPEN} AND holder IS NULL"
            " ORDER BY key LIMIT ? FOR UPDATE SKIP LOCKED",
            (start, end, lane, limit - len(taken)),
        ).fetchall()
        fresh = _first(rows, bytes_max)
        full = len(taken) + len(fresh) == limit or len(fresh) < len(rows)
        # Nothing is left: what comes back of a rare model does not make us look for more of it again.
        holder.cursors[batch, lane] = fresh[-1]["key"] + 1 if fresh and full else start if full else end
        taken += fresh
    if taken:
        db.execute("UPDATE items SET holder = ? WHERE key = ANY(?)", (holder.no, [row["key"] for row in taken]))
        _count(db, batch, [_held(row, holder.no) for row in taken], 1)
    return taken


def _held(row: Row, holder: int) -> Row:
    held: dict[str, object] = {"lane": row["lane"], "input_bytes": row["input_bytes"], "holder": holder}
    return held


def _first(rows: list[Row], bytes_max: float) -> list[Row]:
    """As many as it takes to have ``bytes_max`` bytes."""
    for place, row in enumerate(rows):
        bytes_max -= row["bytes"]
        if bytes_max <= 0:
            return rows[: place + 1]
    return rows


def release(transaction: Transaction, holder: Holder, items: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
    by_batch: dict[str, list[int]] = {}
    for batch_id, index in items:
        by_batch.setdefault(batch_id, []).append(index)
    for batch_id, indices in by_batch.items():
        row = transaction.db.execute("SELECT no FROM batches WHERE id = ?", (batch_id,)).fetchone()
        if row is not None:
            keys = [item_key(row["no"], index) for index in indices]
            _give_back(transaction, row["no"], holder.no, "items.key = ANY(?)", [keys], int(failed_attempt))


def _give_back(
    transaction: Transaction, batch: int, holder: int, which: str, values: Sequence[object], attempts: int
) -> None:
    db = transaction.db
    rows = db.execute(
        f"UPDATE items SET holder = {RETURNED}, attempts = attempts + ?, sum = sum + ? WHERE {which} AND holder = ?"
        f" AND state = {OPEN} RETURNING key, lane, input_bytes",
        (attempts, attempts * ATTEMPT_FACTOR, *values, holder),
    ).fetchall()
    if not rows:
        return
    transaction.has_news = True
    db.execute(
        "INSERT INTO returned(key, lane) SELECT * FROM unnest(CAST(? AS BIGINT[]), CAST(? AS BIGINT[]))"
        " ON CONFLICT DO NOTHING",
        ([row["key"] for row in rows], [row["lane"] for row in rows]),
    )
    _count(db, batch, [_held(row, holder) for row in rows], -1)


def pending(db: Database) -> list[PendingWork]:
    rows = db.execute(
        "SELECT work.batch, work.lane, work.model, id, expires_s, work.items - coalesce(held.items, 0) AS items,"
        " work.input_bytes - coalesce(held.input_bytes, 0) AS input_bytes,"
        " work.input_bytes_square - coalesce(held.input_bytes_square, 0) AS input_bytes_square"
        " FROM batches JOIN work ON work.batch = batches.no LEFT JOIN"
        " (SELECT batch, lane, CAST(sum(items) AS BIGINT) AS items, CAST(sum(input_bytes) AS BIGINT) AS input_bytes,"
        "  CAST(sum(input_bytes_square) AS BIGINT) AS input_bytes_square FROM leased GROUP BY batch, lane) AS held"
        " ON held.batch = work.batch AND held.lane = work.lane"
        " WHERE status = 'in_progress' AND work.items > coalesce(held.items, 0) ORDER BY expires_s, no, work.lane"
    )
    return [
        PendingWork(
            batch_id=row["id"],
            model=row["model"],
            deadline_s=row["expires_s"],
            items=row["items"],
            input_bytes=row["input_bytes"],
            input_bytes_square=row["input_bytes_square"],
        )
        for row in rows.fetchall()
    ]


# Validation.


def begin_validation(transaction: Transaction, holder: Holder, batch_id: str) -> bool:
    """Whether nobody else validates it."""
    row = transaction.db.execute(
        "INSERT INTO validations(batch, holder) VALUES(?, ?) ON CONFLICT (batch) DO UPDATE SET holder = excluded.holder"
        " WHERE NOT EXISTS (SELECT 1 FROM holders WHERE no = validations.holder AND no != excluded.holder"
        f"  AND {ALIVE}) RETURNING batch",
        (batch_id, holder.no),
    ).fetchone()
    return row is not None


def end_validation(transaction: Transaction, holder: Holder, batch_id: str) -> None:
    transaction.db.execute("DELETE FROM validations WHERE batch = ? AND holder = ?", (batch_id, holder.no))


def validated_by_others(db: Database, holder: Holder) -> set[str]:
    rows = db.execute(
        f"SELECT batch FROM validations JOIN holders ON no = holder WHERE no != ? AND {ALIVE}",
        (holder.no,),
    )
    return {row["batch"] for row in rows.fetchall()}


# Holders.


def register(db: Database, name: str, lease_s: float) -> int:
    row = db.execute(
        "INSERT INTO holders(name, until, commits) VALUES(?, clock_timestamp() + make_interval(secs => ?), 0)"
        " RETURNING no",
        (name, lease_s),
    ).fetchone()
    return int(row["no"])


def is_alive(db: Database, name: str) -> bool:
    """Whether there is a holder of this name."""
    return db.execute(f"SELECT no FROM holders WHERE name = ? AND {ALIVE}", (name,)).fetchone() is not None


def free_over(transaction: Transaction, but: int, name: str | None = None) -> list[str]:
    """Free what holders have that are over, or that have this name: of one name only the newest lives. Returns the
    names of those that were over."""
    db = transaction.db
    if name is not None:  # Also one that is about to commit: what it commits later must fail.
        db.execute("SELECT no FROM holders WHERE name = ? ORDER BY no FOR UPDATE", (name,))
    over = db.execute(
        f"SELECT no, name FROM holders WHERE no != ? AND (NOT ({ALIVE}) OR name = ?) ORDER BY no"
        " FOR UPDATE SKIP LOCKED",
        (but, name or ""),
    ).fetchall()
    for row in over:
        free(transaction, row["no"])
    return [row["name"] for row in over]


def free(transaction: Transaction, holder: int) -> None:
    """Nothing is this holder's any more, and there is no such holder."""
    db = transaction.db
    places = db.execute("SELECT DISTINCT batch FROM leased WHERE holder = ? AND items > 0", (holder,)).fetchall()
    for row in places:
        batch = row["batch"]
        span = [item_key(batch, 0), item_key(batch + 1, 0)]
        _give_back(transaction, batch, holder, "key >= ? AND key < ?", span, 0)
    db.execute("DELETE FROM leased WHERE holder = ?", (holder,))
    db.execute("INSERT INTO removals(id) SELECT id FROM uploads WHERE holder = ?", (holder,))
    db.execute("DELETE FROM uploads WHERE holder = ?", (holder,))
    db.execute("DELETE FROM validations WHERE holder = ?", (holder,))
    db.execute("DELETE FROM holders WHERE no = ?", (holder,))
    transaction.has_chores = True
