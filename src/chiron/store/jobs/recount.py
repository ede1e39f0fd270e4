"""What a batch's row repeats of its items and results, recomputed from them: counts, sizes, open work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from chiron.store.jobs.batches import ended_s, insert_file, results_file
from chiron.store.jobs.database import Database
from chiron.store.jobs.results import id_size, lost_line, unfinished_line
from chiron.store.jobs.rows import FAILED, LOST, OK, OPEN, item_index, item_key, keep_copy, write_row
from chiron.store.port import ENDED, RUNNING, LineError
from chiron.store.sums import COLUMNS, ITEM_COLUMNS, Row, item_sum


def keys_of(batch: int) -> tuple[int, int]:
    """For ``key BETWEEN ? AND ?``."""
    return item_key(batch, 0), item_key(batch + 1, 0) - 1


def set_state(db: Database, key: int, state: int) -> None:
    row = db.execute("SELECT * FROM items WHERE key = ?", (key,)).fetchone()
    write_item(db, *[state if name == "state" else row[name] for name in ITEM_COLUMNS])


def write_item(db: Database, *values: Any) -> None:
    """By ``ITEM_COLUMNS``; what was there is replaced."""
    db.insert_rows("items", (*ITEM_COLUMNS, "sum"), [(*values, item_sum(*values))], True)


def recounted(db: Database, batch: dict[str, Any], served: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The batch with counts and sizes as its items and results have them, but for files whose lines were deleted
    (``served``: the states, ``OK`` and ``FAILED``, whose lines are still there; of a running batch all are). Its rows
    of ``work`` are written anew."""
    no, status = batch["no"], batch["status"]
    ended = status in ENDED
    counts = dict(
        db.execute("SELECT state, count(*) FROM items WHERE key BETWEEN ? AND ? GROUP BY state", keys_of(no)).fetchall()
    )
    sizes = dict(
        db.execute(
            "SELECT state, CAST(sum(length(line) + 1) AS BIGINT) FROM items JOIN results USING(key)"
            " WHERE key BETWEEN ? AND ? GROUP BY state",
            keys_of(no),
        ).fetchall()
    )
    missing = batch["total"] - sum(counts.values())
    changed = dict(batch) | {"incomplete": int(missing > 0)}
    changed["completed"] = counts.get(OK, 0)
    changed["failed"] = batch["total"] - changed["completed"] if ended else counts.get(FAILED, 0) + counts.get(LOST, 0)
    if OK in served or not ended:
        changed["output_bytes"] = sizes.get(OK, 0)
    if FAILED in served or not ended:
        changed["error_bytes"] = sizes.get(FAILED, 0) + _made_bytes(db, batch, ended)
    db.execute("DELETE FROM work WHERE batch = ?", (no,))
    if status in RUNNING:
        _write_work(db, no, json.loads(batch["lanes"]))
    return changed


def add_missing(db: Database, batch: Row, rows: Sequence[tuple[Any, ...]]) -> None:
    """Items of a batch that ran already, by ``ITEM_COLUMNS``: those of them that the disk has lost. Of a batch that is
    over nobody knows any more how they ended."""
    lost = batch["status"] not in RUNNING
    for key, _, *rest in rows:
        if db.execute("SELECT 1 FROM items WHERE key = ?", (key,)).fetchone() is None:
            write_item(db, key, LOST if lost else OPEN, *rest)


def end_mending(db: Database, batch: Row, trouble: str) -> None:
    """The input was read again, as far as it could be. What is still missing is lost, and its name too."""
    no = batch["no"]
    have = {
        item_index(row["key"]) for row in db.execute("SELECT key FROM items WHERE key BETWEEN ? AND ?", keys_of(no))
    }
    for index in range(batch["total"]):
        if index not in have:
            write_item(db, item_key(no, index), LOST, 0, 0, 0, 0, 0, "", None)
    served = served_of(db, batch)
    after = recounted(db, {name: batch[name] for name in COLUMNS["batches"]}, served)
    if trouble:
        errors = json.loads(after["errors"])[:99]
        message = f"Requests that the server's disk had lost could not be read again: {trouble}"
        after["errors"] = json.dumps([*errors, asdict(LineError(code="input_file_damaged", message=message))])
    settle_files(db, after, served)
    write_row(db, "batches", after)
    keep_copy(db, "batches", after)


FILES_OF = ((OK, "output_file_id"), (FAILED, "error_file_id"))
BOTH = frozenset({OK, FAILED})


def served_of(db: Database, batch: Row) -> frozenset[int]:
    """States whose lines are still there."""
    return frozenset(
        state
        for state, name in FILES_OF
        if batch[name] is None or db.execute("SELECT 1 FROM files WHERE id = ?", (batch[name],)).fetchone()
    )


def settle_files(db: Database, batch: dict[str, Any], served: frozenset[int] = BOTH) -> None:
    """The rows of output and errors of a batch that is over say what its lines are; ``batch`` gets their ids."""
    if batch["status"] not in ENDED:
        return
    of_files = zip(FILES_OF, ("completed", "failed"), ("output_bytes", "error_bytes"), strict=True)
    for (state, name), count, size in of_files:
        if state not in served:
            continue
        row = db.execute("SELECT * FROM files WHERE id = ?", (batch[name],)).fetchone()
        if row is not None:
            values = {column: row[column] for column in COLUMNS["files"]} | {"bytes": batch[size]}
            write_row(db, "files", values)
            keep_copy(db, "files", values)
        elif batch[name] is not None or batch[count]:
            kind = "output" if state == OK else "error"
            file = results_file(batch, kind, batch[size], ended_s(batch), batch[name])
            insert_file(db, file, state)
            batch[name] = file.id


def _made_bytes(db: Database, batch: dict[str, Any], ended: bool) -> int:
    """Size of the lines that are made when they are read."""
    size = 0
    states = (LOST, OPEN) if ended else (LOST, LOST)
    for row in db.execute(
        "SELECT key, state, custom_id FROM items WHERE key BETWEEN ? AND ? AND state IN (?, ?)",
        (*keys_of(batch["no"]), *states),
    ):
        of_reason = row["state"] == LOST or batch["status"] == "completed"
        index, custom_id = item_index(row["key"]), row["custom_id"]
        line = (
            lost_line(batch["id"], index, custom_id)
            if of_reason
            else unfinished_line(batch["id"], batch["status"], index, custom_id)
        )
        size += len(line) + 1
    return size


def _write_work(db: Database, no: int, lanes: list[str]) -> None:
    sums: dict[int, list[int]] = {}
    for row in db.execute(
        f"SELECT lane, input_bytes, custom_id FROM items WHERE key BETWEEN ? AND ? AND state = {OPEN}", keys_of(no)
    ):
        items = sums.setdefault(row["lane"], [0, 0, 0, 0])
        size = row["input_bytes"]
        for place, more in enumerate((1, size, size * size, id_size(row["custom_id"]))):
            items[place] += more
    for lane, model in enumerate(lanes):
        names = ("items", "input_bytes", "input_bytes_square", "id_bytes")
        values: dict[str, Any] = dict(zip(names, sums.get(lane, [0, 0, 0, 0]), strict=True))
        write_row(db, "work", values | {"batch": no, "lane": lane, "model": model})
