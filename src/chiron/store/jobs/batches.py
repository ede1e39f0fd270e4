"""Operations on batches as a whole: made, begun, cancelled, ended, swept. They run on the writer's thread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any
from uuid import uuid4

from chiron.store.jobs.database import Database, Leases, Transaction
from chiron.store.jobs.results import unfinished_bytes
from chiron.store.jobs.rows import (
    BATCH_DEFAULTS,
    FAILED,
    OK,
    OPEN,
    change_row,
    drop_copy,
    insert_row,
    item_key,
    keep_copy,
)
from chiron.store.port import ENDED, Batch, BatchStatus, Conflict, LineError, NotFound, StoredFile, TokenUsage
from chiron.store.sums import Row, check_row, row_sum
from chiron.store.trusted_clock import ClockMarks

PURGE_STEP = 2_000
"""Items whose rows are removed in one step: a few milliseconds."""

EXPIRE_STEP = 500
"""Files that are removed at one look, because their time is over."""

_FIELDS = tuple(field.name for field in fields(Batch))
SELECT_BATCH = "SELECT * FROM batches"
SELECT_FILE = "SELECT * FROM files"


def checked_batch(row: Row) -> Row:
    return check_row("batches", row, f"batch {row['id']!r}")


def checked_file(row: Row) -> Row:
    return check_row("files", row, f"file {row['id']!r}")


def read_batch(row: Row) -> Batch:
    """Of a row that was checked."""
    values: dict[str, Any] = {name: row[name] for name in _FIELDS}
    values["metadata"] = json.loads(values["metadata"])
    values["errors"] = tuple(LineError(**error) for error in json.loads(values["errors"]))
    values["recent"] = tuple((start, count) for start, count in json.loads(values["recent"]))
    values["usage"] = TokenUsage(*json.loads(values["usage"]))
    return Batch(**values)


def find_batch(db: Database, batch_id: str, owner: str | None = None) -> Row:
    row: Row | None = db.execute(f"{SELECT_BATCH} WHERE id = ?", (storable(batch_id),)).fetchone()
    if row is None or owner not in (None, row["owner"]):
        raise NotFound(f"no batch {batch_id!r}")
    return checked_batch(row)


def batch_row(db: Database, no: int) -> Row:
    row: Row = db.execute(f"{SELECT_BATCH} WHERE no = ?", (no,)).fetchone()
    return checked_batch(row)


def find_file(db: Database, file_id: str, owner: str | None = None) -> Row:
    row: Row | None = db.execute(f"{SELECT_FILE} WHERE id = ?", (storable(file_id),)).fetchone()
    if row is None or owner not in (None, row["owner"]):
        raise NotFound(f"no file {file_id!r}")
    return checked_file(row)


def storable(text: str) -> str:
    """Text as any database can store it: JSON and forms can carry halves of surrogate pairs, which UTF-8 cannot, and
    NUL, which PostgreSQL cannot."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


def fits(table: str, row: Row) -> bool:
    *values, found = row
    return bool(row_sum(table, values) == found)


def read_file_row(row: Row) -> StoredFile:
    names = ("id", "purpose", "filename", "bytes", "created_s", "owner", "expires_s", "batch_id")
    return StoredFile(**{name: row[name] for name in names})


def insert_file(db: Database, file: StoredFile, state: int | None = None, block_sums: bytes | None = None) -> None:
    """``block_sums``: of an upload; those from before there were any have none."""
    names = ("id", "purpose", "filename", "bytes", "created_s", "owner", "expires_s", "batch_id")
    values: dict[str, object] = {name: getattr(file, name) for name in names}
    values |= {"state": state, "block_sums": block_sums}
    keep_copy(db, "files", values | {"no": insert_row(db, "files", values)})


def new_file_id() -> str:
    return f"file-{uuid4().hex}"


