"""Pages of lists, and what is left to validate."""

from __future__ import annotations

from typing import Any, Literal

from chiron.store.jobs.batches import (
    SELECT_BATCH,
    SELECT_FILE,
    checked_batch,
    checked_file,
    find_batch,
    find_file,
    read_batch,
    read_file_row,
    storable,
)
from chiron.store.jobs.database import Database
from chiron.store.port import Batch, StoredFile

Order = Literal["asc", "desc"]


def list_files(
    db: Database, owner: str | None, after: str | None, limit: int, order: Order, purpose: str | None
) -> list[StoredFile]:
    wanted = {"owner = ?": owner, "purpose = ?": None if purpose is None else storable(purpose)}
    behind = None if after is None else find_file(db, after, owner)["no"]
    rows = _page(db, SELECT_FILE, wanted, behind, limit, order)
    return [read_file_row(checked_file(row)) for row in rows]


def list_batches(db: Database, owner: str | None, after: str | None, limit: int) -> list[Batch]:
    behind = None if after is None else find_batch(db, after, owner)["no"]
    return [
        read_batch(checked_batch(row)) for row in _page(db, SELECT_BATCH, {"owner = ?": owner}, behind, limit, "desc")
    ]


def _page(
    db: Database, select: str, wanted: dict[str, str | None], behind: int | None, limit: int, order: Order
) -> list[Any]:
    """Rows that fit all of ``wanted`` that is not None, from behind a number."""
    conditions: dict[str, object] = {text: value for text, value in wanted.items() if value is not None}
    if behind is not None:
        conditions["no > ?" if order == "asc" else "no < ?"] = behind
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = db.execute(
        f"{select}{where} ORDER BY no {'ASC' if order == 'asc' else 'DESC'} LIMIT ?",
        (*conditions.values(), max(0, limit)),
    )
    return rows.fetchall()


def unvalidated(db: Database) -> list[Batch]:
    rows = db.execute(f"{SELECT_BATCH} WHERE status = 'validating' OR incomplete != 0 ORDER BY no")
    return [read_batch(checked_batch(row)) for row in rows.fetchall()]
