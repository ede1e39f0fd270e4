"""Output and error files: not files, but rows read in the order of the input, a block at a time.

Each block is a short read of its own, from behind the last key: a slow client holds back no checkpoint. The results of
a batch that has ended do not change, so the blocks fit together; when they go, the reader hears of it. Each line is
checked against its sum, and the lines of a batch that has ended against their number and size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from chiron.store.jobs.database import Cursor, Database
from chiron.store.jobs.rows import FAILED, LOST, OK, OPEN, QUOTED, item_index, item_key
from chiron.store.port import ENDED, StoreDamaged, StoreUnavailable, request_id
from chiron.store.sums import Row, item_fits, result_fits

_REASONS = {
    "expired": ("batch_expired", "The batch's completion window ended before this request was completed."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was completed."),
    "failed": ("input_file_missing", "The input file was lost before this request was completed."),
}
"""By status of the batch: why items without a result have none."""
_LOST = ("result_damaged", "The result of this request was damaged on the server's disk.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    lines: bytes
    """Whole lines, each with its line break; empty at the end."""
    count: int
    next_key: int


@dataclass(slots=True)
class Reading:
    """How far a reader of a batch's lines is."""

    state: int
    """``OK`` for the output, ``FAILED`` for the errors."""
    next_key: int
    ended: bool
    """Whether the batch had ended when this began: then the lines are all there are."""
    lines: int = 0
    size: int = 0

    def turn(self, page: Page) -> None:
        self.next_key = page.next_key
        self.lines += page.count
        self.size += len(page.lines)


def begin_reading(batch: Row, state: int) -> Reading:
    return Reading(state=state, next_key=item_key(batch["no"], 0), ended=batch["status"] in ENDED)


def read_page(db: Database, batch: Row, reading: Reading, block_bytes: int) -> Page:
    """The next lines. Raises StoreDamaged where they are not what was written, at the end also if some are missing."""
    end_key = item_key(batch["no"] + 1, 0)
    ended = batch["status"] in ENDED
    if reading.state == OK:
        rows = db.page(_OUTPUT, (reading.next_key, end_key), block_bytes)
    else:
        if batch["incomplete"]:
            raise StoreUnavailable(f"batch {batch['id']!r} is being repaired after damage; try again in a moment")
        # Items without a result have an error line once the batch has ended.
        rows = db.page(_ERRORS, (reading.next_key, end_key, OPEN if ended else FAILED), block_bytes)

    def line_of(row: Row, number: int) -> bytes:
        line: bytes = row["line"]
        if row["state"] in (OK, FAILED):
            fits = result_fits(row["key"], row["state"], line, row["sum"])
        else:
            fits = item_fits(row)
            code, message = _LOST if row["state"] == LOST else _REASONS.get(batch["status"], _LOST)
            line = _made_line(batch["id"], item_index(row["key"]), row["custom_id"], code, message)
        if not fits:
            raise _damaged(batch, reading, f"line {number}, of request {item_index(row['key']) + 1} of the input, is")
        return line

    page = _collect(rows, line_of, reading, block_bytes)
    if not page.count and reading.ended:
        _check_end(batch, reading)
    return page


def _check_end(batch: Row, reading: Reading) -> None:
    of_output = reading.state == OK
    count = batch["completed" if of_output else "failed"]
    size = batch["output_bytes" if of_output else "error_bytes"]
    if (reading.lines, reading.size) != (count, size):
        found = f"it has {reading.lines} lines with {reading.size} bytes where {count} with {size} were kept, so it is"
        raise _damaged(batch, reading, found)


def _damaged(batch: Row, reading: Reading, what: str) -> StoreDamaged:
    of_output = reading.state == OK
    name = batch["output_file_id" if of_output else "error_file_id"]
    file = f"file {name!r}" if name else f"the {'output' if of_output else 'errors'} so far"
    return StoreDamaged(f"batch {batch['id']!r}, {file}: {what} damaged on the server's disk")


_OUTPUT = (
    "SELECT items.key, state, line, results.sum FROM items JOIN results ON results.key = items.key"
    f" WHERE items.key >= ? AND items.key < ? AND state = {OK} ORDER BY items.key"
)
_ERRORS = (
    f"SELECT items.{', items.'.join(QUOTED)}, line,"
    f" CASE WHEN state = {FAILED} THEN results.sum ELSE items.sum END AS sum"
    " FROM items LEFT JOIN results ON results.key = items.key"
    f" WHERE items.key >= ? AND items.key < ? AND state IN ({FAILED}, {LOST}, ?) ORDER BY items.key"
)


def _collect(rows: Cursor, line_of: Callable[[Row, int], bytes], reading: Reading, block_bytes: int) -> Page:
    lines: list[bytes] = []
    size = 0
    next_key = reading.next_key
    for row in rows:
        line = line_of(row, reading.lines + len(lines) + 1)
        lines.append(line)
        size += len(line) + 1
        next_key = row["key"] + 1
        if size >= block_bytes:
            break
    rows.close()
    return Page(lines=b"".join(line + b"\n" for line in lines), count=len(lines), next_key=next_key)


def unfinished_line(batch_id: str, status: str, index: int, custom_id: str) -> bytes:
    """The error line of an item that its batch ended without."""
    return _made_line(batch_id, index, custom_id, *_REASONS[status])


def lost_line(batch_id: str, index: int, custom_id: str) -> bytes:
    """The error line of an item whose result was damaged."""
    return _made_line(batch_id, index, custom_id, *_LOST)


def _made_line(batch_id: str, index: int, custom_id: str, code: str, message: str) -> bytes:
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