def create_batch(
    transaction: Transaction,
    *,
    owner: str,
    input_file_id: str,
    endpoint: str,
    completion_window: str,
    deadline_s: float,
    metadata: Mapping[str, str],
    now_s: float,
    output_expires_after_s: float | None,
) -> Batch:
    file = find_file(transaction.db, input_file_id, owner)
    if file["batch_id"] is not None:
        raise Conflict(f"file {input_file_id!r} is the output of a batch; upload it to use it as input")
    batch_id = f"batch_{uuid4().hex}"
    values = BATCH_DEFAULTS | {
        "id": batch_id,
        "owner": owner,
        "input_file_id": input_file_id,
        "endpoint": endpoint,
        "completion_window": completion_window,
        "status": "validating",
        "metadata": json.dumps(dict(metadata)),
        "created_s": now_s,
        "expires_s": deadline_s,
        "output_expires_after_s": output_expires_after_s,
    }
    no = insert_row(transaction.db, "batches", values)
    keep_copy(transaction.db, "batches", values | {"no": no})
    return read_batch(find_batch(transaction.db, batch_id))


def update_batch(db: Database, no: int, **values: object) -> None:
    """``values`` by column; the names are ours. Raises StoreDamaged: what is damaged must not be summed anew."""
    change_batch(db, batch_row(db, no), **values)


def change_batch(db: Database, row: Row, **values: object) -> None:
    """The same, for a row that was read and checked in this transaction."""
    after = change_row(db, "batches", row, values)
    if "status" in values:
        keep_copy(db, "batches", after)


def fail_validation(transaction: Transaction, no: int, errors: list[LineError], now_s: float) -> None:
    update_batch(transaction.db, no, status="failed", failed_s=now_s, errors=_errors_text(errors))
    purge(transaction, no)


def cancel_batch(transaction: Transaction, leases: Leases, batch_id: str, now_s: float, owner: str | None) -> Batch:
    row = find_batch(transaction.db, batch_id, owner)
    status = row["status"]
    if status == "validating":
        # The thread that validates notices at its next block of items.
        update_batch(transaction.db, row["no"], status="cancelled", cancelling_s=now_s, cancelled_s=now_s)
        purge(transaction, row["no"])
    elif status == "in_progress":
        update_batch(transaction.db, row["no"], status="cancelling", cancelling_s=now_s)
        end_if_idle(transaction, leases, batch_id, now_s)
    elif status not in ("cancelling", "cancelled"):
        raise Conflict(f"batch {batch_id!r} is {status} and can no longer be cancelled")
    return read_batch(find_batch(transaction.db, batch_id))


def expire(transaction: Transaction, leases: Leases, now_s: float) -> list[str]:
    """Those now past their deadline. Those that only wait for leased items end as soon as none is."""
    db = transaction.db
    # What could not be removed for want of room is tried again.
    transaction.has_chores = True
    late = db.execute(
        f"{SELECT_BATCH} WHERE status = 'in_progress' AND expires_s <= ? ORDER BY expires_s, no", (now_s,)
    ).fetchall()
    late = [row for row in late if fits("batches", row)]
    for row in late:
        update_batch(db, row["no"], status="finalizing", finalizing_s=now_s)
    for row in db.execute(f"{SELECT_BATCH} WHERE status IN ('finalizing', 'cancelling')").fetchall():
        if fits("batches", row):
            end_if_idle(transaction, leases, row["id"], now_s)
    return [row["id"] for row in late]


def end_if_idle(transaction: Transaction, leases: Leases, batch_id: str, now_s: float) -> None:
    """End a batch that has all its results, or that leases no more and whose last leased item is back."""
    row = find_batch(transaction.db, batch_id)
    if row["incomplete"]:
        return  # Some of its items are still to be read again.
    if row["completed"] + row["failed"] == row["total"]:
        end_batch(transaction, leases, row, "cancelled" if row["status"] == "cancelling" else "completed", now_s)
    elif row["status"] in ("finalizing", "cancelling") and not leases.count(transaction.db, row["no"]):
        end_batch(transaction, leases, row, "expired" if row["status"] == "finalizing" else "cancelled", now_s)


def end_batch(transaction: Transaction, leases: Leases, row: Row, status: BatchStatus, now_s: float) -> None:
    """The batch leaves no item behind: those without a result count as failed, and their lines are made when read."""
    db, no = transaction.db, row["no"]
    open_items, id_bytes = open_work(db, no)
    failed = row["failed"] + open_items
    error_bytes = row["error_bytes"] + unfinished_bytes(status, open_items, id_bytes)
    values: dict[str, object] = {
        "status": status,
        f"{status}_s": now_s,
        "finalizing_s": now_s if row["finalizing_s"] is None else row["finalizing_s"],
        "failed": failed,
        "error_bytes": error_bytes,
        "recent": "[]",
    }
    if row["completed"]:
        values["output_file_id"] = _add_results_file(db, row, "output", OK, row["output_bytes"], now_s)
    if failed:
        values["error_file_id"] = _add_results_file(db, row, "error", FAILED, error_bytes, now_s)
    update_batch(db, no, **values)
    db.execute("DELETE FROM work WHERE batch = ?", (no,))
    leases.drop(transaction, no)


