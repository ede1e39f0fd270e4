"""Output and error files: not files, but rows read in the order of the input, a block at a time.

Each block is a short read of its own, from behind the last key: a slow client holds back no checkpoint. The results of
a batch that has ended do not change, so the blocks fit together; when they go, the reader hears of it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from chiron.store.database import FAILED, OK, OPEN, item_index, item_key
from chiron.store.port import ENDED, request_id

_REASONS = {
    "expired": ("batch_expired", "The batch's completion window ended before this request was completed."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was completed."),
    "failed": ("input_file_missing", "The input file was lost before this request was completed."),
}
"""By status of the batch: why items without a result have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    lines: bytes
    """Whole lines, each with its line break; empty at the end."""
    next_key: int


def first_key(batch: int) -> int:
    return item_key(batch, 0)


def read_page(db: sqlite3.Connection, batch: sqlite3.Row, state: int, from_key: int, block_bytes: int) -> Page:
    """Lines of the output (state ``OK``) or error file (``FAILED``) from ``from_key`` on."""
    end_key = item_key(batch["no"] + 1, 0)
    if state == OK:
        rows = db.execute(_OUTPUT, (from_key, end_key))
        return _collect(rows, lambda row: row["line"], from_key, block_bytes)
    # Items without a result have an error line once the batch has ended.
    ended = batch["status"] in ENDED
    rows = db.execute(_ERRORS, (from_key, end_key, OPEN if ended else FAILED))

    def line_of(row: sqlite3.Row) -> bytes:
        if row["state"] == FAILED:
            line: bytes = row["line"]
            return line
        return unfinished_line(batch["id"], batch["status"], item_index(row["key"]), row["custom_id"])

    return _collect(rows, line_of, from_key, block_bytes)


_OUTPUT = (
    "SELECT items.key, line FROM items JOIN results ON results.key = items.key"
    f" WHERE items.key >= ? AND items.key < ? AND state = {OK} ORDER BY items.key"
)
_ERRORS = (
    "SELECT items.key, state, custom_id, line FROM items LEFT JOIN results ON results.key = items.key"
    f" WHERE items.key >= ? AND items.key < ? AND state IN ({FAILED}, ?) ORDER BY items.key"
)


def _collect(rows: sqlite3.Cursor, line_of: Callable[[sqlite3.Row], bytes], from_key: int, block_bytes: int) -> Page:
    lines: list[bytes] = []
    size = 0
    next_key = from_key
    for row in rows:
        line = line_of(row)
        lines.append(line)
        size += len(line) + 1
        next_key = row["key"] + 1
        if size >= block_bytes:
            break
    rows.close()
    return Page(lines=b"".join(line + b"\n" for line in lines), next_key=next_key)


def unfinished_line(batch_id: str, status: str, index: int, custom_id: str) -> bytes:
    """The error line of an item that its batch ended without."""
    code, message = _REASONS[status]
    return (
        f'{{"id": "{request_id(batch_id, index)}", "custom_id": {json.dumps(custom_id)}, "response": null, '
        f'"error": {{"code": "{code}", "message": "{message}"}}}}'
    ).encode()


def unfinished_bytes(status: str, items: int, id_bytes: int) -> int:
    """Size of those lines with their line breaks; ``id_bytes`` is the sum of ``id_size``."""
    if not items:
        return 0
    fixed = len(unfinished_line("batch_" + "0" * 32, status, 0, "")) + 1
    return items * (fixed - len('""')) + id_bytes


def id_size(custom_id: str) -> int:
    return len(json.dumps(custom_id))
