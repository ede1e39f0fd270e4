"""Rows with their sums: written, changed and kept twice.

An item is a row that points into the uploaded file, so that input is stored once. Items and results have one key,
``batch number << 32 | index``: both tables lie in the order of the input, and the primary key of ``results`` is what
makes a second result for an item impossible.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chiron.store.jobs.database import Database
from chiron.store.sums import COLUMNS, ITEM_COLUMNS, Row, row_sum

OPEN, OK, FAILED, LOST = 0, 1, 2, 3
"""States of an item: no result yet, a line in the output file, a line in the error file; it had a line, which was
damaged on the disk, and counts as failed."""

BATCH_DEFAULTS: dict[str, object] = dict.fromkeys(COLUMNS["batches"]) | {
    "total": 0,
    "completed": 0,
    "failed": 0,
    "errors": "[]",
    "recent": "[]",
    "output_bytes": 0,
    "error_bytes": 0,
    "lanes": "[]",
    "incomplete": 0,
    "usage": "[0, 0, 0, 0]",
}

QUOTED = tuple(f'"{name}"' for name in ITEM_COLUMNS)
"""Columns of an item, to be used in statements: ``offset`` is a word of SQL."""

INDEX_MAX = (1 << 32) - 1
"""No item has it: an input file holds fewer lines."""


def item_key(batch: int, index: int) -> int:
    assert 0 <= index <= INDEX_MAX, index
    return batch << 32 | index


def item_index(key: int) -> int:
    return key & INDEX_MAX


def insert_row(db: Database, table: str, values: Mapping[str, object]) -> int:
    """A new row of ``files``, ``batches`` or ``purges``, all columns but its number given. Returns the number."""
    names = COLUMNS[table][1:]
    marks = ", ".join("?" * len(names))
    row = [values[name] for name in names]
    new = db.execute(f"INSERT INTO {table}({', '.join(names)}, sum) VALUES({marks}, 0) RETURNING no", row)
    no: int = new.fetchone()["no"]
    new.close()
    db.execute(f"UPDATE {table} SET sum = ? WHERE no = ?", (row_sum(table, [no, *row]), no))
    return no


def write_row(db: Database, table: str, values: Mapping[str, Any]) -> None:
    """A whole row with the key that it has; what was there is replaced."""
    row = [values[name] for name in COLUMNS[table]]
    db.insert_rows(table, (*COLUMNS[table], "sum"), [(*row, row_sum(table, row))], True)


def change_row(db: Database, table: str, row: Row, changes: Mapping[str, object]) -> dict[str, Any]:
    """Change columns of a row that was checked and has a number. Returns its values."""
    values: dict[str, Any] = {name: row[name] for name in COLUMNS[table]} | dict(changes)
    columns = ", ".join(f"{name} = ?" for name in changes)
    total = row_sum(table, [values[name] for name in COLUMNS[table]])
    db.execute(f"UPDATE {table} SET {columns}, sum = ? WHERE no = ?", (*changes.values(), total, row["no"]))
    return values


_COPIED = ("batches", "files")


def copy_number(table: str, no: int) -> int:
    return 2 * no + _COPIED.index(table)


def copied(copy_no: int) -> tuple[str, int]:
    """Table and number of the row that a copy is of."""
    return _COPIED[copy_no % 2], copy_no // 2


def keep_copy(db: Database, table: str, values: Mapping[str, Any]) -> None:
    if not db.keeps_copies:
        return
    row = [value.hex() if isinstance(value := values[name], bytes) else value for name in COLUMNS[table]]
    write_row(db, "copies", {"no": copy_number(table, values["no"]), "row": json.dumps(row)})


def drop_copy(db: Database, table: str, no: int) -> None:
    if db.keeps_copies:
        db.execute("DELETE FROM copies WHERE no = ?", (copy_number(table, no),))


def read_copy(table: str, text: str) -> dict[str, Any]:
    values = dict(zip(COLUMNS[table], json.loads(text), strict=True))
    if values.get("block_sums") is not None:
        values["block_sums"] = bytes.fromhex(values["block_sums"])
    return values