def open_work(db: Database, no: int) -> tuple[int, int]:
    """Items of a running batch without a result, and the sum of ``id_size`` over them."""
    rows = [check_work(row) for row in db.execute("SELECT * FROM work WHERE batch = ?", (no,))]
    return sum(row["items"] for row in rows), sum(row["id_bytes"] for row in rows)


def check_work(row: Row) -> Row:
    """``row`` has the columns of ``work``."""
    return check_row("work", row, f"the open items of model {row['model']!r} in batch number {row['batch']}")


def lose_input(transaction: Transaction, leases: Leases, batch_id: str, now_s: float) -> None:
    """End a batch whose input file was taken away behind our back: what is not done cannot be done."""
    row = find_batch(transaction.db, batch_id)
    if row["status"] not in ENDED:
        message = f"the input file {row['input_file_id']!r} is no longer there, or shorter than it was"
        errors = [LineError(code="input_file_missing", message=message, param="input_file_id")]
        update_batch(transaction.db, row["no"], errors=_errors_text(errors))
        end_batch(transaction, leases, row, "failed", now_s)


def _errors_text(errors: list[LineError]) -> str:
    return json.dumps([asdict(error) for error in errors])


def _add_results_file(db: Database, row: Row, name: str, state: int, size: int, now_s: float) -> str:
    file = results_file(row, name, size, now_s)
    insert_file(db, file, state)
    return file.id


def results_file(row: Row | Mapping[str, Any], name: str, size: int, now_s: float, id: str | None = None) -> StoredFile:
    """The output or error file of a batch."""
    after_s = row["output_expires_after_s"]
    return StoredFile(
        id=id or new_file_id(),
        purpose="batch_output",
        filename=f"{row['id']}_{name}.jsonl",
        bytes=size,
        created_s=now_s,
        owner=row["owner"],
        expires_s=None if after_s is None else now_s + after_s,
        batch_id=row["id"],
    )


def ended_s(row: Mapping[str, Any]) -> float:
    """When a batch ended, or the last time that is known of it."""
    names = ("completed_s", "failed_s", "expired_s", "cancelled_s", "cancelling_s", "finalizing_s", "in_progress_s")
    return float(next((row[name] for name in names if row[name] is not None), row["created_s"]))


def delete_file(transaction: Transaction, file_id: str, owner: str | None) -> None:
    """Remove the row. The caller removes the plain file of an upload after the commit."""
    db = transaction.db
    row = find_file(db, file_id, owner)
    if (user := db.execute(_USER_OF_FILE, (file_id, *ENDED)).fetchone()) is not None:
        raise Conflict(f"file {file_id!r} is the input of batch {user['id']!r}, which has not ended")
    _drop_file(transaction, row)


def expire_files(transaction: Transaction, now_s: float) -> list[str]:
    """Remove files that are to go by themselves by now and that no running batch needs, some at a time. Returns the
    ids of the uploads among them."""
    rows = transaction.db.execute(
        "SELECT * FROM files WHERE expires_s <= ? AND NOT EXISTS"
        f" (SELECT 1 FROM batches WHERE input_file_id = files.id AND status NOT IN ({', '.join('?' * len(ENDED))}))"
        " ORDER BY expires_s LIMIT ?",
        (now_s, *ENDED, EXPIRE_STEP),
    ).fetchall()
    rows = [row for row in rows if fits("files", row)]
    for row in rows:
        _drop_file(transaction, row)
    return [row["id"] for row in rows if row["batch_id"] is None]


def _drop_file(transaction: Transaction, row: Row) -> None:
    """The row, and the lines if it is a batch's output or errors."""
    if row["batch_id"] is not None:
        purge(transaction, find_batch(transaction.db, row["batch_id"])["no"], row["state"])
    else:
        # The content goes after the commit; if we do not live to see that, at the next start.
        transaction.db.execute("INSERT INTO removals(id) VALUES(?)", (row["id"],))
    transaction.db.execute("DELETE FROM files WHERE no = ?", (row["no"],))
    drop_copy(transaction.db, "files", row["no"])


def forget_removals(transaction: Transaction, file_ids: list[str]) -> None:
    """Their content is gone."""
    for file_id in file_ids:
        transaction.db.execute("DELETE FROM removals WHERE id = ?", (file_id,))


_USER_OF_FILE = f"SELECT id FROM batches WHERE input_file_id = ? AND status NOT IN ({', '.join('?' * len(ENDED))})"


def clock_marks(db: Database, kept: ClockMarks) -> ClockMarks:
    """``kept``, or what the newest time in a store says that has kept none."""
    if kept.seen_s is not None:
        return kept
    newest_s = db.execute(
        "SELECT max(s) FROM (SELECT max(created_s) AS s FROM files UNION ALL SELECT max(coalesce(completed_s, failed_s,"
        " expired_s, cancelled_s, finalizing_s, in_progress_s, created_s)) FROM batches) AS newest"
    ).fetchone()[0]
    return kept if newest_s is None else ClockMarks(seen_s=newest_s, trusted_s=newest_s)


def sweep(transaction: Transaction, before_s: float) -> tuple[int, list[str]]:
    """Forget batches that ended before then and uploads from before then that no running batch needs. Returns how
    many batches, and the ids of the uploads."""
    db = transaction.db
    marks = ", ".join("?" * len(ENDED))
    old = db.execute(
        f"{SELECT_BATCH} WHERE status IN ({marks}) AND coalesce(completed_s, failed_s, expired_s, cancelled_s) <= ?",
        (*ENDED, before_s),
    ).fetchall()
    # Only a row that fits its sum says how old it is: a damaged one deletes nothing.
    old = [row for row in old if fits("batches", row)]
    for row in old:
        for file in db.execute(f"{SELECT_FILE} WHERE batch_id = ?", (row["id"],)).fetchall():
            db.execute("DELETE FROM files WHERE no = ?", (file["no"],))
            drop_copy(db, "files", file["no"])
        db.execute("DELETE FROM batches WHERE no = ?", (row["no"],))
        drop_copy(db, "batches", row["no"])
        purge(transaction, row["no"])
    uploads = db.execute(
        f"{SELECT_FILE} WHERE batch_id IS NULL AND created_s <= ? AND NOT EXISTS"
        f" (SELECT 1 FROM batches WHERE input_file_id = files.id AND status NOT IN ({marks}))",
        (before_s, *ENDED),
    ).fetchall()
    uploads = [row for row in uploads if fits("files", row)]
    for row in uploads:
        _drop_file(transaction, row)
    return len(old), [row["id"] for row in uploads]


def purge(transaction: Transaction, batch: int, state: int | None = None) -> None:
    """Have the rows of a batch removed in small steps, also across restarts: results of items in ``state``, or all."""
    transaction.has_chores = True
    insert_row(transaction.db, "purges", {"batch": batch, "state": state, "next_key": item_key(batch, 0)})


def purge_step(transaction: Transaction) -> None:
    """The writer's chore: remove some rows of those to be removed."""
    db = transaction.db
    todo = db.execute("SELECT * FROM purges LIMIT 1").fetchone()
    if todo is None:
        return
    check_row("purges", todo, "what is to be removed")
    transaction.has_chores = True
    end = item_key(todo["batch"] + 1, 0)
    last = db.execute(
        "SELECT max(key) FROM (SELECT key FROM items WHERE key >= ? AND key < ? ORDER BY key LIMIT ?) AS part",
        (todo["next_key"], end, PURGE_STEP),
    ).fetchone()[0]
    if last is None:
        db.execute("DELETE FROM purges WHERE no = ?", (todo["no"],))
        return
    span = (todo["next_key"], last)
    if todo["state"] is None:
        db.execute("DELETE FROM results WHERE key BETWEEN ? AND ?", span)
        db.execute("DELETE FROM items WHERE key BETWEEN ? AND ?", span)
    else:
        assert todo["state"] != OPEN
        db.execute(
            "DELETE FROM results WHERE key BETWEEN ? AND ?"
            " AND (SELECT state FROM items WHERE items.key = results.key) = ?",
            (*span, todo["state"]),
        )
    change_row(db, "purges", todo, {"next_key": last + 1})
